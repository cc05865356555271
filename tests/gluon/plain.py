"""`triton.language`: what plain Triton has besides Gluon's functions. Blocks have no layouts here."""

from typing import Any

import torch

from tests.gluon.shared import Program
from tests.gluon.values import Value, sizes


def dot(
    input: Value, other: Value, acc: Any = None, input_precision: Any = None, allow_tf32: Any = None,
    max_num_imprecise_acc: Any = None, out_dtype: Any = None,
) -> Value:  # fmt: skip
    if input.data.dtype != other.data.dtype:
        raise ValueError(f"a product of {input.data.dtype} and {other.data.dtype}")
    wide = torch.promote_types(input.data.dtype, torch.float32)
    product = input.data.to(wide) @ other.data.to(wide)
    return Value(product if acc is None else product + acc.data)


def trans(input: Value, *dims: Any) -> Value:
    return input.trans(*dims)


def cumsum(input: Value, axis: Any = 0, reverse: Any = False, dtype: Any = None) -> Value:
    data, axis = input.data, int(axis)
    kind = data.dtype if data.is_floating_point() or data.itemsize >= 4 else torch.int32
    if reverse:
        return Value(data.flip(axis).cumsum(axis, dtype=kind).flip(axis))
    return Value(data.cumsum(axis, dtype=kind))


def gather(src: Value, index: Value, axis: Any) -> Value:
    return Value(src.data.gather(int(axis), index.data.long()))


def broadcast_to(input: Value, *shape: Any) -> Value:
    return Value(input.data.expand(sizes(shape)))


def sigmoid(x: Value) -> Value:
    return Value(torch.sigmoid(x.data))


def debug_barrier() -> None:
    Program.running.synchronise()
