"""The update of all parameters of a group in one launch: what AdamW has to read and write, and nothing else.

PyTorch's fused update stores the gradient that it has divided, which nobody reads, and needs a launch for every few
tensors. A program here takes a block of one tensor and finds its addresses in a table.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher

# Elements that a program takes, and its warps: few registers, so that many programs wait for memory at once.
BLOCK, WARPS = 2048, 8
# Columns of the table: addresses of the parameter, its gradient, both moments and its step counter, its elements, and
# its first block.
COLUMNS = 7


@triton.jit
def _of(address, dtype: tl.constexpr):
    """A tensor's memory, which the compiler may take for aligned to 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _load(at, i, count, WHOLE: tl.constexpr):
    return tl.load(at + i) if WHOLE else tl.load(at + i, mask=i < count, other=0.0)


@triton.jit
def _store(at, i, count, value, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(at + i, value)
    else:
        tl.store(at + i, value, mask=i < count)


@triton.jit
def _block(row, i, count, by, shrink, rate, root, weight1, weight2, eps, WHOLE: tl.constexpr):
    """Elements i of a tensor."""
    parameter, gradient = _of(tl.load(row), tl.float32), _of(tl.load(row + 1), tl.float32)
    first, second = _of(tl.load(row + 2), tl.float32), _of(tl.load(row + 3), tl.float32)
    p, g = _load(parameter, i, count, WHOLE), _load(gradient, i, count, WHOLE) * by
    m, v = _load(first, i, count, WHOLE), _load(second, i, count, WHOLE)
    m += weight1 * (g - m)
    v += weight2 * (g * g - v)
    p = p * shrink - rate * m / (tl.sqrt(v) * root + eps)
    _store(parameter, i, count, p, WHOLE)
    _store(first, i, count, m, WHOLE)
    _store(second, i, count, v, WHOLE)


@triton.jit
def adamw_kernel(
    table, owners, divisor, skip,
    lr: tl.float32, decay: tl.float32, eps: tl.float32,
    weight1: tl.float32, weight2: tl.float32, log_beta1: tl.float32, log_beta2: tl.float32,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid `(blocks of all tensors,)`; `owners` has the row of the table of each. Does nothing where `skip` is not 0.

    The weights are 1 - beta, and the step counters those after the update."""
    if tl.load(skip) == 0.0:
        row = table + tl.load(owners + tl.program_id(0)).to(tl.int64) * COLUMNS
        step = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32))).to(tl.float64)
        # 1 - beta^step, which has no digits in float32 while it is small.
        rate = (lr / (1.0 - tl.exp(step * log_beta1))).to(tl.float32)
        root = (1.0 / tl.sqrt(1.0 - tl.exp(step * log_beta2))).to(tl.float32)
        by, shrink = 1.0 / tl.load(divisor), 1.0 - lr * decay
        count, start = tl.load(row + 5), (tl.program_id(0) - tl.load(row + 6)) * BLOCK
        i = start + tl.arange(0, BLOCK)
        if start + BLOCK <= count:
            _block(row, i, count, by, shrink, rate, root, weight1, weight2, eps, True)
        else:
            _block(row, i, count, by, shrink, rate, root, weight1, weight2, eps, False)


_adamw = Launcher(adamw_kernel)


def blocks(count: int) -> int:
    """Programs for a tensor of `count` elements."""
    return -(-count // BLOCK)


def adamw(
    table: Tensor, owners: Tensor, divisor: Tensor, skip: Tensor, *, lr: float, betas: tuple[float, float], eps: float,
    decay: float,
) -> None:  # fmt: skip
    """Updates the tensors of a table.

    Args:
        table: `(tensors, COLUMNS)` int64, see there; float32 tensors, contiguous and aligned to 16 bytes.
        owners: `(programs,)` int32, the row of the table of each program; a tensor has `blocks` of them in a row.
        divisor: `()` float32, what gradients are divided by first.
        skip: `()` float32; unless it is 0, nothing happens.
        lr: learning rate of this step.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        decay: weight decay per unit of learning rate.
    """
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    with _triton.on_device(table):
        _adamw(
            (owners.numel(), 1, 1), (table, owners, divisor, skip),
            (lr, decay, eps, 1 - betas[0], 1 - betas[1], *logs), (BLOCK, COLUMNS), WARPS,
        )  # fmt: skip
