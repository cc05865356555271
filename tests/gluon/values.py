"""Values of an emulated program: numbers and blocks of numbers with a dtype and a layout.

A scalar is a block without dimensions. Layouts are Gluon's own objects; None is one that nobody has said (Gluon's
AutoLayout, and what it would infer for a reshape), and goes with any other.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Number = bool | int | float


class Hazard(RuntimeError):
    """The program reads or writes what something asynchronous still works on, or waits for what cannot happen."""


@functools.cache
def gluon() -> Any:
    """Gluon's own language module: dtypes and layouts are taken from there."""
    from triton.experimental.gluon import language

    return language


def torch_dtype(dtype: Any) -> torch.dtype:
    """The dtype of PyTorch for one of Gluon."""
    if isinstance(dtype, torch.dtype):
        return dtype
    names = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64", "int1": "bool"}
    found = getattr(torch, names.get(dtype.name, dtype.name), None)
    if not isinstance(found, torch.dtype):
        raise NotImplementedError(f"the emulator has no dtype {dtype}")
    return found


def gluon_dtype(dtype: torch.dtype) -> Any:
    """The dtype of Gluon for one of PyTorch."""
    return getattr(gluon(), "int1" if dtype == torch.bool else str(dtype).removeprefix("torch."))


def known(layout: Any) -> Any:
    """The layout, or None for one that is still to be inferred."""
    return None if layout is None or type(layout).__name__ in ("AutoLayout", "CoalescedLayout") else layout


class Value:
    """A block of numbers, or with no dimensions a scalar, in registers."""

    __hash__ = None

    def __init__(self, data: Tensor, layout: Any = None) -> None:
        self.data = data
        self.layout = known(layout) if data.ndim else None
        if self.layout is not None and self.layout.rank != data.ndim:
            raise ValueError(f"a block of shape {list(data.shape)} with a layout of rank {self.layout.rank}")

    @property
    def dtype(self) -> Any:
        return gluon_dtype(self.data.dtype)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> Any:
        return SimpleNamespace(element_ty=self.dtype, scalar=self.dtype, shape=self.shape, layout=self.layout)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotImplementedError(f"the emulator has no tensor.{name}")

    def __repr__(self) -> str:
        return f"Value({self.shape}, {self.data.dtype}, {self.layout})"

    def __bool__(self) -> bool:
        return bool(self._scalar("a condition"))

    def __index__(self) -> int:
        data = self._scalar("an index")
        if data.is_floating_point():
            raise TypeError(f"{data.dtype} is no index")
        return int(data)

    def __float__(self) -> float:
        return float(self._scalar("a number"))

    def _scalar(self, what: str) -> Tensor:
        if self.data.ndim:
            raise TypeError(f"{what} must be a scalar, not a block of shape {self.shape}")
        return self.data

    def to(self, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> "Value":
        target = torch_dtype(dtype)
        return Value(self.data.view(target) if bitcast else self.data.to(target), self.layout)

    def __getitem__(self, key: Any) -> "Value":
        data, layout = expand(self.data, self.layout, key)
        return Value(data, layout)

    def reshape(self, *shape: Any) -> "Value":
        return Value(self.data.reshape(sizes(shape)))

    def permute(self, *order: Any) -> "Value":
        return Value(self.data.permute(sizes(order)))

    def trans(self, *order: Any) -> "Value":
        return self.permute(*(order or range(self.data.ndim)[::-1]))

    def __neg__(self) -> "Value":
        return Value(-self.data, self.layout)

    def __invert__(self) -> "Value":
        return Value(~self.data, self.layout)


def sizes(items: Any) -> list[int]:
    """Sizes given one by one, or as one list."""
    if len(items) == 1 and isinstance(items[0], list | tuple):
        items = items[0]
    return [int(item) for item in items]


def expand(data: Tensor, layout: Any, key: Any) -> tuple[Tensor, Any]:
    """`data[:, None]` and the like: the layout must be the slice of another one along the new dimension."""
    for axis, item in enumerate(key if isinstance(key, tuple) else (key,)):
        if item is None:
            data = data.unsqueeze(axis)
            if layout is not None:
                if type(layout).__name__ != "SliceLayout" or layout.dim != axis:
                    raise ValueError(f"a new dimension {axis} needs a SliceLayout of it, not {layout}")
                layout = layout.parent
        elif item != slice(None):
            raise TypeError(f"a block is not indexed by {item!r}: only by ':' and None")
    return data, layout


def value(x: Any) -> Value:
    """A number of Python as a scalar: 32 bits where they hold it."""
    if isinstance(x, Value):
        return x
    if isinstance(x, bool):
        return Value(torch.tensor(x))
    if isinstance(x, int):
        return Value(torch.tensor(x, dtype=torch.int32 if -(2**31) <= x < 2**31 else torch.int64))
    if isinstance(x, float):
        return Value(torch.tensor(x, dtype=torch.float32))
    raise TypeError(f"{x!r} is no value of a kernel")


def common_dtype(a: Any, b: Any) -> torch.dtype:
    """Triton's promotion: a number of Python takes a tensor's dtype unless its kind is higher."""
    if isinstance(a, Value) and isinstance(b, Value):
        return torch.promote_types(a.data.dtype, b.data.dtype)
    if not isinstance(a, Value) and not isinstance(b, Value):
        return torch.promote_types(value(a).data.dtype, value(b).data.dtype)
    number, dtype = (b, a.data.dtype) if isinstance(a, Value) else (a, b.data.dtype)
    if isinstance(number, float) and not dtype.is_floating_point:
        return torch.float32
    if isinstance(number, int) and not isinstance(number, bool) and dtype == torch.bool:
        return torch.int32
    return dtype


def common_layout(*values: Any) -> Any:
    """The one layout of all blocks among the values; scalars have none."""
    blocks = [v for v in values if v is not None and v.layout is not None]
    for block in blocks[1:]:
        if block.layout != blocks[0].layout:
            raise ValueError(f"layouts differ: {blocks[0].layout} and {block.layout}")
    return blocks[0].layout if blocks else None


def elementwise(function: Callable[..., Tensor], a: Any, b: Any, *, wide: bool = False) -> Value:
    """`function` of two values in their common dtype; `wide`: as a division, in float32 at least."""
    dtype = common_dtype(a, b)
    if wide and dtype not in (torch.float32, torch.float64):
        dtype = torch.float32
    a, b = value(a), value(b)
    return Value(function(a.data.to(dtype), b.data.to(dtype)), common_layout(a, b))


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point():
        raise TypeError("// is for integers")
    return torch.div(a, b, rounding_mode="trunc")


# Integers are divided as in C.
BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "truediv": torch.true_divide, "floordiv": _quotient,
    "mod": torch.fmod, "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor,
    "lshift": torch.bitwise_left_shift, "rshift": torch.bitwise_right_shift, "lt": torch.lt, "le": torch.le,
    "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
}  # fmt: skip
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def _operator(name: str, reflected: bool) -> Callable[[Value, Any], Any]:
    function, wide = BINARY[name], name == "truediv"

    def operator(self: Value, other: Any) -> Any:
        if not isinstance(other, Value | bool | int | float):
            return NotImplemented
        a, b = (other, self) if reflected else (self, other)
        return elementwise(function, a, b, wide=wide)

    return operator


for _name in BINARY:
    setattr(Value, f"__{_name}__", _operator(_name, False))
    if _name not in COMPARISONS:
        setattr(Value, f"__r{_name}__", _operator(_name, True))
