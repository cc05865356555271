"""Sums over the programs of a kernel: the second stage of a parameter's gradient, without atomics."""

import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops._launch import Launcher

ROWS = 16
COLUMNS = 128


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
    grid = (triton.cdiv(columns, COLUMNS), lanes, 1)
    # An absent result is never stored to, but a pointer needs a type.
    _sum(grid, (partial, partial if matrix is None else matrix, partial if vector is None else vector),
         (count, columns), (width, ROWS, COLUMNS), 4)  # fmt: skip
