"""The sequential kernel of `triton_scan` in Gluon, for Hopper GPUs.

Plain Triton waits for each of the chunk's four products before it starts the next. Here a program keeps three of them
in flight, and everything is transposed: the state and the inputs are then left operands, which wgmma takes from
registers, so that only the masked weights go through shared memory. The copy engine fetches the next chunk, and stores
outputs and states, meanwhile. Two programs share a multiprocessor. States of 256 take twice the warps, one program a
multiprocessor and shared memory for the rounded state: a thread's registers do not hold it.

The kernel waits for latencies: two programs are two warps a scheduler, and instructions issue in a third of the cycles.
So what a chunk needs from memory is asked for a chunk earlier, and instructions, barriers and registers are few.

Two rules that the compiler does not state. An accumulator that is scaled while any product is in flight makes it wait
for all of them, and one that is carried around the loop in flight makes it wait after each instruction. And a register
too many costs more than any overlap gains: beside two programs' shared memory the L1 cache is too small for spills.

Tiles are always 64 rows. Where a sequence ends inside one (RAGGED), the rows behind its end, which are the next
sequence's, are cleared in shared memory, and its output goes to memory row by row.
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
from dualscan.ops.ssd import configs
from dualscan.ops.ssd.configs import HOPPER_TILE

LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
CONTIGUOUS = torch.contiguous_format
# Columns of a state that fit the registers of four warps.
NARROW = gl.constexpr(128)
# Tokens next to a state that is kept, whose inputs' rounding is made up for: the depth of one product.
NEAREST = gl.constexpr(16)
# Triton 3.6 and 3.8 name it differently.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def barriers():
    """A pair of barriers, one a slot."""
    pair = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(pair.index(slot), count=1)
    return pair


@gluon.jit
def clear_rows(tile, valid, ROWS: gl.constexpr, COLUMNS: gl.constexpr, num_warps: gl.constexpr):
    """Zeros in the rows of a tile from `valid` on; the caller orders it with what reads the tile."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [num_warps, 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))[None, :]
    inside = (row < valid) & (column < COLUMNS)
    tile.store(gl.where(inside, tile.load(layout), gl.zeros([ROWS, COLUMNS], tile.dtype, layout)))


@gluon.jit
def send_output(
    out, out_pointer, out_smem, row, column, valid, out_l, Q: gl.constexpr, P: gl.constexpr, RAGGED: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Starts the store of a chunk's output, of which `valid` rows are the sequence's."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    if RAGGED:
        if valid < Q:
            rows = gl.arange(0, Q, layout=gl.SliceLayout(1, layout))[:, None]
            columns = gl.arange(0, P, layout=gl.SliceLayout(0, layout))[None, :]
            here = out_pointer + row.to(gl.int64) * out_l + column
            gl.store(here + rows * out_l + columns, out_smem.load(layout), mask=(rows < valid) & (columns < P))
        else:
            tma.async_copy_shared_to_global(out, [row, column], out_smem)
    else:
        tma.async_copy_shared_to_global(out, [row, column], out_smem)


@gluon.jit
def fetch_chunk(
    query, key, value, u_smem, k_smem, v_smem, full, slot, row, u_column, v_column, wanted, OUTPUT: gl.constexpr,
):  # fmt: skip
    """Starts the copies of one chunk's tiles into a slot, whose barrier expects them."""
    barrier = full.index(slot)
    tma.async_copy_global_to_shared(key, [row, u_column], barrier, k_smem.index(slot), pred=wanted)
    if OUTPUT:
        tma.async_copy_global_to_shared(query, [row, u_column], barrier, u_smem.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(value, [row, v_column], barrier, v_smem.index(slot), pred=wanted)


@gluon.jit
def fetch_state(states, smem, barrier, entry, column, wanted):
    """Starts the copy of one saved state."""
    mbarrier.expect(barrier, states.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(states, [entry, column], barrier, smem, pred=wanted)


@gluon.jit
def keep_bits(x, mask):
    """x where `mask` has all bits, 0 where it has none, for 16-bit numbers: one instruction for two of them.

    Even infinities and NaNs become 0, so that what is not wanted may overflow first.
    """
    return gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [x, mask], dtype=x.dtype, is_pure=True, pack=2)


@gluon.jit
def add_rest(state, v, k, share, first: gl.constexpr, left: gl.constexpr):
    """Adds to a state what rounding left out of the NEAREST tokens' scaled inputs from `first` on."""
    factor = share.slice(first, NEAREST).load(gl.SliceLayout(0, left))
    exact = v.slice(first, NEAREST).permute((1, 0)).load(left).to(gl.float32) * factor[None, :]
    rest = exact - exact.to(v.dtype).to(gl.float32)
    return warpgroup_mma(rest.to(v.dtype), k.slice(first, NEAREST), state)


@gluon.jit
def scan_hopper_kernel(
    query, key, value, out, out_pointer, saved, counterpart, kept, scale, sums, D, initial, final, segments, D_h, D_p,
    out_l, nheads, heads_per_group, headdim, d_state, seqlen, padded,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, EVERY: gl.constexpr, RAGGED: gl.constexpr,
    REVERSE: gl.constexpr, OUTPUT: gl.constexpr, SAVE: gl.constexpr, KEPT: gl.constexpr, ENTRIES: gl.constexpr,
    FINE: gl.constexpr, HAS_D: gl.constexpr, HAS_INITIAL: gl.constexpr, HAS_FINAL: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """One program: P columns of one head over one segment, N columns of the state, as `scan_kernel`.

    Grid `(nheads * headdim // P, segments, d_state // N)`; with OUTPUT N is the whole state. SAVE writes the state at
    the entry of every super-chunk of EVERY chunks, and KEPT its inner product with `counterpart`'s; ENTRIES gives the
    segment's log-decay, as there. FINE adds to that state what rounding left out of the inputs next to it, from which
    A's gradient had most of its error: where a head forgets fast, they are all that the state holds.
    """
    dtype: gl.constexpr = value.dtype
    halves: gl.constexpr = num_warps // 4
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, halves], [16, Q // halves, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, halves], [16, N // halves, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    cols: gl.constexpr = gl.SliceLayout(0, mma)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    # A copy that counts on the output's store before it: that may be an ordinary one where a sequence ends.
    behind: gl.constexpr = 1 if OUTPUT and not RAGGED else 0
    # Whether the rounded state goes to its product through shared memory.
    through: gl.constexpr = OUTPUT and N > NARROW

    blocks = gl.cdiv(headdim, P)
    h = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks
    column = block * P
    segment = gl.program_id(1)
    n_first = 0 if OUTPUT else gl.program_id(2) * N
    batch = gl.load(segments + segment * 7)
    start = gl.load(segments + segment * 7 + 1)
    end = gl.load(segments + segment * 7 + 2)
    first_chunk = gl.load(segments + segment * 7 + 3)
    first_super = gl.load(segments + segment * 7 + 6)
    nchunks = gl.cdiv(end - start, Q)
    some = nchunks > 0 if RAGGED else True
    u_column = (h // heads_per_group) * d_state + n_first
    v_column = h * headdim + column
    first_row = batch * seqlen + start
    # Chunks in the order of the scan: the i-th is opening + i * step.
    if RAGGED:
        opening = gl.maximum(nchunks - 1, 0) if REVERSE else 0
    else:
        opening = nchunks - 1 if REVERSE else 0
    step: gl.constexpr = -1 if REVERSE else 1
    place = h.to(gl.int64) * padded + (first_chunk + opening) * Q

    k_smem = gl.allocate_shared_memory(dtype, [2, Q, N], key.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, Q, P], value.layout)
    u_smem = gl.allocate_shared_memory(dtype, [2, Q, N], key.layout) if OUTPUT else None
    if OUTPUT:
        w_smem = gl.allocate_shared_memory(dtype, [Q, Q], value.layout)
        # Wide states leave no room for both.
        out_smem = w_smem if through else gl.allocate_shared_memory(dtype, [Q, P], value.layout)
    if SAVE or through:
        low_smem = gl.allocate_shared_memory(dtype, [N, P], value.layout)
    if KEPT:
        # Where the rounded state is needed for each chunk, its memory cannot wait for the counterpart.
        g_smem = gl.allocate_shared_memory(dtype, [N, P], value.layout) if through else low_smem
        g_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(g_full, count=1)
    # Of each token: its decay sum; its share of the state; and what its output is scaled by, exp2(cs) or s.
    cs_smem = gl.allocate_shared_memory(gl.float32, [Q], line)
    scale_smem = gl.allocate_shared_memory(gl.float32, [Q], line)
    share_smem = gl.allocate_shared_memory(gl.float32, [Q], line)
    full = barriers()
    nbytes: gl.constexpr = key.block_type.nbytes * (2 if OUTPUT else 1) + value.block_type.nbytes

    p = column + gl.arange(0, P, layout=gl.SliceLayout(1, wide))
    n = n_first + gl.arange(0, N, layout=gl.SliceLayout(0, wide))
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
    mbarrier.expect(full.index(0), nbytes, pred=some)
    fetch_chunk(
        query, key, value, u_smem, k_smem, v_smem, full, 0, first_row + opening * Q, u_column, v_column, some, OUTPUT
    )
    super_chunk = first_super + opening // EVERY
    if KEPT:
        fetch_state(counterpart, g_smem, g_full, (super_chunk * nheads + h) * d_state, column, some)
    if RAGGED:
        # Nothing may be read for a sequence without tokens: there may be nothing behind the last one.
        known = q_flat < gl.where(some, Q, 0)
        next_cs = gl.load(sums + place + q_flat, mask=known, other=0.0)
        next_s = gl.load(scale + place + q_flat, mask=known, other=0.0)
        next_last = gl.load(sums + place + Q - 1, mask=some, other=0.0)
    else:
        next_cs = gl.load(sums + place + q_flat)
        next_s = gl.load(scale + place + q_flat)
        next_last = gl.load(sums + place + Q - 1)
    # All bits where token i follows token j: a comparison in the loop takes five instructions for this one.
    causal = gl.where((i <= j) if REVERSE else (i >= j), -1, 0).to(gl.int16)
    seen = 0
    decayed = 0.0
    for turn in range(nchunks):
        c = opening + turn * step
        slot = turn % 2
        more = turn + 1 < nchunks
        phase = (turn // 2) & 1
        k = k_smem.index(slot)
        v = v_smem.index(slot)
        if REVERSE:
            boundary = (turn == 0) | (c % EVERY == EVERY - 1)
        else:
            boundary = c % EVERY == 0
        entry = ((first_super + c // EVERY) * nheads + h) * d_state + n_first
        last = next_last
        if ENTRIES:
            decayed += last
        cs_smem.store(next_cs)
        scale_smem.store(next_s if REVERSE else gl.exp2(next_cs))
        share_smem.store(gl.exp2(next_cs) if REVERSE else gl.exp2(last - next_cs) * next_s)
        here = place + turn * step * Q
        following = place + (turn * step + (step if more else 0)) * Q
        next_cs = gl.load(sums + following + q_flat)
        next_s = gl.load(scale + following + q_flat)
        next_last = gl.load(sums + following + Q - 1)
        if through:
            if SAVE:
                # The state before has left.
                tma.store_wait(0)
            low_smem.permute((1, 0)).store(state.to(dtype))
        # Before the barrier: the compiler puts one between this and the copies.
        mbarrier.expect(full.index(1 - slot), nbytes, pred=more)
        if OUTPUT:
            fence_async_shared()
        thread_barrier()
        # Every warp is past the chunk before: its output leaves, and its slot is fetched into.
        if OUTPUT and turn > 0:
            before = c - step
            send_output(
                out, out_pointer, out_smem, first_row + before * Q, v_column, end - start - before * Q, out_l,
                Q, P, RAGGED, num_warps,
            )  # fmt: skip
        fetch_chunk(
            query, key, value, u_smem, k_smem, v_smem, full, 1 - slot, first_row + (c + step) * Q, u_column, v_column,
            more, OUTPUT,
        )  # fmt: skip
        if KEPT:
            # The state that the next super-chunk begins with, into the memory that this one's has left.
            early = more & (c % EVERY == 0) & (EVERY > 1) & (turn > 0)
            if early:
                tma.store_wait(behind)
                fetch_state(counterpart, g_smem, g_full, entry - nheads * d_state, column, early)
            if boundary:
                mbarrier.wait(g_full, seen & 1)
                other = g_smem.permute((1, 0)).load(wide).to(gl.float32)
                target = kept + ((entry // d_state) * blocks + block).to(gl.int64) * P + p - column
                gl.store(target, gl.sum(other * state, 1))
                seen += 1
        if not through:
            low = state.to(dtype)
            if SAVE:  # noqa: SIM102 (one condition is the compiler's)
                if boundary:
                    # The state before has left; the output after it may still be on the way.
                    tma.store_wait(behind)
                    low_smem.permute((1, 0)).store(low)
        # Before any product is in flight: the compiler waits for all of them where an accumulator is touched.
        state = state * gl.exp2(last)
        mbarrier.wait(full.index(slot), phase)
        if RAGGED:
            valid = end - start - c * Q
            if valid < Q:
                clear_rows(k, valid, Q, N, num_warps)
                clear_rows(v, valid, Q, P, num_warps)
                fence_async_shared()
                thread_barrier()
        if OUTPUT:
            u = u_smem.index(slot).permute((1, 0))
            weights = warpgroup_mma(k, u, gl.zeros([Q, Q], gl.float32, mma), use_acc=False, is_async=True)
            zero = gl.zeros([P, Q], gl.float32, mma)
            if through:
                y = warpgroup_mma(low_smem.permute((1, 0)), u, zero, use_acc=False, is_async=True)
            else:
                y = warpgroup_mma(gl.convert_layout(low, left), u, zero, use_acc=False, is_async=True)
        x = v.permute((1, 0)).load(left)
        share = share_smem.load(gl.SliceLayout(0, left))
        scaled = (x.to(gl.float32) * share[None, :]).to(dtype)
        state = warpgroup_mma(scaled, k, state, is_async=True)
        if OUTPUT:
            if not REVERSE:
                s_j = gl.load(scale + here + gl.arange(0, Q, layout=rows))[:, None]
            # Asked for while the products run: they take a while to come.
            cs_i = cs_smem.load(cols)[None, :]
            cs_j = cs_smem.load(rows)[:, None]
            # Registers are what this kernel is short of: the rounded state's are free from here.
            weights, y = warpgroup_mma_wait(1, deps=[weights, y])
            y = y * (gl.exp2(last - cs_i) if REVERSE else scale_smem.load(cols)[None, :])
            if REVERSE:
                mask = gl.exp2(cs_j - cs_i)
            else:
                mask = gl.exp2(cs_i - cs_j) * s_j
            if through:
                tma.store_wait(0)
            w_smem.store(keep_bits((weights * mask).to(dtype), causal))
            fence_async_shared()
            thread_barrier()
            # Once more, rather than sixteen registers kept since the first time.
            x = v.permute((1, 0)).load(left)
        if SAVE:  # noqa: SIM102
            if boundary:
                if not OUTPUT:
                    fence_async_shared()
                    thread_barrier()
                tma.async_copy_shared_to_global(saved, [entry, column], low_smem)
        if OUTPUT:
            y = warpgroup_mma(x, w_smem, y, is_async=True)
            y, state = warpgroup_mma_wait(0, deps=[y, state])
            if REVERSE:
                y = y * scale_smem.load(cols)[None, :]
            if HAS_D:
                y = y + skip[:, None] * gl.convert_layout(x, mma).to(gl.float32)
            if through:
                thread_barrier()
            elif SAVE and behind == 1:
                if boundary:
                    tma.store_wait(1)
                else:
                    tma.store_wait(0)
            else:
                tma.store_wait(0)
            out_smem.permute((1, 0)).store(y.to(dtype))
        else:
            state = warpgroup_mma_wait(0, deps=[state])
        if FINE:  # noqa: SIM102
            # Of the chunk before a super-chunk. Nothing is in flight here.
            if c % EVERY == (0 if REVERSE else EVERY - 1):
                state = add_rest(state, v, k, share_smem, 0 if REVERSE else Q - NEAREST, left)
        if KEPT:
            # A super-chunk of one chunk has only just sent its own.
            late = more & (c % EVERY == 0) & ((EVERY == 1) | (turn == 0))
            if late:
                tma.store_wait(0)
                fetch_state(counterpart, g_smem, g_full, entry - nheads * d_state, column, late)
    if OUTPUT:
        fence_async_shared()
        thread_barrier()
        if nchunks > 0:
            final_chunk = opening + (nchunks - 1) * step
            send_output(
                out, out_pointer, out_smem, first_row + final_chunk * Q, v_column, end - start - final_chunk * Q, out_l,
                Q, P, RAGGED, num_warps,
            )  # fmt: skip
    tma.store_wait(0)
    if ENTRIES:
        gl.store(kept + segment * nheads + h, decayed)
    if HAS_FINAL:
        # A segment's own contribution; or the last state of a sequence, from its last segment.
        edge: gl.constexpr = 1 if REVERSE else 2
        target = segment if ENTRIES else gl.load(segments + segment * 7 + 4)
        inside = (p[:, None] < headdim) & (ENTRIES | ((gl.load(segments + segment * 7 + 5) & edge) != 0))
        here = final + (target.to(gl.int64) * nheads + h) * per_head + p[:, None] * d_state + n[None, :]
        gl.store(here, state, mask=inside & (n[None, :] < d_state))


def fits(x: Tensor, B: Tensor, *others: Tensor) -> bool:
    """Known sizes, and inputs whose heads and rows lie evenly in memory."""
    return configs.for_hopper(x, B) and all(even(t) for t in (x, B, *others))


def arranged(*tensors: Tensor) -> list[Tensor]:
    """The tensors as the copy engine takes them: themselves, for the views that a fused projection gives, or copies."""
    fit = [_triton.describable(t) and t.stride(-1) == 1 and even(t) for t in tensors]
    return [t if fits else t.clone(memory_format=CONTIGUOUS) for t, fits in zip(tensors, fit, strict=True)]


def even(t: Tensor) -> bool:
    """Whether (batch, seqlen, heads, width) is a matrix (batch * seqlen, heads * width) with one row stride."""
    rows = t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1)
    return rows and (t.shape[2] == 1 or t.stride(2) == t.shape[3])


def tiles(t: Tensor | None, columns: int = HOPPER_TILE) -> object:
    """Tiles of a chunk's rows and some columns of one head or group, of the matrix that `even` speaks of."""
    if t is None:
        return None
    batch, seqlen, heads, width = t.shape
    return _triton.describe(
        TensorDescriptor, t, [batch * seqlen, heads * width], [t.stride(1), 1], [HOPPER_TILE, columns], layout=LAYOUT
    )


def state_tiles(t: Tensor | None, rows: int) -> object:
    """Tiles of saved states (super-chunks, heads, d_state, columns)."""
    if t is None:
        return None
    supers, heads, n, width = t.shape
    return _triton.describe(
        TensorDescriptor, t, [supers * heads * n, width], [width, 1], [rows, HOPPER_TILE], layout=LAYOUT
    )
