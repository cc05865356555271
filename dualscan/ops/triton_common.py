# ruff: noqa: RUF005 (Triton's tuples can be added, not unpacked)
"""What the kernels of the block share: a sigmoid of few instructions, memory fetched ahead, sums without atomics."""

import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops._launch import Launcher

# A tile of the sums: many rows, because their number is a chain of dependent steps, and few columns, because narrow
# matrices have few tiles else: 8 are a sector of memory.
ROWS = 1024
COLUMNS = 8

LOG2E = tl.constexpr(1.4426950408889634)
SECTOR = tl.constexpr(32)  # bytes that a cache fetches at least
LANES = tl.constexpr(32)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) within 3e-7: the square of an inverse root is one instruction, a division about eight."""
    root = tl.rsqrt(1.0 + tl.exp2(x * (-LOG2E)))
    return root * root


@triton.jit
def softplus(x):
    """log(1 + exp(x)), relative error 2e-7: with u = exp(-|x|) it is max(x, 0) + log1p(u), and log1p(u) / u a
    polynomial on [0, 1], whose coefficients are those of least relative error (4.7e-9 before rounding)."""
    u = tl.exp2(-tl.abs(x) * LOG2E)
    p = tl.fma(u, -0.0032439807, 0.0198512617)
    p = tl.fma(u, p, -0.0569591597)
    p = tl.fma(u, p, 0.106036171)
    p = tl.fma(u, p, -0.153055698)
    p = tl.fma(u, p, 0.196759313)
    p = tl.fma(u, p, -0.249541327)
    p = tl.fma(u, p, 0.333299637)
    p = tl.fma(u, p, -0.499999017)
    p = tl.fma(u, p, 1.0)
    return tl.fma(u, p, tl.maximum(x, 0.0))


@triton.jit
def silu_slope(x, gate):
    """SiLU's derivative, given `gate = sigmoid(x)`."""
    return gate * (1.0 + x * (1.0 - gate))


@triton.jit
def touch(base, first, begin, end, stride, edge, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Reads one number of every sector of a tile that is wanted soon, so that it waits in the first-level cache and in
    no registers: rows `first` to `first + ROWS` as far as they are in [begin, end), columns `edge` to `edge + WIDTH`,
    `width` of them at most. What is read goes to `keep_touched` later, before which nobody waits for it."""
    SECTORS: tl.constexpr = max(WIDTH * (base.dtype.element_ty.primitive_bitwidth // 8) // SECTOR, 1)
    i = tl.arange(0, ROWS * SECTORS)
    row, column = first + i // SECTORS, i % SECTORS * (WIDTH // SECTORS)
    live = (row >= begin) & (row < end) & (column < width)
    return tl.load(base + row.to(tl.int64) * stride + edge + column, mask=live, other=0.0).to(tl.float32)


@triton.jit
def keep_touched(base, touched, count):
    """Lets the compiler believe that all that was touched is needed: it does not know that no count is negative."""
    for k in tl.static_range(len(touched)):
        place = base + tl.arange(0, touched[k].shape[0]) * 2  # not adjacent, so that loads are not made wider
        tl.store(place, touched[k], mask=tl.full(touched[k].shape, count, tl.int32) < 0)


@triton.jit
def fold(a, b, lane, BIT: tl.constexpr):
    """Half of two sums: lanes without the bit BIT in their number go on with a, their partners with b."""
    upper = (lane & BIT) != 0
    return tl.where(upper, b, a) + tl.gather(tl.where(upper, a, b), lane ^ BIT, 1)


@triton.jit
def fold_products(a, b, factor, lane, BIT: tl.constexpr):
    """`fold` of a and b times a factor that they share: the product is added in the same instruction."""
    upper = (lane & BIT) != 0
    return tl.fma(tl.where(upper, b, a), factor, tl.gather(tl.where(upper, a, b) * factor, lane ^ BIT, 1))


@triton.jit
def fold_half_warps(total, lane):
    """The sums of 16 numbers over 16 lanes: lane i has that of number i % 16."""
    for k in tl.static_range(4):
        folded = ()
        for i in tl.static_range(8 >> k):
            folded = folded + (fold(total[i], total[i + (8 >> k)], lane, 8 >> k),)
        total = folded
    return total[0]


@triton.jit(do_not_specialize=["count", "columns"])
def sum_kernel(
    partial, matrix, vector, count: tl.int32, columns: tl.int32,
    MATRIX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums `partial` (count, lanes, columns). Lane j < MATRIX is column j of `matrix` (columns, MATRIX), one more lane
    is `vector` (columns,). Grid `(cdiv(columns, COLUMNS), lanes)`."""
    lane, lanes = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        place = ((first + r).to(tl.int64) * lanes + lane) * columns
        inside = (first + r < count)[:, None] & (c < columns)[None, :]
        total += tl.load(partial + place[:, None] + c[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    if lane < MATRIX:
        tl.store(matrix + c * MATRIX + lane, result.to(matrix.dtype.element_ty), mask=c < columns)
    else:
        tl.store(vector + c, result.to(vector.dtype.element_ty), mask=c < columns)


_sum = Launcher(sum_kernel)


def sum_partials(partial: Tensor, matrix: Tensor | None, vector: Tensor | None) -> None:
    """Adds up `(count, lanes, columns)` float32 in a fixed order.

    Args:
        partial: one slice a program; its lanes are those of `matrix`, then one of `vector`.
        matrix: `(columns, width)`, contiguous, written; None: no such lanes.
        vector: `(columns,)`, contiguous, written; None: no such lane.
    """
    count, lanes, columns = partial.shape
    width = 0 if matrix is None else matrix.shape[1]
    rows = ROWS if count > 32 else 32
    # An absent result is never stored to, but a pointer needs a type.
    results = (partial if matrix is None else matrix, partial if vector is None else vector)
    grid = (-(-columns // COLUMNS), lanes, 1)
    _sum(grid, (partial, *results), (count, columns), (width, rows, COLUMNS), 8 if rows == ROWS else 2)
