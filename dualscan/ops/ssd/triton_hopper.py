"""The sequential kernel of `triton_scan` in Gluon, for Hopper GPUs: the same mathematics with explicit overlap.

Plain Triton waits for each of the chunk's four products before it starts the next. Here one warpgroup keeps three of
them in flight: while C Bᵀ is computed, the state is rounded and handed to C S and the scaled inputs to the state's
update; the exponentials of the decay mask run beside both. A chunk's state goes to memory from the same shared tile
that the product reads, by the copy engine. Two programs share a multiprocessor.

It covers what `fits` says; everything else takes the plain kernel, which is also the cross-check.
"""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from dualscan.ops.ssd.triton_scan import Call


@gluon.jit
def fetch(
    u_desc, k_desc, v_desc, u_smem, k_smem, v_smem, full, slot, row, u_column, v_column, wanted, OUTPUT: gl.constexpr
):  # fmt: skip
    """Starts the copies of one chunk's tiles into a slot; the query's only where there are outputs."""
    bar = full.index(slot)
    size: gl.constexpr = k_desc.block_type.nbytes + v_desc.block_type.nbytes
    if OUTPUT:
        mbarrier.expect(bar, size + u_desc.block_type.nbytes, pred=wanted)
        tma.async_copy_global_to_shared(u_desc, [row, u_column], bar, u_smem.index(slot), pred=wanted)
    else:
        mbarrier.expect(bar, size, pred=wanted)
    tma.async_copy_global_to_shared(k_desc, [row, u_column], bar, k_smem.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(v_desc, [row, v_column], bar, v_smem.index(slot), pred=wanted)


@gluon.jit
def scan_hopper_kernel(
    query, key, value, out, saved, scale, sums, D, initial, final, segments, D_h, D_p,
    nheads, heads_per_group, headdim, d_state, seqlen, padded,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, REVERSE: gl.constexpr, OUTPUT: gl.constexpr,
    SAVE: gl.constexpr, HAS_D: gl.constexpr, HAS_INITIAL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program: P columns of one head over one segment, as `scan_kernel`."""
    dtype: gl.constexpr = value.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 64, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    cols: gl.constexpr = gl.SliceLayout(0, mma)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])

    blocks = gl.cdiv(headdim, P)
    h = gl.program_id(0) // blocks
    column = (gl.program_id(0) % blocks) * P
    segment = gl.program_id(1)
    batch = gl.load(segments + segment * 5)
    start = gl.load(segments + segment * 5 + 1)
    end = gl.load(segments + segment * 5 + 2)
    first_chunk = gl.load(segments + segment * 5 + 3)
    nchunks = gl.cdiv(end - start, Q)
    u_column = (h // heads_per_group) * N
    v_column = h * headdim + column
    first_row = batch * seqlen + start
    place = h.to(gl.int64) * padded + first_chunk * Q

    if OUTPUT:
        u_smem = gl.allocate_shared_memory(dtype, [2, Q, N], query.layout)
        out_smem = gl.allocate_shared_memory(dtype, [Q, P], value.layout)
    else:
        u_smem = None
    k_smem = gl.allocate_shared_memory(dtype, [2, Q, N], key.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, Q, P], value.layout)
    low_smem = gl.allocate_shared_memory(dtype, [N, P], value.layout)
    scaled_smem = gl.allocate_shared_memory(dtype, [Q, P], value.layout)
    cs_smem = gl.allocate_shared_memory(gl.float32, [Q], line)
    s_smem = gl.allocate_shared_memory(gl.float32, [Q], line)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for first in gl.static_range(2):
        mbarrier.init(full.index(first), count=1)

    n = gl.arange(0, N, layout=rows)
    p = column + gl.arange(0, P, layout=cols)
    state_place = (segment.to(gl.int64) * nheads + h) * headdim * d_state + p[None, :] * d_state + n[:, None]
    state_inside = (p < headdim)[None, :] & (n < d_state)[:, None]
    if HAS_INITIAL:
        state = gl.load(initial + state_place, mask=state_inside, other=0.0)
    else:
        state = gl.zeros([N, P], gl.float32, mma)
    if HAS_D:
        skip = gl.load(D + h * D_h + p * D_p, mask=p < headdim, other=0.0).to(gl.float32)

    q_flat = gl.arange(0, Q, layout=flat)
    i_row = gl.arange(0, Q, layout=rows)[:, None]
    i_col = gl.arange(0, Q, layout=cols)[None, :]
    for first in gl.static_range(2):
        row = first_row + (nchunks - 1 - first if REVERSE else first) * Q
        fetch(query, key, value, u_smem, k_smem, v_smem, full, first, row, u_column, v_column, first < nchunks, OUTPUT)
    opening = place + (nchunks - 1) * Q if REVERSE else place
    some = (q_flat >= 0) & (nchunks > 0)
    next_cs = gl.load(sums + opening + q_flat, mask=some, other=0.0)
    next_s = gl.load(scale + opening + q_flat, mask=some, other=0.0)
    for i in range(nchunks):
        c = nchunks - 1 - i if REVERSE else i
        slot = i % 2
        k = k_smem.index(slot)
        v = v_smem.index(slot)
        cs_smem.store(next_cs)
        s_smem.store(next_s)
        mbarrier.wait(full.index(slot), (i // 2) & 1)
        if OUTPUT:
            u = u_smem.index(slot)
            zero = gl.zeros([Q, Q], gl.float32, mma)
            weights = warpgroup_mma(u, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        low = state.to(dtype)
        if SAVE:
            # The previous chunk's state has left; its output may still be on the way.
            tma.store_wait(1 if OUTPUT else 0)
        if SAVE or OUTPUT:
            low_smem.store(low)
            fence_async_shared()
            gl.thread_barrier()
        if SAVE:
            entry = ((first_chunk + c) * nheads + h) * N
            tma.async_copy_shared_to_global(saved, [entry, column], low_smem)
        if OUTPUT:
            y = warpgroup_mma(u, low_smem, gl.zeros([Q, P], gl.float32, mma), use_acc=False, is_async=True)
        cs = cs_smem.load(rows)
        s = s_smem.load(rows)
        last = gl.load(sums + place + c * Q + Q - 1)
        from_start = gl.exp2(cs)
        to_end = gl.exp2(last - cs)
        x = v.load(mma).to(gl.float32)
        share = from_start if REVERSE else to_end * s
        scaled_smem.store((x * share[:, None]).to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        state = state * gl.exp2(last)
        state = warpgroup_mma(k.permute((1, 0)), scaled_smem, state, is_async=True)
        more = i + 1 < nchunks
        following = place + (c - 1 if REVERSE else c + 1) * Q
        next_cs = gl.load(sums + following + q_flat, mask=(q_flat >= 0) & more, other=0.0)
        next_s = gl.load(scale + following + q_flat, mask=(q_flat >= 0) & more, other=0.0)
        if OUTPUT:
            cs_col = cs_smem.load(cols)
            if REVERSE:
                gap = gl.where(i_row <= i_col, cs_col[None, :] - cs[:, None], float("-inf"))
                mask = gl.exp2(gap)
            else:
                gap = gl.where(i_row >= i_col, cs[:, None] - cs_col[None, :], float("-inf"))
                mask = gl.exp2(gap) * s_smem.load(cols)[None, :]
            weights = warpgroup_mma_wait(2, deps=[weights])
            weights = gl.convert_layout((weights * mask).to(dtype), gl.DotOperandLayout(0, mma, 2))
            y = warpgroup_mma_wait(1, deps=[y])
            y = y * (to_end if REVERSE else from_start)[:, None]
            y = warpgroup_mma(weights, v, y, is_async=True)
            y, state = warpgroup_mma_wait(0, deps=[y, state])
            if REVERSE:
                y = y * s[:, None]
            if HAS_D:
                y = y + skip[None, :] * x
            tma.store_wait(1 if SAVE else 0)
            out_smem.store(y.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(out, [first_row + c * Q, v_column], out_smem)
        else:
            state = warpgroup_mma_wait(0, deps=[state])
            gl.thread_barrier()
        # Every warp is past its reads of this slot: a barrier stands between.
        later = c - 2 if REVERSE else c + 2
        fetch(
            query, key, value, u_smem, k_smem, v_smem, full, slot, first_row + later * Q, u_column, v_column,
            i + 2 < nchunks, OUTPUT,
        )  # fmt: skip
    tma.store_wait(0)
    for first in gl.static_range(2):
        mbarrier.invalidate(full.index(first))
    gl.store(final + state_place, state, mask=state_inside)


@gluon.jit
def gradient_side(
    u_smem, k_smem, v_smem, o_smem, state_smem, cs_smem, s_smem, full,
    value, other, query, key, state, out, rows_out, inner_out, products, overlaps, scale, sums,
    row, chunk, group, part, out_part, u_column, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, REVERSE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One side of `gradient_kernel` for one chunk: dC, or with REVERSE dB."""
    dtype: gl.constexpr = value.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 64, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    cols: gl.constexpr = gl.SliceLayout(0, mma)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])

    blocks = headdim // P
    count = heads_per_program * blocks
    first_head = group * heads_per_group + part * heads_per_program
    mbarrier.expect(full.index(2), query.block_type.nbytes + key.block_type.nbytes)
    tma.async_copy_global_to_shared(query, [row, u_column], full.index(2), u_smem)
    tma.async_copy_global_to_shared(key, [row, u_column], full.index(2), k_smem)
    for first in gl.static_range(2):
        fetch_head(
            value, other, state, v_smem, o_smem, state_smem, full, first, row, first_head * headdim + first * P,
            (chunk * nheads + first_head + first // blocks) * N, (first % blocks) * P, first < count,
        )  # fmt: skip
    q_flat = gl.arange(0, Q, layout=flat)
    i_row = gl.arange(0, Q, layout=rows)[:, None]
    i_col = gl.arange(0, Q, layout=cols)[None, :]
    q = gl.arange(0, Q, layout=rows)
    place = first_head.to(gl.int64) * padded + chunk * Q
    next_cs = gl.load(sums + place + q_flat)
    next_s = gl.load(scale + place + q_flat)
    diagonal = i_row == i_col
    mbarrier.wait(full.index(2), 0)
    weights = warpgroup_mma(u_smem, k_smem.permute((1, 0)), gl.zeros([Q, Q], gl.float32, mma), use_acc=False)
    if not REVERSE:
        overlap = gl.sum(gl.where(diagonal, weights, 0.0), 1)
        if part == 0:
            gl.store(overlaps + group.to(gl.int64) * padded + chunk * Q + q, overlap)
    # The products C Bᵀ wait in shared memory, where the key was: registers are what this kernel is short of.
    square: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
    if N * 2 == Q * 4:
        weights_smem = k_smem._reinterpret(gl.float32, [Q, Q], square)
    else:
        weights_smem = gl.allocate_shared_memory(gl.float32, [Q, Q], square)
    gl.thread_barrier()
    weights_smem.store(gl.where(diagonal, 0.0, weights))
    total = gl.zeros([Q, N], gl.float32, mma)
    dweights = gl.zeros([Q, Q], gl.float32, mma)
    for i in range(count):
        h = first_head + i // blocks
        block = i % blocks
        slot = i % 2
        v = v_smem.index(slot)
        S = state_smem.index(slot)
        cs_smem.store(next_cs)
        s_smem.store(next_s)
        last = gl.load(sums + h.to(gl.int64) * padded + chunk * Q + Q - 1)
        mbarrier.wait(full.index(slot), (i // 2) & 1)
        zero = gl.zeros([Q, Q], gl.float32, mma)
        inside = warpgroup_mma(v, o_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        gl.thread_barrier()
        cs = cs_smem.load(rows)
        s = s_smem.load(rows)
        share = gl.exp2(last - cs) if REVERSE else gl.exp2(cs)
        x = v.load(mma)
        scaled = (x.to(gl.float32) * (share * s if REVERSE else share)[:, None]).to(dtype)
        scaled = gl.convert_layout(scaled, gl.DotOperandLayout(0, mma, 2))
        total = warpgroup_mma(scaled, S.permute((1, 0)), total, is_async=True)
        following = gl.minimum(i + 1, count - 1)
        place = (first_head + following // blocks).to(gl.int64) * padded + chunk * Q
        next_cs = gl.load(sums + place + q_flat)
        next_s = gl.load(scale + place + q_flat)
        cs_col = cs_smem.load(cols)
        inside = warpgroup_mma_wait(1, deps=[inside])
        slot_out = (block * nheads + h).to(gl.int64) * padded + chunk * Q + q
        if REVERSE:
            gap = gl.where(i_row <= i_col, cs_col[None, :] - cs[:, None], float("-inf"))
            inside = inside * gl.exp2(gap)
        else:
            gl.store(products + slot_out, gl.sum(gl.where(diagonal, inside, 0.0), 1))
            gap = gl.where(i_row >= i_col, cs[:, None] - cs_col[None, :], float("-inf"))
            inside = inside * (gl.exp2(gap) * s_smem.load(cols)[None, :])
        pairs = gl.sum(inside * weights_smem.load(mma), 1)
        dweights += inside * s[:, None] if REVERSE else inside
        inner = warpgroup_mma(u_smem, S, gl.zeros([Q, P], gl.float32, mma), use_acc=False, is_async=True)
        inner, total = warpgroup_mma_wait(0, deps=[inner, total])
        inner = gl.sum(inner * x.to(gl.float32), 1) * share
        if REVERSE:
            gl.store(rows_out + slot_out, pairs)
            gl.store(inner_out + slot_out, inner)
        else:
            gl.store(rows_out + slot_out, pairs + inner)
        gl.thread_barrier()
        later = i + 2
        fetch_head(
            value, other, state, v_smem, o_smem, state_smem, full, slot, row, first_head * headdim + later * P,
            (chunk * nheads + first_head + later // blocks) * N, (later % blocks) * P, later < count,
        )  # fmt: skip
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.expect(full.index(2), key.block_type.nbytes)
    tma.async_copy_global_to_shared(key, [row, u_column], full.index(2), k_smem)
    mbarrier.wait(full.index(2), 1)
    summed = gl.convert_layout(dweights.to(dtype), gl.DotOperandLayout(0, mma, 2))
    total = warpgroup_mma(summed, k_smem, total)
    columns = gl.arange(0, N, layout=cols)
    ngroups = nheads // heads_per_group
    base = out + part.to(gl.int64) * out_part + row.to(gl.int64) * ngroups * d_state + group * d_state
    gl.store(base + i_row * (ngroups * d_state) + columns[None, :], total.to(out.dtype.element_ty))


@gluon.jit
def fetch_head(
    value, other, state, v_smem, o_smem, state_smem, full, slot, row, column, entry, state_column, wanted
):  # fmt: skip
    """Starts the copies of one head's tiles into a slot."""
    bar = full.index(slot)
    size: gl.constexpr = value.block_type.nbytes + other.block_type.nbytes + state.block_type.nbytes
    mbarrier.expect(bar, size, pred=wanted)
    tma.async_copy_global_to_shared(value, [row, column], bar, v_smem.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(other, [row, column], bar, o_smem.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(state, [entry, state_column], bar, state_smem.index(slot), pred=wanted)


@gluon.jit
def gradient_hopper_kernel(
    x, dy, B, C, S, G, dB, dC, reads, dscale, inner, products, overlaps, scale, sums,
    out_part, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """`gradient_kernel`, both sides in one launch: neighbouring programs read the same tiles of x and dy.

    Grid `(2 * chunks, groups * parts)`; chunks lie evenly in the batch.
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
    cs_smem = gl.allocate_shared_memory(gl.float32, [Q], line)
    s_smem = gl.allocate_shared_memory(gl.float32, [Q], line)
    full = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for first in gl.static_range(3):
        mbarrier.init(full.index(first), count=1)
    if gl.program_id(0) % 2 == 0:
        gradient_side(
            u_smem, k_smem, v_smem, o_smem, state_smem, cs_smem, s_smem, full,
            dy, x, C, B, S, dC, reads, inner, products, overlaps, scale, sums, row, chunk, group, part,
            out_part, group * N, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
            Q, N, P, False, num_warps,
        )  # fmt: skip
    else:
        gradient_side(
            u_smem, k_smem, v_smem, o_smem, state_smem, cs_smem, s_smem, full,
            x, dy, B, C, G, dB, dscale, inner, products, overlaps, scale, sums, row, chunk, group, part,
            out_part, group * N, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
            Q, N, P, True, num_warps,
        )  # fmt: skip
    for first in gl.static_range(3):
        mbarrier.invalidate(full.index(first))


TILE = 64


def fits(x: Tensor, B: Tensor, *others: Tensor) -> bool:
    """Whole chunks of 64 tokens and 64 columns, states of 64 or 128, 16-bit inputs whose heads and rows lie evenly."""
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device)[0] != 9 or x.dtype == torch.float32:
        return False
    if x.shape[1] % TILE or x.shape[3] % TILE or B.shape[3] not in (64, 128):
        return False
    return all(_even(t) for t in (x, B, *others))


def _even(t: Tensor) -> bool:
    """Whether (batch, seqlen, heads, width) is a matrix (batch * seqlen, heads * width) with one row stride."""
    rows = t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1)
    return rows and (t.shape[2] == 1 or t.stride(2) == t.shape[3])


def _descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of the matrix that `_even` speaks of, or of a matrix of chunk states."""
    shape, stride = list(t.shape), t.stride(0)
    if t.ndim == 4:
        shape, stride = [shape[0] * shape[1], shape[2] * shape[3]], t.stride(1)
    return TensorDescriptor(t, shape, [stride, 1], [rows, columns], gl.NVMMASharedLayout(128, 16, 2))


def launch(
    call: "Call", query: Tensor, key: Tensor, value: Tensor, out: Tensor | None, saved: Tensor | None,
    D: Tensor | None, initial: Tensor | None, final: Tensor, reverse: bool,
) -> None:  # fmt: skip
    """Launches `scan_hopper_kernel` over every segment of a call."""
    nheads, headdim = value.shape[2:]
    n = key.shape[3]
    skip = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.ndim == 2 else 0)
    states = None if saved is None else _descriptor(saved.view(-1, saved.shape[-1]), n, TILE)
    scan_hopper_kernel[(nheads * (headdim // TILE), call.plan.segments.shape[0])](
        _descriptor(query, TILE, n), _descriptor(key, TILE, n), _descriptor(value, TILE, TILE),
        None if out is None else _descriptor(out, TILE, TILE), states, call.scale, call.sums, D, initial, final,
        call.plan.segments, *skip, nheads, nheads // key.shape[2], headdim, n, value.shape[1], call.padded,
        Q=TILE, N=n, P=TILE, REVERSE=reverse, OUTPUT=out is not None, SAVE=saved is not None, HAS_D=D is not None,
        HAS_INITIAL=initial is not None, num_warps=4,
    )  # fmt: skip


def launch_gradients(
    call: "Call", dy: Tensor, S: Tensor, G: Tensor, dB: Tensor, dC: Tensor, sums_out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Launches `gradient_hopper_kernel`; dB and dC are (parts, batch, seqlen, groups, d_state)."""
    x, B, C = call.x, call.B, call.C
    nheads, headdim = x.shape[2:]
    parts, ngroups, n = dB.shape[0], B.shape[2], B.shape[3]
    per_group = nheads // ngroups
    states = (_descriptor(t.view(-1, t.shape[-1]), n, TILE) for t in (S, G))
    gradient_hopper_kernel[(2 * call.plan.chunks.shape[0], ngroups * parts)](
        _descriptor(x, TILE, TILE), _descriptor(dy, TILE, TILE), _descriptor(B, TILE, n), _descriptor(C, TILE, n),
        *states, dB, dC, *sums_out, call.scale, call.sums, dB.stride(0), nheads, per_group,
        per_group // parts, headdim, n, call.padded, Q=TILE, N=n, P=TILE, num_warps=4,
    )  # fmt: skip
