"""What kernels are written with: typed pointers, loads and stores that convert, and elementwise functions.

Kernels index raw pointers, as C does: an array's bounds and negative indices would keep LLVM from vectorising a loop.
Everything here is plain LLVM arithmetic on one element, which the compiler widens to the CPU's vectors.
"""

from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from dualscan.ops._numba.launch import launch

# `nnan` and `ninf` are left out: a NaN in the data must come out as a NaN.
FASTMATH = {"reassoc", "contract", "arcp", "nsz", "afn"}
OPTIONS: dict[str, Any] = {"cache": True, "error_model": "numpy", "fastmath": FASTMATH, "nogil": True}
FLOAT, INT, HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16)

_thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
_thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
# All workers wait here for one another; for kernels that are launched with `meet`.
barrier = types.ExternalFunction("GOMP_barrier", types.void())
_ENTRY = types.void(types.CPointer(types.int64))


OPERATORS = Path(__file__).parents[1]

# A decorated function takes the arguments that follow the typing context, which a type checker does not know.
intrinsic: Any = _intrinsic


def forget_stale_code(operators: Path) -> None:
    """Deletes kept machine code that is older than some source file under a folder.

    Numba compares a kernel with its own file only, not with the files of the functions that it has inlined.
    """
    newest = max(path.stat().st_mtime for path in operators.rglob("*.py"))
    for index in list(operators.rglob("__pycache__/*.nbi")):
        with suppress(OSError):  # another process was faster, or the folder is read-only
            if index.stat().st_mtime < newest:
                index.unlink()


forget_stale_code(OPERATORS)


def _decorated(decorator: Any, function: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return decorator(*arguments, **options)(function)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        # Neither the package's folder nor the user's cache folder can be written.
        return decorator(*arguments, **{**options, "cache": False})(function)


def device_function(function: Any) -> Any:
    """A function that kernels call."""
    return _decorated(numba.njit, function, **OPTIONS)


class Kernel:
    """An entry point, a function of the block of arguments, compiled on the first call and then kept on disk.

    Calling it with tensors and integers runs it on `workers` threads; the function finds them in `p[2:]`.
    """

    def __init__(self, function: Any):
        self._function = function

    @cached_property
    def _address(self) -> int:
        options = {name: value for name, value in OPTIONS.items() if name != "nogil"}
        address = _decorated(numba.cfunc, self._function, _ENTRY, **options).address
        assert address is not None
        return address

    def __call__(self, *arguments: Any, workers: int, meet: bool = False) -> None:
        launch(self._address, arguments, workers, meet)


@device_function
def share(block, items):
    """The range of items that the calling worker does."""
    worker, workers = block[0], block[1]
    if worker < 0:
        worker, workers = np.int64(_thread_number()), np.int64(_thread_count())
    return items * worker // workers, items * (worker + 1) // workers, worker


def _pointer_to(element: types.Type) -> Any:
    @intrinsic
    def cast(_typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return cast


# An address as a pointer. bfloat16 has no type in Numba: its elements are uint16 that `load` and `store` convert.
float32, float64, bfloat16 = (_pointer_to(t) for t in (types.float32, types.float64, types.uint16))
int64 = _pointer_to(types.int64)


@intrinsic
def like(_typing, pointer, address):
    """An address as a pointer to what another pointer points to."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(signature.return_type))

    return pointer(pointer, types.int64), generate


@intrinsic
def at(_typing, pointer, offset):
    """`pointer + offset`, counted in elements."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), generate


@intrinsic
def load(_typing, pointer, index):
    """Element `index` of a float32 or bfloat16 pointer, as float32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        value = builder.load(builder.gep(args[0], [args[1]]), align=pointer.dtype.bitwidth // 8)
        if pointer.dtype == types.uint16:
            value = builder.bitcast(builder.shl(builder.zext(value, INT), INT(16)), FLOAT)
        return value

    return types.float32(pointer, types.int64), generate


@intrinsic
def store(_typing, pointer, index, value):
    """Writes a float32 to a float32 or bfloat16 pointer, rounded to nearest even; a NaN stays one."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        target, value = builder.gep(args[0], [args[1]]), args[2]
        if pointer.dtype == types.uint16:
            bits = builder.bitcast(value, INT)
            even = builder.and_(builder.lshr(bits, INT(16)), INT(1))
            rounded = builder.trunc(builder.lshr(builder.add(builder.add(bits, INT(0x7FFF)), even), INT(16)), HALF)
            value = builder.select(builder.fcmp_unordered("uno", value, value), HALF(0x7FC0), rounded)
        builder.store(value, target, align=pointer.dtype.bitwidth // 8)
        return _context.get_dummy_value()

    return types.void(pointer, types.int64, types.float32), generate


# exp(x) = 2^n exp(r) with |r| <= ln(2) / 2: ln(2) in two parts, and Cephes' minimax polynomial of degree 6.
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LARGEST, _SMALLEST = 88.0, -87.3
# Added to a float32, it leaves the nearest integer in the low bits.
_ROUNDER = 1.5 * 2**23


def build_exp(builder: Any, x: Any, lanes: int) -> Any:
    """The instructions of `exp` for a float32, or for a vector of so many."""
    kind = FLOAT if lanes == 1 else ir.VectorType(FLOAT, lanes)
    whole = INT if lanes == 1 else ir.VectorType(INT, lanes)
    name = "llvm.fma.f32" if lanes == 1 else f"llvm.fma.v{lanes}f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)

    def constant(value: float) -> ir.Constant:
        value = float(np.float32(value))
        return ir.Constant(kind, value if lanes == 1 else [value] * lanes)

    def integer(value: int) -> ir.Constant:
        return ir.Constant(whole, value if lanes == 1 else [value] * lanes)

    def fma(a: Any, b: Any, c: Any) -> Any:
        return builder.call(function, (a, b, c))

    value = x
    for comparison, bound in (("<", _SMALLEST), (">", _LARGEST)):
        outside = builder.fcmp_ordered(comparison, value, constant(bound))
        value = builder.select(outside, constant(bound), value)
    shifted = fma(value, constant(_LOG2_E), constant(_ROUNDER))
    n = builder.fsub(shifted, constant(_ROUNDER))
    r = fma(n, constant(_LN2_LOW * -1), fma(n, constant(-_LN2_HIGH), value))
    p = constant(_COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        p = fma(p, r, constant(coefficient))
    p = fma(builder.fmul(p, r), r, builder.fadd(r, constant(1.0)))
    exponent = builder.shl(builder.add(builder.bitcast(shifted, whole), integer(127)), integer(23))
    result = builder.fmul(p, builder.bitcast(exponent, kind))
    return builder.select(builder.fcmp_ordered(">", x, constant(_LARGEST)), constant(float("inf")), result)


@intrinsic
def exp(_typing, _x):
    """exp of a float32 to about 1 unit in the last place; inf above 88, at least 1.2e-38 (never subnormal)."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return build_exp(builder, args[0], 1)

    return types.float32(types.float32), generate


ZERO, ONE = np.float32(0), np.float32(1)


@device_function
def sigmoid(x):
    return ONE / (ONE + exp(-x))


@device_function
def silu(x):
    return x / (ONE + exp(-x))


@device_function
def inverse_rms(u, size, eps):
    """1 / sqrt(mean(u^2) + eps) of `size` values."""
    total = ZERO
    for c in range(size):
        total += u[c] * u[c]
    return ONE / np.sqrt(total / np.float32(size) + eps)
