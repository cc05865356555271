"""Vectors as values: for loops over more arrays than LLVM will check for overlaps, and sums that stay in registers.

A vector is LANES float32; LLVM splits it where the CPU's are shorter. Scratch memory that kernels give to `read` and
`write` comes in multiples of LANES.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from dualscan.ops._numba.vector import FLOAT, INT, build_exp, intrinsic

LANES = 16
_VECTOR = ir.VectorType(FLOAT, LANES)


class Lanes(types.Type):
    """Numba's type of a vector."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, _VECTOR)


_LANES = Lanes()


def _at(builder: Any, pointer: Any, index: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), _VECTOR.as_pointer())


@intrinsic
def read(_typing, pointer, index):
    """LANES elements from `index` of a float32 pointer."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(_at(builder, *args), align=4)

    return _LANES(pointer, types.int64), generate


@intrinsic
def write(_typing, pointer, index, value):
    """Stores LANES elements from `index` on."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[2], _at(builder, *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, _LANES), generate


@intrinsic
def spread(_typing, value):
    """The same float32 in all lanes."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), args[0], INT(0))
        return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(INT, LANES), [0] * LANES))

    return _LANES(types.float32), generate


@intrinsic
def times(_typing, a, b):
    """a b."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fmul(*args)

    return _LANES(_LANES, _LANES), generate


@intrinsic
def times_plus(_typing, a, b, c):
    """a b + c, rounded once."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), args)

    return _LANES(_LANES, _LANES, _LANES), generate


@intrinsic
def exp(_typing, a):
    """exp, as `vector.exp`."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return build_exp(builder, args[0], LANES)

    return _LANES(_LANES), generate


@intrinsic
def total(_typing, a):
    """The sum of all lanes."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(FLOAT, [FLOAT, _VECTOR])
        add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(add, (ir.Constant(FLOAT, 0.0), args[0]), fastmath=("reassoc",))

    return types.float32(_LANES), generate
