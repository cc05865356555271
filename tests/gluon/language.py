"""`gluon.language`: what a kernel calls as `gl`. Layouts and dtypes are Gluon's own."""

import builtins
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.gluon import memory
from tests.gluon.memory import Pointer
from tests.gluon.shared import Program, Shared
from tests.gluon.values import (
    Value,
    common_dtype,
    common_layout,
    elementwise,
    gluon,
    sizes,
    torch_dtype,
    value,
)


def constexpr(x: Any) -> Any:
    return x


def static_range(*bounds: Any) -> Iterator[int]:
    return iter(builtins.range(*(int(b) for b in bounds)))


def range(*bounds: Any, **options: Any) -> Iterator[Value]:
    """The loop variable is a value of the kernel, as Triton's is."""
    return (value(i) for i in builtins.range(*(int(b) for b in bounds)))


def program_id(axis: Any) -> Value:
    return value(Program.running.place[int(axis)])


def num_programs(axis: Any) -> Value:
    return value(Program.running.launch.grid[int(axis)])


def num_warps() -> int:
    return Program.running.launch.num_warps


def num_ctas() -> int:
    return 1


def thread_barrier() -> None:
    Program.running.synchronise()


def barrier(*, cluster: Any = False) -> None:
    if cluster:
        raise NotImplementedError("the emulator has no clusters")
    Program.running.synchronise()


def allocate_shared_memory(element_ty: Any, shape: Any, layout: Any, value: Value | None = None) -> Shared:
    memory = Program.running.allocate(element_ty, sizes([shape]), layout)
    if value is not None:
        memory.store(value)
    return memory


def load(
    pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: Any = "", eviction_policy: Any = "",
    volatile: Any = False,
) -> Value:  # fmt: skip
    return memory.load(pointer, mask, other)


def store(pointer: Pointer, value: Any, mask: Any = None, cache_modifier: Any = "", eviction_policy: Any = "") -> None:
    memory.store(pointer, value, mask)


def arange(start: Any, end: Any, layout: Any = None) -> Value:
    return Value(torch.arange(int(start), int(end), dtype=torch.int32), layout)


def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Value:
    filled = Value(torch.zeros(sizes([shape]), dtype=torch_dtype(dtype)), layout)
    filled.data.fill_(value.data if isinstance(value, Value) else value)
    return filled


def zeros(shape: Any, dtype: Any, layout: Any = None) -> Value:
    return full(shape, 0, dtype, layout)


def full_like(input: Value, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None) -> Value:
    dtype = input.dtype if dtype is None else dtype
    return full(input.shape if shape is None else shape, value, dtype, input.layout if layout is None else layout)


def zeros_like(input: Value, shape: Any = None, dtype: Any = None, layout: Any = None) -> Value:
    return full_like(input, 0, shape, dtype, layout)


def to_tensor(x: Any) -> Value:
    return value(x)


def cast(input: Any, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Value:
    return value(input).to(dtype, fp_downcast_rounding, bitcast)


def convert_layout(value: Value, layout: Any, assert_trivial: bool = False) -> Value:
    if not value.shape:
        raise ValueError("a scalar has no layout")
    return Value(value.data, layout)


def set_auto_layout(value: Value, layout: Any) -> Value:
    if value.layout is not None:
        raise ValueError(f"set_auto_layout of a block that has the layout {value.layout}")
    return Value(value.data, layout)


def expand_dims(input: Value, axis: Any) -> Value:
    axis = int(axis) % (len(input.shape) + 1)
    return input[(*[builtins.slice(None)] * axis, None)]


def broadcast(input: Value, other: Value) -> tuple[Value, Value]:
    layout = common_layout(input, other)
    a, b = torch.broadcast_tensors(input.data, other.data)
    return Value(a, layout), Value(b, layout)


def reshape(input: Value, *shape: Any) -> Value:
    return input.reshape(*shape)


def permute(input: Value, *order: Any) -> Value:
    return input.permute(*order)


def join(a: Value, b: Value) -> Value:
    a, b = broadcast(a, b)
    return Value(torch.stack([a.data, b.data], -1))


def split(a: Value) -> tuple[Value, Value]:
    first, second = a.data.unbind(-1)
    return Value(first), Value(second)


def where(condition: Any, x: Any, y: Any) -> Value:
    dtype = common_dtype(x, y)
    condition, x, y = value(condition), value(x), value(y)
    layout = common_layout(condition, x, y)
    return Value(torch.where(condition.data.bool(), x.data.to(dtype), y.data.to(dtype)), layout)


def cdiv(x: Any, div: Any) -> Any:
    return (x + div - 1) // div


# A NaN beside a number gives the number, as the instruction does.
def maximum(x: Any, y: Any, propagate_nan: Any = None) -> Value:
    return elementwise(torch.fmax, x, y)


def minimum(x: Any, y: Any, propagate_nan: Any = None) -> Value:
    return elementwise(torch.fmin, x, y)


def clamp(x: Any, min: Any, max: Any, propagate_nan: Any = None) -> Value:
    return minimum(maximum(x, min), max)


def add(x: Any, y: Any, sanitize_overflow: Any = True) -> Value:
    return elementwise(torch.add, x, y)


def sub(x: Any, y: Any, sanitize_overflow: Any = True) -> Value:
    return elementwise(torch.sub, x, y)


def mul(x: Any, y: Any, sanitize_overflow: Any = True) -> Value:
    return elementwise(torch.mul, x, y)


def fdiv(x: Any, y: Any, ieee_rounding: Any = False) -> Value:
    return elementwise(torch.true_divide, x, y, wide=True)


def fma(x: Any, y: Any, z: Any) -> Value:
    return mul(x, y) + z


def abs(x: Any) -> Value:
    return Value(value(x).data.abs(), value(x).layout)


def _of_floats(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Value]:
    def apply(x: Any) -> Value:
        x = value(x)
        if x.data.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{function.__name__} takes float32 and float64, not {x.data.dtype}")
        return Value(function(x.data), x.layout)

    return apply


exp, exp2, log, log2, sqrt, sqrt_rn, rsqrt, sin, cos, erf, floor, ceil = map(
    _of_floats,
    [torch.exp, torch.exp2, torch.log, torch.log2, torch.sqrt, torch.sqrt, torch.rsqrt, torch.sin, torch.cos,
     torch.erf, torch.floor, torch.ceil],
)  # fmt: skip


def inline_asm_elementwise(asm: str, constraints: str, args: Any, dtype: Any, is_pure: bool, pack: int) -> Value:
    """The one instruction that is known: all bits of two 16-bit numbers."""
    if asm != "and.b32 $0, $1, $2;" or pack != 2:
        raise NotImplementedError(f"the emulator has no inline assembly {asm!r}")
    a, b = (x.data.view(torch.int16) for x in args)
    return Value((a & b).view(torch_dtype(dtype)), common_layout(*args))


def _reduced(input: Value, axis: Any, keep_dims: Any, function: Callable[[Tensor, int], Tensor]) -> Value:
    if axis is None:
        return Value(function(input.data.reshape(-1), 0))
    axis = int(axis) % len(input.shape)
    data = function(input.data, axis)
    if keep_dims:
        return Value(data.unsqueeze(axis), input.layout)
    return Value(data, None if input.layout is None else gluon().SliceLayout(axis, input.layout))


def sum(input: Value, axis: Any = None, keep_dims: Any = False, dtype: Any = None) -> Value:
    given = input.data.dtype
    small = not given.is_floating_point and given.itemsize < 4
    kind = torch_dtype(dtype) if dtype is not None else torch.int32 if small else given
    return _reduced(input, axis, keep_dims, lambda x, d: x.to(kind).sum(d, dtype=kind))


def max(input: Value, axis: Any = None, return_indices: Any = False, keep_dims: Any = False) -> Value:
    if return_indices:
        raise NotImplementedError("the emulator has no indices of a maximum")
    return _reduced(input, axis, keep_dims, lambda x, d: x.amax(d))


def min(input: Value, axis: Any = None, return_indices: Any = False, keep_dims: Any = False) -> Value:
    if return_indices:
        raise NotImplementedError("the emulator has no indices of a minimum")
    return _reduced(input, axis, keep_dims, lambda x, d: x.amin(d))


def _folded(inputs: Any, axis: Any, combine: Callable[..., Any], reverse: bool) -> list[tuple[Tensor, ...]]:
    """The running results of a combination along an axis, one after the other."""
    items = inputs if isinstance(inputs, tuple) else (inputs,)
    steps = [x.data.movedim(int(axis), 0).unbind(0) for x in items]
    order = [tuple(Value(x) for x in step) for step in zip(*steps, strict=True)]

    def step(a: tuple[Value, ...], b: tuple[Value, ...]) -> tuple[Value, ...]:
        result = combine(*a, *b)
        return result if isinstance(result, tuple) else (result,)

    folded = itertools.accumulate(reversed(order) if reverse else order, step)
    return [tuple(x.data for x in result) for result in folded]


def reduce(input: Any, axis: Any, combine_fn: Callable[..., Any], keep_dims: Any = False) -> Any:
    last = _folded(input, axis, combine_fn, False)[-1]
    first = input[0] if isinstance(input, tuple) else input
    results = tuple(_reduced(first, axis, keep_dims, lambda _x, _d, data=data: data) for data in last)
    return results if isinstance(input, tuple) else results[0]


def associative_scan(input: Any, axis: Any, combine_fn: Callable[..., Any], reverse: Any = False) -> Any:
    steps = _folded(input, axis, combine_fn, bool(reverse))
    layout = (input[0] if isinstance(input, tuple) else input).layout
    columns = [torch.stack(column[::-1] if reverse else column, int(axis)) for column in zip(*steps, strict=True)]
    results = tuple(Value(data, layout) for data in columns)
    return results if isinstance(input, tuple) else results[0]


def _unchanged(x: Any, *_: Any) -> Any:
    return x


multiple_of = max_contiguous = max_constancy = _unchanged


def assume(condition: Any) -> None:
    assert condition, "gl.assume is false"


def device_assert(condition: Any, msg: str = "", mask: Any = None) -> None:
    condition = value(condition).data.bool()
    assert (condition if mask is None else condition | ~value(mask).data).all(), msg


def static_assert(condition: Any, msg: str = "") -> None:
    assert condition, msg


def static_print(*_: Any, **__: Any) -> None:
    pass


device_print = static_print
