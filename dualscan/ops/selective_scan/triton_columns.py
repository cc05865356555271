# ruff: noqa: RUF005 (Triton's tuples can be added, not unpacked)
"""B and C on their way into the scan's kernels on a GPU, and their gradients on the way out.

All threads of the scan want the same numbers of B and C at the same time: those of one state n over a tile of ROWS
tokens. `pack` lays them down in this order, `(tile, group, n, B or C, row)` in float32, so that a few loads of 16 bytes
bring them, and puts zeros where a tile reaches over its sequence's end, so that nobody has to ask. dB and dC come back
in the same order, a sum over 32 channels each; `unpack` adds these up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher

STATES = 16  # handled at a time


@triton.jit
def find(chunks, ngroups, ROWS: tl.constexpr):
    """A program's tile, group and batch row; the tokens of a tile's rows, and which of them are inside."""
    tile, group = tl.program_id(0) // ngroups, tl.program_id(0) % ngroups
    row = tl.load(chunks + tile * 3).to(tl.int64)
    token = tl.load(chunks + tile * 3 + 1) + tl.arange(0, ROWS)
    return tile, group, row, token, token < tl.load(chunks + tile * 3 + 2)


@triton.jit(do_not_specialize=["B_b", "B_l", "B_g", "B_n", "C_b", "C_l", "C_g", "C_n", "ngroups", "n_states"])
def pack_kernel(
    B, C, chunks, packed,
    B_b: tl.int64, B_l: tl.int64, B_g: tl.int64, B_n: tl.int64,
    C_b: tl.int64, C_l: tl.int64, C_g: tl.int64, C_n: tl.int64,
    ngroups: tl.int32, n_states: tl.int32, ROWS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Grid `tiles * ngroups`."""
    _, group, row, token, inside = find(chunks, ngroups, ROWS)
    B, C = B + row * B_b + group * B_g, C + row * C_b + group * C_g
    out = packed + tl.program_id(0).to(tl.int64) * n_states * (2 * ROWS) + tl.arange(0, ROWS)[None, :]
    for first in range(0, n_states, STATES):
        n = first + tl.arange(0, STATES)
        mask = (n < n_states)[:, None] & inside[None, :]
        b = tl.load(B + token.to(tl.int64)[None, :] * B_l + n[:, None] * B_n, mask=mask, other=0.0)
        c = tl.load(C + token.to(tl.int64)[None, :] * C_l + n[:, None] * C_n, mask=mask, other=0.0)
        place = out + n[:, None] * (2 * ROWS)
        known = (n < n_states)[:, None] & (token >= 0)[None, :]
        tl.store(place, b.to(tl.float32), mask=known)
        tl.store(place + ROWS, c.to(tl.float32), mask=known)


@triton.jit(do_not_specialize=["seqlen", "ngroups", "n_states", "tiles", "blocks"])
def unpack_kernel(
    partial, chunks, dB, dC,
    seqlen: tl.int32, ngroups: tl.int32, n_states: tl.int32, tiles: tl.int32, blocks: tl.int32,
    ROWS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Sums `partial` (block, tile, group, n, dB or dC, row) over the blocks. Grid `tiles * ngroups`."""
    _, group, row, token, inside = find(chunks, ngroups, ROWS)
    own = tl.program_id(0).to(tl.int64) * n_states * (2 * ROWS)
    stride = tiles.to(tl.int64) * ngroups * n_states * (2 * ROWS)
    for first in range(0, n_states, STATES):
        n = first + tl.arange(0, STATES)
        known = (n < n_states)[:, None] & (token >= 0)[None, :]
        place = partial + own + n[:, None] * (2 * ROWS) + tl.arange(0, ROWS)[None, :]
        b, c = tl.zeros([STATES, ROWS], tl.float32), tl.zeros([STATES, ROWS], tl.float32)
        for block in range(blocks):
            b += tl.load(place + block * stride, mask=known, other=0.0)
            c += tl.load(place + block * stride + ROWS, mask=known, other=0.0)
        out = ((row * seqlen + token[None, :]) * ngroups + group) * n_states + n[:, None]
        tl.store(dB + out, b.to(dB.dtype.element_ty), mask=known & inside[None, :])
        tl.store(dC + out, c.to(dC.dtype.element_ty), mask=known & inside[None, :])


@triton.jit
def packed_rows(line, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS numbers of B or C as vectors. All rows are in every thread's registers, and the sum over the others' zeros
    is known to the compiler: it leaves nothing but the loads."""
    row = tl.arange(0, ROWS)
    line = tl.load(line + row)
    bits = tl.broadcast_to(line.to(tl.int32, bitcast=True)[:, None], [ROWS, BLOCK])
    rows = ()
    for u in tl.static_range(ROWS):
        rows = rows + (tl.sum(tl.where(row[:, None] == u, bits, 0), 0).to(tl.float32, bitcast=True),)
    return rows


_pack, _unpack = Launcher(pack_kernel), Launcher(unpack_kernel)


def pack(B: Tensor, C: Tensor, plan: _triton.Plan, rows: int) -> Tensor:
    """`(tile, group, n, 2, rows)` float32 of B and C `(batch, seqlen, group, n)`, of any strides."""
    tiles, (ngroups, n_states) = plan.chunks.shape[0], B.shape[2:]
    packed = torch.empty(tiles, ngroups, n_states, 2, rows, dtype=torch.float32, device=B.device)
    if packed.numel():
        sizes = (*B.stride(), *C.stride(), ngroups, n_states)
        _pack((tiles * ngroups, 1, 1), (B, C, plan.chunks, packed), sizes, (rows, STATES), 1)
    return packed


def unpack(partial: Tensor, plan: _triton.Plan, dB: Tensor, dC: Tensor) -> None:
    """Writes dB and dC `(batch, seqlen, group, n)`, contiguous, from `(block, tile, group, n, 2, rows)`."""
    blocks, tiles, ngroups, n_states, _, rows = partial.shape
    if partial.numel():
        sizes = (dB.shape[1], ngroups, n_states, tiles, blocks)
        _unpack((tiles * ngroups, 1, 1), (partial, plan.chunks, dB, dC), sizes, (rows, STATES), 4)
