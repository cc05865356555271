"""What the forward and the backward kernel share: the problem's sizes, and the matrices of one chunk.

A worker takes a sequence, a group and a few of the group's heads, and goes through the chunks in order. All matrices of
a chunk are float32, padded to whole register tiles with zeros, and stay in the caches from load to store.
"""

import numpy as np
import torch
from torch import Tensor

from dualscan.ops._numba import vector
from dualscan.ops._numba.launch import workers_for
from dualscan.ops._numba.product import TILE_ROWS, padded
from dualscan.ops._numba.segments import table
from dualscan.ops._numba.vector import ZERO, at, device_function, load
from dualscan.ops.ssd.blocks import LOWEST_LOG_DECAY, SMALLEST_EXPONENT

_NOTHING = np.float32(SMALLEST_EXPONENT[torch.float32])
_LOWEST = LOWEST_LOG_DECAY
# State entries below this are dropped, before repeated decays make them subnormal: products with those are slow.
_TINY = np.float32(1e-36)


class Problem:
    """The sizes of a call, and how it is cut into items of work.

    Attributes:
        segments: the table of sequences, see `_numba.segments`.
        nseq, blocks: sequences, and chunks of all of them.
        k: heads of a group.
        together: heads of an item: as many items a group as there are threads, so that one sequence keeps all busy.
        parts: items a group.
        q, p, n: padded chunk, headdim and d_state.
    """

    def __init__(self, x: Tensor, B: Tensor, cu_seqlens: Tensor | None, chunk_size: int):
        self.batch, self.seqlen, self.nheads, self.headdim = x.shape
        self.ngroups, self.d_state = B.shape[2:]
        self.chunk = max(min(chunk_size, self.seqlen), 1)
        self.segments, self.blocks = table(self.batch, self.seqlen, cu_seqlens, self.chunk)
        self.nseq = len(self.segments)
        self.k = self.nheads // self.ngroups
        self.together = -(-self.k // min(torch.get_num_threads(), self.k))
        self.parts = -(-self.k // self.together)
        self.q, self.p, self.n = padded(self.chunk), padded(self.headdim), padded(self.d_state)

    @property
    def items(self) -> int:
        """Pieces of work that are independent of each other."""
        return self.nseq * self.ngroups * self.parts

    @property
    def workers(self) -> int:
        """Threads that have something to do."""
        threads = workers_for(self.batch * self.seqlen * self.nheads * self.headdim)
        return max(1, min(threads, self.items))

    def sizes(self) -> tuple[int | Tensor, ...]:
        """The kernels' first arguments."""
        cut = (self.segments, self.ngroups, self.k, self.together, self.parts)
        return *cut, self.seqlen, self.headdim, self.d_state, self.chunk, self.q, self.p, self.n


def strides(t: Tensor) -> tuple[Tensor, int, int, int]:
    """A tensor and its strides of batch, time and head."""
    return t, t.stride(0), t.stride(1), t.stride(2)


@device_function
def decay(exponent):
    """exp of a float64 exponent <= 0, as float32; exactly 0 where it would be tiny."""
    value = np.float32(exponent)
    return vector.exp(value) if value > _NOTHING else ZERO


@device_function
def read(source, stride, rows, columns, out, out_rows, out_columns):
    """`rows x columns` of the input into a padded float32 matrix."""
    for i in range(rows):
        line, target = at(source, i * stride), at(out, i * out_columns)
        for j in range(columns):
            target[j] = load(line, j)
        for j in range(columns, out_columns):
            target[j] = ZERO
    for i in range(rows * out_columns, out_rows * out_columns):
        out[i] = ZERO


@device_function
def transpose(source, rows, columns, out):
    """`out[columns, rows] = source[rows, columns]`."""
    for i in range(rows):
        for j in range(columns):
            out[j * rows + i] = source[i * columns + j]


@device_function
def fill(out, count, value):
    for i in range(count):
        out[i] = value


@device_function
def shrink(state, count, factor):
    """`state *= factor`, without subnormal numbers."""
    for i in range(count):
        value = state[i] * factor
        state[i] = value if abs(value) > _TINY else ZERO


@device_function
def whole_tiles(rows):
    """Rows rounded up to register tiles."""
    return (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS


@device_function
def scale_rows(source, factors, rows, columns, out):
    """`out[i] = factors[i] * source[i]`."""
    for i in range(rows):
        factor, line, target = factors[i], at(source, i * columns), at(out, i * columns)
        for j in range(columns):
            target[j] = factor * line[j]


@device_function
def prepare(scale, log_decay, stride, rows, out_rows, sums, scales, from_start, to_end):
    """The decays of a chunk: prefix sums (float64), the scale, exp(cs_i) and exp(cs_Q - cs_j); returns exp(cs_Q).

    The sums are float64: one steep token would cost every mild one after it its precision. Padding neither decays nor
    adds.
    """
    total = 0.0
    for i in range(rows):
        total += max(np.float64(log_decay[i * stride]), _LOWEST)
        sums[i] = total
        scales[i] = scale[i * stride]
    for i in range(rows, out_rows):
        sums[i] = total
        scales[i] = ZERO
    for i in range(out_rows):
        from_start[i] = decay(sums[i])
        to_end[i] = decay(total - sums[i])
    return decay(total)
