"""The sequential kernel of `triton_scan` and the gradient kernel in Gluon, for Hopper GPUs, with explicit overlap.

Plain Triton waits for each of the chunk's four products before it starts the next. Here one warpgroup keeps three of
them in flight, and everything is transposed: the state and the inputs are then left operands, which wgmma takes from
registers, so that only the masked weights go through shared memory. The copy engine fetches the next chunk, and stores
outputs and states, meanwhile. Two programs share a multiprocessor.

Two rules that the compiler does not state. An accumulator that is scaled while any product is in flight makes it wait
for all of them, and one that is carried around the loop in flight makes it wait after each instruction. And a register
too many costs more than any overlap gains: beside two programs' shared memory the L1 cache is too small for spills.

It covers what `fits` says; everything else takes the plain kernels, which are also the cross-check.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dualscan.ops import _triton


@gluon.jit
def fetch_chunk(
    query, key, value, counterpart, u_smem, k_smem, v_smem, g_smem, full, slot, row, u_column, v_column, entry, column,
    wanted, OUTPUT: gl.constexpr, KEPT: gl.constexpr,
):  # fmt: skip
    """Starts the copies of one chunk's tiles into a slot, each with a barrier of its own: they need no order."""
    mbarrier.expect(full[0].index(slot), key.block_type.nbytes, pred=wanted)
    mbarrier.expect(full[1].index(slot), value.block_type.nbytes, pred=wanted)
    if OUTPUT:
        mbarrier.expect(full[2].index(slot), query.block_type.nbytes, pred=wanted)
    if KEPT:
        mbarrier.expect(full[3].index(slot), counterpart.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(value, [row, v_column], full[1].index(slot), v_smem.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(key, [row, u_column], full[0].index(slot), k_smem.index(slot), pred=wanted)
    if OUTPUT:
        tma.async_copy_global_to_shared(query, [row, u_column], full[2].index(slot), u_smem.index(slot), pred=wanted)
    if KEPT:
        tma.async_copy_global_to_shared(
            counterpart, [entry, column], full[3].index(slot), g_smem.index(slot), pred=wanted
        )


@gluon.jit
def scan_hopper_kernel(
    query, key, value, out, saved, counterpart, kept, scale, sums, D, initial, final, segments, D_h, D_p,
    nheads, heads_per_group, headdim, d_state, seqlen, padded,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, REVERSE: gl.constexpr, OUTPUT: gl.constexpr,
    SAVE: gl.constexpr, KEPT: gl.constexpr, ENTRIES: gl.constexpr, HAS_D: gl.constexpr, HAS_INITIAL: gl.constexpr,
    HAS_FINAL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program: P columns of one head over one segment, as `scan_kernel`; a segment has at least one chunk.

    Everything is transposed: the state (P, N) and the inputs (P, Q) are then left operands, which wgmma takes from
    registers, and only the masked weights go through shared memory.
    """
    dtype: gl.constexpr = value.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, Q, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, N, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    cols: gl.constexpr = gl.SliceLayout(0, mma)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])

    blocks = gl.cdiv(headdim, P)
    h = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks
    column = block * P
    segment = gl.program_id(1)
    batch = gl.load(segments + segment * 6)
    start = gl.load(segments + segment * 6 + 1)
    end = gl.load(segments + segment * 6 + 2)
    first_chunk = gl.load(segments + segment * 6 + 3)
    nchunks = gl.cdiv(end - start, Q)
    u_column = (h // heads_per_group) * N
    v_column = h * headdim + column
    first_row = batch * seqlen + start
    # Chunks in the order of the scan: the i-th is opening + i * step.
    opening = nchunks - 1 if REVERSE else 0
    step: gl.constexpr = -1 if REVERSE else 1
    place = h.to(gl.int64) * padded + (first_chunk + opening) * Q

    k_smem = gl.allocate_shared_memory(dtype, [2, Q, N], key.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, Q, P], value.layout)
    u_smem = gl.allocate_shared_memory(dtype, [2, Q, N], key.layout) if OUTPUT else None
    g_smem = gl.allocate_shared_memory(dtype, [2, N, P], value.layout) if KEPT else None
    if OUTPUT:
        w_smem = gl.allocate_shared_memory(dtype, [Q, Q], value.layout)
        out_smem = gl.allocate_shared_memory(dtype, [Q, P], value.layout)
    if SAVE:
        low_smem = gl.allocate_shared_memory(dtype, [N, P], value.layout)
    cs_smem = gl.allocate_shared_memory(gl.float32, [Q], line)
    s_smem = gl.allocate_shared_memory(gl.float32, [Q], line)
    share_smem = gl.allocate_shared_memory(gl.float32, [Q], line)
    full = (barriers(), barriers(), barriers() if OUTPUT else None, barriers() if KEPT else None)

    p = column + gl.arange(0, P, layout=gl.SliceLayout(1, wide))
    n = gl.arange(0, N, layout=gl.SliceLayout(0, wide))
    per_head = headdim * d_state
    if HAS_INITIAL:
        state = gl.load(initial + (segment.to(gl.int64) * nheads + h) * per_head + p[:, None] * d_state + n[None, :])
    else:
        state = gl.zeros([P, N], gl.float32, wide)
    if HAS_D:
        skip = gl.load(D + h * D_h + (column + gl.arange(0, P, layout=rows)) * D_p).to(gl.float32)

    q_flat = gl.arange(0, Q, layout=flat)
    j = gl.arange(0, Q, layout=rows)[:, None]
    i = gl.arange(0, Q, layout=cols)[None, :]
    lane = (first_chunk + opening) * nheads + h
    fetch_chunk(
        query, key, value, counterpart, u_smem, k_smem, v_smem, g_smem, full, 0, first_row + opening * Q, u_column,
        v_column, lane * N, column, True, OUTPUT, KEPT,
    )  # fmt: skip
    next_cs = gl.load(sums + place + q_flat)
    next_s = gl.load(scale + place + q_flat)
    next_last = gl.load(sums + place + Q - 1)
    for turn in range(nchunks):
        c = opening + turn * step
        slot = turn % 2
        more = turn + 1 < nchunks
        phase = (turn // 2) & 1
        k = k_smem.index(slot)
        v = v_smem.index(slot)
        lane = (first_chunk + c) * nheads + h
        last = next_last
        cs_smem.store(next_cs)
        s_smem.store(next_s)
        share_smem.store(gl.exp2(next_cs) if REVERSE else gl.exp2(last - next_cs) * next_s)
        if OUTPUT:
            fence_async_shared()
        gl.thread_barrier()
        # Every warp is past the chunk before: its output leaves, and its slot is fetched into.
        if OUTPUT and turn > 0:
            tma.async_copy_shared_to_global(out, [first_row + (c - step) * Q, v_column], out_smem)
        fetch_chunk(
            query, key, value, counterpart, u_smem, k_smem, v_smem, g_smem, full, 1 - slot,
            first_row + (c + step) * Q, u_column, v_column, (lane + step * nheads) * N, column, more, OUTPUT, KEPT,
        )  # fmt: skip
        if KEPT:
            mbarrier.wait(full[3].index(slot), phase)
            other = g_smem.index(slot).permute((1, 0)).load(wide).to(gl.float32)
            gl.store(kept + (lane * blocks + block).to(gl.int64) * P + p - column, gl.sum(other * state, 1))
        low = state.to(dtype)
        if SAVE:
            # The state before has left; the output after it may still be on the way.
            tma.store_wait(1 if OUTPUT else 0)
            low_smem.permute((1, 0)).store(low)
        # Before any product is in flight: the compiler waits for all of them where an accumulator is touched.
        state = state * gl.exp2(last)
        mbarrier.wait(full[0].index(slot), phase)
        if OUTPUT:
            mbarrier.wait(full[2].index(slot), phase)
            u = u_smem.index(slot).permute((1, 0))
            weights = warpgroup_mma(k, u, gl.zeros([Q, Q], gl.float32, mma), use_acc=False, is_async=True)
            low = gl.convert_layout(low, left)
            y = warpgroup_mma(low, u, gl.zeros([P, Q], gl.float32, mma), use_acc=False, is_async=True)
        mbarrier.wait(full[1].index(slot), phase)
        x = v.permute((1, 0)).load(left)
        share = share_smem.load(gl.SliceLayout(0, left))
        scaled = (x.to(gl.float32) * share[None, :]).to(dtype)
        state = warpgroup_mma(scaled, k, state, is_async=True)
        following = place + (turn * step + (step if more else 0)) * Q
        next_cs = gl.load(sums + following + q_flat)
        next_s = gl.load(scale + following + q_flat)
        next_last = gl.load(sums + following + Q - 1)
        if OUTPUT:
            # Registers are what this kernel is short of: the rounded state's are free from here.
            weights, y = warpgroup_mma_wait(1, deps=[weights, y])
            cs_i = cs_smem.load(cols)[None, :]
            y = y * gl.exp2(last - cs_i if REVERSE else cs_i)
            cs_j = cs_smem.load(rows)[:, None]
            if REVERSE:
                mask = gl.exp2(gl.where(i <= j, cs_j - cs_i, float("-inf")))
            else:
                mask = gl.exp2(gl.where(i >= j, cs_i - cs_j, float("-inf"))) * s_smem.load(rows)[:, None]
            w_smem.store((weights * mask).to(dtype))
        if OUTPUT or SAVE:
            fence_async_shared()
            gl.thread_barrier()
        if SAVE:
            tma.async_copy_shared_to_global(saved, [lane * N, column], low_smem)
        if OUTPUT:
            y = warpgroup_mma(x, w_smem, y, is_async=True)
            y, state = warpgroup_mma_wait(0, deps=[y, state])
            if REVERSE:
                y = y * s_smem.load(cols)[None, :]
            if HAS_D:
                y = y + skip[:, None] * gl.convert_layout(x, mma).to(gl.float32)
            tma.store_wait(1 if SAVE else 0)
            out_smem.permute((1, 0)).store(y.to(dtype))
        else:
            state = warpgroup_mma_wait(0, deps=[state])
    if OUTPUT:
        fence_async_shared()
        gl.thread_barrier()
        c = opening + (nchunks - 1) * step
        tma.async_copy_shared_to_global(out, [first_row + c * Q, v_column], out_smem)
    tma.store_wait(0)
    if HAS_FINAL:
        # A segment's own contribution; or the last state of a sequence, from its last segment.
        edge: gl.constexpr = 1 if REVERSE else 2
        target = segment if ENTRIES else gl.load(segments + segment * 6 + 4)
        inside = (p[:, None] < headdim) & (ENTRIES | ((gl.load(segments + segment * 6 + 5) & edge) != 0))
        here = final + (target.to(gl.int64) * nheads + h) * per_head + p[:, None] * d_state + n[None, :]
        gl.store(here, state, mask=inside & (n[None, :] < d_state))


@gluon.jit
def barriers():
    """A pair of barriers, one a slot."""
    pair = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(pair.index(slot), count=1)
    return pair


@gluon.jit
def gradient_side(
    u_smem, k_smem, v_smem, o_smem, state_smem, cs_smem, s_smem, full, once,
    value, other, query, key, state, out, rows_out, inner_out, products, overlaps, scale, sums,
    row, chunk, group, part, out_part, out_l, u_column, nheads, heads_per_group, heads_per_program, headdim, d_state,
    padded,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, BLOCKS: gl.constexpr, ADD: gl.constexpr, REVERSE: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """One side of `gradient_kernel` for one chunk: dC, or with REVERSE dB."""
    dtype: gl.constexpr = value.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, N, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    cols: gl.constexpr = gl.SliceLayout(0, mma)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])

    count = heads_per_program * BLOCKS
    first_head = group * heads_per_group + part * heads_per_program
    mbarrier.expect(once, query.block_type.nbytes + key.block_type.nbytes)
    tma.async_copy_global_to_shared(query, [row, u_column], once, u_smem)
    tma.async_copy_global_to_shared(key, [row, u_column], once, k_smem)
    for first in gl.static_range(2):
        fetch_head(
            value, other, state, v_smem, o_smem, state_smem, full, first, row, first_head * headdim + first * P,
            (chunk * nheads + first_head + first // BLOCKS) * N, (first % BLOCKS) * P, first < count,
        )  # fmt: skip
    q_flat = gl.arange(0, Q, layout=flat)
    i_row = gl.arange(0, Q, layout=rows)[:, None]
    i_col = gl.arange(0, Q, layout=cols)[None, :]
    q = gl.arange(0, Q, layout=rows)
    place = first_head.to(gl.int64) * padded + chunk * Q
    next_cs = gl.load(sums + place + q_flat)
    next_s = gl.load(scale + place + q_flat)
    next_last = gl.load(sums + place + Q - 1)
    diagonal = i_row == i_col
    mbarrier.wait(once, 0)
    weights = warpgroup_mma(u_smem, k_smem.permute((1, 0)), gl.zeros([Q, Q], gl.float32, mma), use_acc=False)
    if not REVERSE:
        overlap = gl.sum(gl.where(diagonal, weights, 0.0), 1)
        if part == 0:
            gl.store(overlaps + group.to(gl.int64) * padded + chunk * Q + q, overlap)
    # The products C Bᵀ wait in shared memory, where the key was: registers are what this kernel is short of.
    # In the order of the registers: 16 bytes a thread, at one address and fixed distances from it.
    square: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 8], [0, 16], [0, 32]]
    )
    if N * 2 == Q * 4:
        weights_smem = k_smem._reinterpret(gl.float32, [Q, Q], square)
    else:
        weights_smem = gl.allocate_shared_memory(gl.float32, [Q, Q], square)
    gl.thread_barrier()
    weights_smem.store(gl.where(diagonal, 0.0, weights))
    total = gl.zeros([Q, N], gl.float32, wide)
    dweights = gl.zeros([Q, Q], gl.float32, mma)
    for i in range(count):
        h = first_head + i // BLOCKS
        block = i % BLOCKS
        slot = i % 2
        v = v_smem.index(slot)
        S = state_smem.index(slot)
        last = next_last
        cs_smem.index(slot).store(next_cs)
        s_smem.index(slot).store(next_s)
        gl.thread_barrier()
        # Every warp is past its reads of the other slot.
        later = i + 1
        fetch_head(
            value, other, state, v_smem, o_smem, state_smem, full, 1 - slot, row, first_head * headdim + later * P,
            (chunk * nheads + first_head + later // BLOCKS) * N, (later % BLOCKS) * P, (i > 0) & (later < count),
        )  # fmt: skip
        for tile in gl.static_range(3):
            mbarrier.wait(full[tile].index(slot), (i // 2) & 1)
        inner = warpgroup_mma(u_smem, S, gl.zeros([Q, P], gl.float32, mma), use_acc=False, is_async=True)
        zero = gl.zeros([Q, Q], gl.float32, mma)
        inside = warpgroup_mma(v, o_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        cs = cs_smem.index(slot).load(rows)
        s = s_smem.index(slot).load(rows)
        share = gl.exp2(last - cs) if REVERSE else gl.exp2(cs)
        x = v.load(mma)
        scaled = (x.to(gl.float32) * (share * s if REVERSE else share)[:, None]).to(dtype)
        place = (block * nheads + h).to(gl.int64) * padded + chunk * Q
        inner = warpgroup_mma_wait(1, deps=[inner])
        read = gl.sum(inner * x.to(gl.float32), 1) * share
        inside = warpgroup_mma_wait(0, deps=[inside])
        scaled = gl.convert_layout(scaled, gl.DotOperandLayout(0, wide, 2))
        total = warpgroup_mma(scaled, S.permute((1, 0)), total, is_async=True)
        cs_col = cs_smem.index(slot).load(cols)
        if REVERSE:
            gl.store(inner_out + place + q, read)
            gap = gl.where(i_row <= i_col, cs_col[None, :] - cs[:, None], float("-inf"))
            inside = inside * gl.exp2(gap)
        else:
            product = gl.sum(gl.where(diagonal, inside, 0.0), 1)
            gl.store(products + place + q, product)
            gap = gl.where(i_row >= i_col, cs[:, None] - cs_col[None, :], float("-inf"))
            inside = inside * (gl.exp2(gap) * s_smem.index(slot).load(cols)[None, :])
        pairs = gl.sum(inside * weights_smem.load(mma), 1)
        gl.store(rows_out + place + q, pairs if REVERSE else pairs + read)
        dweights += inside * s[:, None] if REVERSE else inside
        place = (first_head + gl.minimum(later, count - 1) // BLOCKS).to(gl.int64) * padded + chunk * Q
        next_cs = gl.load(sums + place + q_flat)
        next_s = gl.load(scale + place + q_flat)
        next_last = gl.load(sums + place + Q - 1)
        total = warpgroup_mma_wait(0, deps=[total])
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.expect(once, key.block_type.nbytes)
    tma.async_copy_global_to_shared(key, [row, u_column], once, k_smem)
    mbarrier.wait(once, 1)
    # In two parts: once a program, the rounding of the sum over heads costs nothing to avoid.
    high = dweights.to(dtype)
    rest = (dweights - high.to(gl.float32)).to(dtype)
    total = warpgroup_mma(gl.convert_layout(high, gl.DotOperandLayout(0, wide, 2)), k_smem, total)
    total = warpgroup_mma(gl.convert_layout(rest, gl.DotOperandLayout(0, wide, 2)), k_smem, total)
    base = out + part.to(gl.int64) * out_part + row.to(gl.int64) * out_l + group * d_state
    line = gl.arange(0, Q, layout=gl.SliceLayout(1, wide))[:, None] * out_l
    columns = gl.arange(0, N, layout=gl.SliceLayout(0, wide))[None, :]
    if ADD:
        total += gl.load(base + line + columns)
    gl.store(base + line + columns, total.to(out.dtype.element_ty))


@gluon.jit
def fetch_head(
    value, other, state, v_smem, o_smem, state_smem, full, slot, row, column, entry, state_column, wanted
):  # fmt: skip
    """Starts the copies of one head's tiles into a slot, each with a barrier of its own: they need no order."""
    mbarrier.expect(full[0].index(slot), value.block_type.nbytes, pred=wanted)
    mbarrier.expect(full[1].index(slot), other.block_type.nbytes, pred=wanted)
    mbarrier.expect(full[2].index(slot), state.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(value, [row, column], full[0].index(slot), v_smem.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(other, [row, column], full[1].index(slot), o_smem.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(
        state, [entry, state_column], full[2].index(slot), state_smem.index(slot), pred=wanted
    )


@gluon.jit
def gradient_hopper_kernel(
    x, dy, B, C, S, G, dB, dC, reads, dscale, inner, products, overlaps, scale, sums,
    out_part, out_l, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, BLOCKS: gl.constexpr, ADD: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """`gradient_kernel`, both sides in one launch: neighbouring programs read the same tiles of x and dy.

    Grid `(2 * chunks, groups * parts)`; chunks lie evenly in the batch, rows of dB and dC are `out_l` apart. With ADD
    the gradients are added to what is there.
    """
    chunk = gl.program_id(0) // 2
    parts = heads_per_group // heads_per_program
    group = gl.program_id(1) // parts
    part = gl.program_id(1) % parts
    row = chunk * Q
    dtype: gl.constexpr = x.dtype
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    u_smem = gl.allocate_shared_memory(dtype, [Q, N], B.layout)
    k_smem = gl.allocate_shared_memory(dtype, [Q, N], C.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, Q, P], x.layout)
    o_smem = gl.allocate_shared_memory(dtype, [2, Q, P], dy.layout)
    state_smem = gl.allocate_shared_memory(dtype, [2, N, P], S.layout)
    cs_smem = gl.allocate_shared_memory(gl.float32, [2, Q], line)
    s_smem = gl.allocate_shared_memory(gl.float32, [2, Q], line)
    once = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = (barriers(), barriers(), barriers())
    mbarrier.init(once, count=1)
    if gl.program_id(0) % 2 == 0:
        gradient_side(
            u_smem, k_smem, v_smem, o_smem, state_smem, cs_smem, s_smem, full, once,
            dy, x, C, B, S, dC, reads, inner, products, overlaps, scale, sums, row, chunk, group, part,
            out_part, out_l, group * N, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
            Q, N, P, BLOCKS, ADD, False, num_warps,
        )  # fmt: skip
    else:
        gradient_side(
            u_smem, k_smem, v_smem, o_smem, state_smem, cs_smem, s_smem, full, once,
            x, dy, B, C, G, dB, dscale, inner, products, overlaps, scale, sums, row, chunk, group, part,
            out_part, out_l, group * N, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
            Q, N, P, BLOCKS, ADD, True, num_warps,
        )  # fmt: skip


TILE = 64
LAYOUT = gl.NVMMASharedLayout(128, 16, 2)


def fits(x: Tensor, B: Tensor, *others: Tensor) -> bool:
    """Whole chunks of 64 tokens and 64 columns, states of 64 or 128, 16-bit inputs whose heads and rows lie evenly."""
    if x.device.type != "cuda" or _triton.capability(x.device)[0] != 9 or x.dtype == torch.float32:
        return False
    if x.shape[1] % TILE or x.shape[3] % TILE or B.shape[3] not in (64, 128):
        return False
    return all(_even(t) for t in (x, B, *others))


def _even(t: Tensor) -> bool:
    """Whether (batch, seqlen, heads, width) is a matrix (batch * seqlen, heads * width) with one row stride."""
    rows = t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1)
    return rows and (t.shape[2] == 1 or t.stride(2) == t.shape[3])


def tiles(t: Tensor | None, columns: int = TILE) -> object:
    """Tiles of a chunk's rows and some columns of one head or group, of the matrix that `_even` speaks of."""
    if t is None:
        return None
    batch, seqlen, heads, width = t.shape
    return _triton.describe(
        TensorDescriptor, t, [batch * seqlen, heads * width], [t.stride(1), 1], [TILE, columns], layout=LAYOUT
    )


def state_tiles(t: Tensor | None) -> object:
    """Tiles of chunk states (chunks, heads, d_state, columns)."""
    if t is None:
        return None
    chunks, heads, n, width = t.shape
    return _triton.describe(TensorDescriptor, t, [chunks * heads * n, width], [width, 1], [n, TILE], layout=LAYOUT)
