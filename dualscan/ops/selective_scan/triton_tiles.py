# ruff: noqa: RUF005 (Triton's tuples can be added, not unpacked)
"""What the scan's kernels on a GPU read and write: rows of tokens, and columns of B and C.

All threads of the scan want the same numbers of B and C at the same time: those of one state n over a tile of ROWS
tokens. `pack` lays them down in this order, `(tile, group, n, B or C, row)` in float32, so that a few loads of 16 bytes
bring them, and puts zeros where a tile reaches over its sequence's end, so that nobody has to ask. dB and dC come back
in the same order, a sum over a block of channels each; `unpack` adds these up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher
from dualscan.ops.triton_common import LANES, sigmoid, softplus, touch

STATES = 16  # handled at a time
TOUCHED = tl.constexpr(16)  # states whose numbers are fetched at once
SEGMENT = tl.constexpr(_triton.SEGMENT)


@triton.jit
def find(chunks, ngroups, ROWS: tl.constexpr):
    """A program's tile, group and batch row; the tokens of a tile's rows, and which of them are inside."""
    tile, group = tl.program_id(0) // ngroups, tl.program_id(0) % ngroups
    row = tl.load(chunks + tile * 3).to(tl.int64)
    token = tl.load(chunks + tile * 3 + 1) + tl.arange(0, ROWS)
    return tile, group, row, token, token < tl.load(chunks + tile * 3 + 2)


@triton.jit(do_not_specialize=["B_b", "B_l", "B_g", "B_n", "C_b", "C_l", "C_g", "C_n", "ngroups", "n_states", "padded"])
def pack_kernel(
    B, C, chunks, packed,
    B_b: tl.int64, B_l: tl.int64, B_g: tl.int64, B_n: tl.int64,
    C_b: tl.int64, C_l: tl.int64, C_g: tl.int64, C_n: tl.int64,
    ngroups: tl.int32, n_states: tl.int32, padded: tl.int32, ROWS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Grid `tiles * ngroups`."""
    _, group, row, token, inside = find(chunks, ngroups, ROWS)
    B, C = B + row * B_b + group * B_g, C + row * C_b + group * C_g
    out = packed + tl.program_id(0).to(tl.int64) * padded * (2 * ROWS) + tl.arange(0, ROWS)[None, :]
    for first in range(0, padded, STATES):
        n = first + tl.arange(0, STATES)
        mask = (n < n_states)[:, None] & inside[None, :]
        b = tl.load(B + token.to(tl.int64)[None, :] * B_l + n[:, None] * B_n, mask=mask, other=0.0)
        c = tl.load(C + token.to(tl.int64)[None, :] * C_l + n[:, None] * C_n, mask=mask, other=0.0)
        place = out + n[:, None] * (2 * ROWS)
        known = (n < padded)[:, None] & (token >= 0)[None, :]
        tl.store(place, b.to(tl.float32), mask=known)
        tl.store(place + ROWS, c.to(tl.float32), mask=known)


@triton.jit(do_not_specialize=["seqlen", "ngroups", "n_states", "padded", "tiles", "blocks"])
def unpack_kernel(
    partial, chunks, dB, dC,
    seqlen: tl.int32, ngroups: tl.int32, n_states: tl.int32, padded: tl.int32, tiles: tl.int32, blocks: tl.int32,
    ROWS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Sums `partial` (block, tile, group, n, dB or dC, row) over the blocks. Grid `tiles * ngroups`."""
    _, group, row, token, inside = find(chunks, ngroups, ROWS)
    own = tl.program_id(0).to(tl.int64) * padded * (2 * ROWS)
    stride = tiles.to(tl.int64) * ngroups * padded * (2 * ROWS)
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
def place(number, segments, channels: tl.constexpr, ngroups, BLOCK: tl.constexpr):
    """A program's segment: its number, batch row, tokens [begin, end), first tile and first super-tile; its block and
    group, its first channel, and how many there are from it to the group's end."""
    per_group = channels // ngroups
    blocks = tl.cdiv(per_group, BLOCK)
    block, group = number % blocks, (number // blocks) % ngroups
    segment = (number // (blocks * ngroups)).to(tl.int64)
    row = tl.load(segments + segment * SEGMENT).to(tl.int64)
    begin, end = tl.load(segments + segment * SEGMENT + 1), tl.load(segments + segment * SEGMENT + 2)
    tile = tl.load(segments + segment * SEGMENT + 3).to(tl.int64)
    long = tl.load(segments + segment * SEGMENT + 6).to(tl.int64)
    edge, width = group * per_group + block * BLOCK, per_group - block * BLOCK
    return segment, row, begin, end, tile, long, block, group, edge, width


@triton.jit
def load_rows(base, first, end, stride: tl.constexpr, c, inside, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """The rows of ROWS tokens as they are in memory; zeros from `end` on, where there may be an end (not WHOLE)."""
    here, rows = base + first.to(tl.int64) * stride + c, ()
    for u in tl.static_range(ROWS):
        live = inside
        if not WHOLE:
            live = inside & (first + u < end)
        rows = rows + (tl.load(here + u * stride, mask=live, other=0.0),)
    return rows


@triton.jit
def step_rows(raw, shift, first, end, inside, ROWS: tl.constexpr, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr):
    """Δ of ROWS tokens; it is 0 from `end` on, so that these change nothing."""
    delta = ()
    for u in tl.static_range(ROWS):
        size = raw[u].to(tl.float32) + shift
        if SOFTPLUS:
            size = softplus(size)
        if not WHOLE:
            size = tl.where(inside & (first + u < end), size, 0.0)
        delta = delta + (size,)
    return delta


@triton.jit
def multiply_rows(a, b, ROWS: tl.constexpr):
    """Row by row, in float32."""
    product = ()
    for u in tl.static_range(ROWS):
        product = product + (a[u].to(tl.float32) * b[u].to(tl.float32),)
    return product


@triton.jit
def through_gate(dy, z, ROWS: tl.constexpr, HAS_Z: tl.constexpr):
    """The gradients `ds` of the sums before the gate."""
    ds = ()
    for u in tl.static_range(ROWS):
        d = dy[u].to(tl.float32)
        if HAS_Z:
            gate = z[u].to(tl.float32)
            d *= gate * sigmoid(gate)
        ds = ds + (d,)
    return ds


@triton.jit
def touch_states(base, count, stride, width, WIDTH: tl.constexpr):
    """`touch` for `count` lines, one a state."""
    total = touch(base, 0, 0, count, stride, 0, width, TOUCHED, WIDTH)
    for n in range(TOUCHED, count, TOUCHED):
        total += touch(base, n, 0, count, stride, 0, width, TOUCHED, WIDTH)
    return total


@triton.jit
def load_vector(base, c, inside, GIVEN: tl.constexpr):
    """A parameter of every channel in float32; zeros without one."""
    vector = tl.zeros(c.shape, tl.float32)
    if GIVEN:
        vector = tl.load(base + c, mask=inside, other=0.0).to(tl.float32)
    return vector


@triton.jit
def packed_rows(line, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """ROWS numbers of B or C as tensors of SHAPE. All rows are in every thread's registers, and the sum over the
    others' zeros is known to the compiler: it leaves nothing but the loads."""
    row = tl.arange(0, ROWS)
    line = tl.load(line + row)
    SPREAD: tl.constexpr = (ROWS,) + (1,) * len(SHAPE)
    bits = tl.broadcast_to(tl.reshape(line.to(tl.int32, bitcast=True), SPREAD), (ROWS,) + SHAPE)
    rows = ()
    for u in tl.static_range(ROWS):
        rows = rows + (tl.sum(tl.where(tl.reshape(row, SPREAD) == u, bits, 0), 0).to(tl.float32, bitcast=True),)
    return rows


@triton.jit
def write_sums(parts, result, count, STRIDE: tl.constexpr, WARPS: tl.constexpr):
    """Adds up what the warps have of a tile's dB and dC: `count` times 32 numbers, a lane each."""
    for first in range(0, count, TOUCHED):
        unit, lane = first + tl.arange(0, TOUCHED)[:, None], tl.arange(0, LANES)[None, :]
        place, known = parts + unit * STRIDE + lane, unit < count
        total = tl.load(place, mask=known, other=0.0)
        for w in tl.static_range(1, WARPS):
            total += tl.load(place + w * LANES, mask=known, other=0.0)
        tl.store(result + unit * LANES + lane, total, mask=known)


_pack, _unpack = Launcher(pack_kernel), Launcher(unpack_kernel)


def pack(B: Tensor, C: Tensor, plan: _triton.Plan, rows: int, padded: int) -> Tensor:
    """`(tile, group, n, 2, rows)` float32 of B and C `(batch, seqlen, group, n)`, of any strides, with zeros from the
    last state to `padded`."""
    tiles, (ngroups, n_states) = plan.chunks.shape[0], B.shape[2:]
    packed = torch.empty(tiles, ngroups, padded, 2, rows, dtype=torch.float32, device=B.device)
    if packed.numel():
        sizes = (*B.stride(), *C.stride(), ngroups, n_states, padded)
        _pack((tiles * ngroups, 1, 1), (B, C, plan.chunks, packed), sizes, (rows, STATES), 1)
    return packed


def unpack(partial: Tensor, plan: _triton.Plan, dB: Tensor, dC: Tensor) -> None:
    """Writes dB and dC `(batch, seqlen, group, n)`, contiguous, from `(block, tile, group, padded n, 2, rows)`."""
    blocks, tiles, ngroups, padded, _, rows = partial.shape
    if partial.numel():
        sizes = (dB.shape[1], ngroups, dB.shape[3], padded, tiles, blocks)
        _unpack((tiles * ngroups, 1, 1), (partial, plan.chunks, dB, dC), sizes, (rows, STATES), 4)
