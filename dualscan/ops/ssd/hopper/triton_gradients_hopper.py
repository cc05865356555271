"""The parameter gradients of `triton_gradients` in Gluon, for Hopper GPUs: states every few chunks, the rest in pairs.

With a state S at the start of every super-chunk of several chunks, and the gradient G of the state at its end, the sums
of `triton_gradients` over the tokens of a super-chunk fall into parts that one program can do without the others:

    states:  Σ exp(cs) dY Sᵀ into dC of a chunk, or Σ s exp(cs_end - cs) X Gᵀ into dB; their inner products with C, B
    pairs:   W = (dY Xᵀ) ∘ L of a chunk m and a chunk j <= m, its row and column sums with C Bᵀ, and Σ W s_j over heads

Between two chunks L is the product of two factors <= 1, one a row and one a column: exponentials are needed on the
diagonal alone. `finish_kernel` puts together dC = states + Σ_j W B_j and dB = states + Σ_m Wᵀ C_m. All programs of a
super-chunk are neighbours in the grid, go over the heads in the same order, and find each other's tiles in L2.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dualscan.ops.ssd.hopper.triton_scan_hopper import barriers, clear_rows, thread_barrier


@gluon.jit
def fetch_pair(first, second, first_smem, second_smem, full, slot, first_at, second_at, wanted):
    """Starts the copies of two tiles into a slot, whose barrier expects them."""
    barrier = full.index(slot)
    tma.async_copy_global_to_shared(first, first_at, barrier, first_smem.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(second, second_at, barrier, second_smem.index(slot), pred=wanted)


@gluon.jit
def ends_between(sums, place, first, last, Q: gl.constexpr, EVERY: gl.constexpr):
    """The log-decays of the chunks [first, last) of a super-chunk whose decay sums begin at `place`, others 0.

    To be added up where they are needed, a turn later: what is computed from a load waits for it at once.
    """
    chunk = gl.arange(0, EVERY, layout=gl.BlockedLayout([EVERY], [32], [4], [0]))
    return gl.load(sums + place + chunk * Q + Q - 1, mask=(chunk >= first) & (chunk < last), other=0.0)


@gluon.jit
def state_program(
    value, query, state, totals, inner_out, scale, sums, row, first_chunk, m, count, super_chunk, group, part, n_first,
    totals_l, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, BLOCKS: gl.constexpr, EVERY: gl.constexpr,
    REVERSE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """What the state at the super-chunk's start gives to a chunk's dC; with REVERSE, that at its end to dB."""
    dtype: gl.constexpr = value.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, P, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, N, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    u_smem = gl.allocate_shared_memory(dtype, [Q, N], query.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, Q, P], value.layout)
    state_smem = gl.allocate_shared_memory(dtype, [2, N, P], state.layout)
    full = barriers()
    once = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(once, count=1)
    nbytes: gl.constexpr = value.block_type.nbytes + state.block_type.nbytes

    turns = heads_per_program * BLOCKS
    first_head = group * heads_per_group + part * heads_per_program
    mbarrier.expect(once, query.block_type.nbytes)
    tma.async_copy_global_to_shared(query, [row, group * d_state + n_first], once, u_smem)
    for first in gl.static_range(2):
        entry = (super_chunk * nheads + first_head + first // BLOCKS) * d_state + n_first
        mbarrier.expect(full.index(first), nbytes, pred=first < turns)
        fetch_pair(
            value, state, v_smem, state_smem, full, first, [row, first_head * headdim + first * P],
            [entry, (first % BLOCKS) * P], first < turns,
        )  # fmt: skip
    q = gl.arange(0, Q, layout=rows)
    total = gl.zeros([Q, N], gl.float32, wide)
    place = first_head.to(gl.int64) * padded + first_chunk * Q
    next_cs = gl.load(sums + place + m * Q + q)
    next_s = gl.load(scale + place + m * Q + q)
    next_ends = ends_between(sums, place, m if REVERSE else 0, count if REVERSE else m, Q, EVERY)
    mbarrier.wait(once, 0)
    for turn in range(turns):
        h = first_head + turn // BLOCKS
        slot = turn % 2
        v = v_smem.index(slot)
        S = state_smem.index(slot)
        ends = gl.sum(next_ends, 0)
        share = gl.exp2(ends - next_cs) if REVERSE else gl.exp2(ends + next_cs)
        weight = share * next_s if REVERSE else share
        later = turn + 1
        wanted = (turn > 0) & (later < turns)
        mbarrier.expect(full.index(1 - slot), nbytes, pred=wanted)
        following = (first_head + gl.minimum(later, turns - 1) // BLOCKS).to(gl.int64) * padded + first_chunk * Q
        next_cs = gl.load(sums + following + m * Q + q)
        next_s = gl.load(scale + following + m * Q + q)
        next_ends = ends_between(sums, following, m if REVERSE else 0, count if REVERSE else m, Q, EVERY)
        thread_barrier()
        # Every warp is past its reads of the other slot.
        entry = (super_chunk * nheads + first_head + later // BLOCKS) * d_state + n_first
        fetch_pair(
            value, state, v_smem, state_smem, full, 1 - slot, [row, first_head * headdim + later * P],
            [entry, (later % BLOCKS) * P], wanted,
        )  # fmt: skip
        mbarrier.wait(full.index(slot), (turn // 2) & 1)
        inner = warpgroup_mma(u_smem, S, gl.zeros([Q, P], gl.float32, mma), use_acc=False, is_async=True)
        x = v.load(mma)
        scaled = (x.to(gl.float32) * weight[:, None]).to(dtype)
        scaled = gl.convert_layout(scaled, gl.DotOperandLayout(0, wide, 2))
        total = warpgroup_mma(scaled, S.permute((1, 0)), total, is_async=True)
        inner = warpgroup_mma_wait(1, deps=[inner])
        read = gl.sum(inner * x.to(gl.float32), 1) * share
        piece = (n_first // N) * BLOCKS + turn % BLOCKS
        gl.store(inner_out + (piece * nheads + h).to(gl.int64) * padded + (first_chunk + m) * Q + q, read)
        total = warpgroup_mma_wait(0, deps=[total])
    line = ((first_chunk + m) * Q + gl.arange(0, Q, layout=gl.SliceLayout(1, wide))).to(gl.int64)[:, None] * totals_l
    columns = group * d_state + n_first + gl.arange(0, N, layout=gl.SliceLayout(0, wide))
    gl.store(totals + part.to(gl.int64) * padded * totals_l + line + columns[None, :], total)


@gluon.jit
def clear_behind(
    own, other, valid, ROWS: gl.constexpr, COLUMNS: gl.constexpr, BOTH: gl.constexpr, num_warps: gl.constexpr
):
    """Zeros in what two tiles have behind the end of a sequence; the second has as many rows of it, or all."""
    if valid < ROWS:
        clear_rows(own, valid, ROWS, COLUMNS, num_warps)
        if BOTH:
            clear_rows(other, valid, ROWS, COLUMNS, num_warps)
        fence_async_shared()
        thread_barrier()


@gluon.jit
def store_columns(
    dscale, parts, turn, nheads, first_head, padded, Q: gl.constexpr, BLOCKS: gl.constexpr, num_warps: gl.constexpr
):
    """Adds up the column sums of a turn, of which every group of lanes has left its own in shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [1, num_warps], [1, 0])
    place = ((turn % BLOCKS) * nheads + first_head + turn // BLOCKS).to(gl.int64) * padded
    gl.store(dscale + place + gl.arange(0, Q, layout=gl.SliceLayout(0, layout)), gl.sum(parts.load(layout), 0))


@gluon.jit
def pair_program(
    x, dy, B, C, squares, reads, dscale, products, overlaps, dD, scale, sums, row, first_chunk, m, j, valid,
    square, group, part, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
    Q: gl.constexpr, N: gl.constexpr, HALVES: gl.constexpr, P: gl.constexpr, BLOCKS: gl.constexpr,
    EVERY: gl.constexpr, DIAGONAL: gl.constexpr, RAGGED: gl.constexpr, VECTOR_D: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """The gradients of the weights between the tokens of chunk m and those of chunk j <= m, of which `valid` remain."""
    dtype: gl.constexpr = x.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, Q, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    cols: gl.constexpr = gl.SliceLayout(0, mma)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    c_smem = gl.allocate_shared_memory(dtype, [Q, N], C.layout)
    b_smem = gl.allocate_shared_memory(dtype, [Q, N], B.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, Q, P], dy.layout)
    o_smem = gl.allocate_shared_memory(dtype, [2, Q, P], x.layout)
    row_smem = gl.allocate_shared_memory(gl.float32, [2, Q], line)
    col_smem = gl.allocate_shared_memory(gl.float32, [2, Q], line)
    s_smem = gl.allocate_shared_memory(gl.float32, [2, Q], line)
    full = barriers()
    once = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(once, count=1)

    turns = heads_per_program * BLOCKS
    first_head = group * heads_per_group + part * heads_per_program
    row_m = row + m * Q
    row_j = row + j * Q
    for first in gl.static_range(2):
        column = first_head * headdim + first * P
        mbarrier.expect(full.index(first), dy.block_type.nbytes + x.block_type.nbytes, pred=first < turns)
        fetch_pair(dy, x, v_smem, o_smem, full, first, [row_m, column], [row_j, column], first < turns)
    # A sequence that ends inside chunk m: nothing behind its end may take part, not even multiplied by zero.
    inside = valid - m * Q
    weights = gl.zeros([Q, Q], gl.float32, mma)
    for half in gl.static_range(HALVES):
        mbarrier.expect(once, C.block_type.nbytes + B.block_type.nbytes)
        tma.async_copy_global_to_shared(C, [row_m, group * d_state + half * N], once, c_smem)
        tma.async_copy_global_to_shared(B, [row_j, group * d_state + half * N], once, b_smem)
        mbarrier.wait(once, half & 1)
        if RAGGED:
            clear_behind(c_smem, b_smem, inside, Q, N, DIAGONAL, num_warps)
        weights = warpgroup_mma(c_smem, b_smem.permute((1, 0)), weights)
        thread_barrier()
    # A warp has 16 rows, a lane two of them: column sums of each group of lanes, in the order that both sides like.
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
    part_smem = gl.allocate_shared_memory(gl.float32, [2, 8 * num_warps, Q], swizzled)
    i_row = gl.arange(0, Q, layout=rows)[:, None]
    i_col = gl.arange(0, Q, layout=cols)[None, :]
    q_row = gl.arange(0, Q, layout=rows)
    q_flat = gl.arange(0, Q, layout=flat)
    if DIAGONAL:
        # What a token writes and reads itself has no decay: left out of the sums that the decay's gradient is made of.
        own = gl.sum(gl.where(i_row == i_col, weights, 0.0), 1)
        if part == 0:
            gl.store(overlaps + group.to(gl.int64) * padded + (first_chunk + m) * Q + q_row, own)
        # Zeros where i < j, too: the decay needs no comparison then, only to stay finite.
        weights = gl.where(i_row <= i_col, 0.0, weights)
        eye = gl.where(i_row == i_col, 1.0, 0.0)
    total = gl.zeros([Q, Q], gl.float32, mma)
    place = first_head.to(gl.int64) * padded + first_chunk * Q
    next_row = gl.load(sums + place + m * Q + q_flat)
    next_col = gl.load(sums + place + j * Q + q_flat)
    next_s = gl.load(scale + place + j * Q + q_flat)
    next_ends = ends_between(sums, place, j + 1, m, Q, EVERY)
    next_end = gl.load(sums + place + j * Q + Q - 1)
    pieces = BLOCKS * nheads * padded.to(gl.int64)
    dscale_m = dscale + m * pieces + (first_chunk + j) * Q
    for turn in range(turns):
        h = first_head + turn // BLOCKS
        slot = turn % 2
        v = v_smem.index(slot)
        o = o_smem.index(slot)
        if DIAGONAL:
            row_smem.index(slot).store(next_row)
            col_smem.index(slot).store(next_col)
        else:
            # The end of chunk j is the point of reference: both factors are <= 1.
            row_smem.index(slot).store(gl.exp2(next_row + gl.sum(next_ends, 0)))
            col_smem.index(slot).store(gl.exp2(next_end - next_col))
        s_smem.index(slot).store(next_s)
        later = turn + 1
        column = first_head * headdim + later * P
        wanted = (turn > 0) & (later < turns)
        mbarrier.expect(full.index(1 - slot), dy.block_type.nbytes + x.block_type.nbytes, pred=wanted)
        thread_barrier()
        # Every warp is past its reads of the other slot.
        fetch_pair(dy, x, v_smem, o_smem, full, 1 - slot, [row_m, column], [row_j, column], wanted)
        following = (first_head + gl.minimum(later, turns - 1) // BLOCKS).to(gl.int64) * padded + first_chunk * Q
        mbarrier.wait(full.index(slot), (turn // 2) & 1)
        if RAGGED:
            clear_behind(v, o, inside, Q, P, DIAGONAL, num_warps)
        zero = gl.zeros([Q, Q], gl.float32, mma)
        product = warpgroup_mma(v, o.permute((1, 0)), zero, use_acc=False, is_async=True)
        next_row = gl.load(sums + following + m * Q + q_flat)
        next_col = gl.load(sums + following + j * Q + q_flat)
        next_s = gl.load(scale + following + j * Q + q_flat)
        next_ends = ends_between(sums, following, j + 1, m, Q, EVERY)
        next_end = gl.load(sums + following + j * Q + Q - 1)
        if turn > 0:
            store_columns(
                dscale_m, part_smem.index(1 - slot), turn - 1, nheads, first_head, padded, Q, BLOCKS, num_warps
            )
        row_factor = row_smem.index(slot).load(rows)[:, None]
        col_factor = col_smem.index(slot).load(cols)[None, :]
        s = s_smem.index(slot).load(cols)[None, :]
        if DIAGONAL:
            decay = gl.exp2(gl.minimum(row_factor - col_factor, 0.0))
        else:
            decay = row_factor * col_factor
        block = turn % BLOCKS
        product = warpgroup_mma_wait(0, deps=[product])
        here = (block * nheads + h).to(gl.int64) * padded + first_chunk * Q
        if DIAGONAL:
            gl.store(products + here + m * Q + q_row, gl.sum(product * eye, 1))
            if VECTOR_D:
                wide = (v.load(mma).to(gl.float32)) * (o.load(mma).to(gl.float32))
                target = dD + (((first_chunk + m) * nheads + h) * BLOCKS + block).to(gl.int64) * P
                gl.store(target + gl.arange(0, P, layout=cols), gl.sum(wide, 0))
        product = product * decay
        total += product * s
        product = product * weights
        gl.store(reads + j * pieces + here + m * Q + q_row, gl.sum(product * s, 1))
        # Rows that a thread holds are added here, the others a turn later, when every warp has come to the barrier. By
        # shuffles, all at once, this took a ninth of the kernel's time.
        part_smem.index(slot).store(gl.sum(product.reshape([num_warps, 2, 8, Q]), 1).reshape([8 * num_warps, Q]))
    thread_barrier()
    last = turns - 1
    store_columns(dscale_m, part_smem.index(last % 2), last, nheads, first_head, padded, Q, BLOCKS, num_warps)
    if DIAGONAL:
        total = gl.where(i_row >= i_col, total, 0.0)
    target = squares + square.to(gl.int64) * Q * Q
    gl.store(target + i_row * Q + i_col, total)


# One head a program is a loop of one turn, which the compiler unrolls and then crashes at.
@gluon.jit(do_not_specialize=["heads_per_program"])
def gradient_hopper_kernel(
    x, dy, B, C, S, G, totals, squares, reads, dscale, from_state, into_state, products, overlaps, dD, scale, sums,
    supers, totals_l, totals_side, nheads, ngroups, heads_per_group, heads_per_program, headdim, d_state, seqlen,
    padded,
    Q: gl.constexpr, N: gl.constexpr, HALVES: gl.constexpr, P: gl.constexpr, BLOCKS: gl.constexpr,
    EVERY: gl.constexpr, RAGGED: gl.constexpr, VECTOR_D: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid `(super-chunks * programs of one, groups * parts)`; d_state is N * HALVES.

    `totals` is (2, parts, tokens, groups * d_state), for dC and dB; `squares` (parts, groups, super-chunks, pairs, Q,
    Q). `reads` has a slice for each j and `dscale` one for each m: `(EVERY * BLOCKS, heads, tokens)`; so large are,
    without EVERY, `from_state` and `into_state` (HALVES * BLOCKS) and `products` (BLOCKS).
    """
    STATES: gl.constexpr = 2 * EVERY * HALVES
    PAIRS: gl.constexpr = EVERY * (EVERY + 1) // 2
    super_chunk = gl.program_id(0) // (STATES + PAIRS)
    kind = gl.program_id(0) % (STATES + PAIRS)
    parts = heads_per_group // heads_per_program
    group = gl.program_id(1) // parts
    part = gl.program_id(1) % parts
    first = gl.load(supers + super_chunk * 4 + 1)
    row = gl.load(supers + super_chunk * 4) * seqlen + first
    length = gl.load(supers + super_chunk * 4 + 2) - first
    first_chunk = gl.load(supers + super_chunk * 4 + 3)
    count = gl.minimum(gl.cdiv(length, Q), EVERY)
    if kind < STATES:
        m = kind // (2 * HALVES)
        n_first = (kind % HALVES) * N
        if m < count:
            if (kind // HALVES) % 2 == 0:
                state_program(
                    dy, C, S, totals, from_state, scale, sums, row + m * Q, first_chunk, m, count, super_chunk, group,
                    part, n_first, totals_l, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
                    Q, N, P, BLOCKS, EVERY, False, num_warps,
                )  # fmt: skip
            else:
                state_program(
                    x, B, G, totals + totals_side, into_state, scale, sums, row + m * Q, first_chunk, m, count,
                    super_chunk, group, part, n_first, totals_l, nheads, heads_per_group, heads_per_program, headdim,
                    d_state, padded,
                    Q, N, P, BLOCKS, EVERY, True, num_warps,
                )  # fmt: skip
    else:
        pair = kind - STATES
        m = 0
        for k in gl.static_range(1, EVERY):
            m += gl.where(pair >= k * (k + 1) // 2, 1, 0)
        j = pair - m * (m + 1) // 2
        square = ((part * ngroups + group) * (gl.num_programs(0) // (STATES + PAIRS)) + super_chunk) * PAIRS + pair
        if m < count:
            if m == j:
                pair_program(
                    x, dy, B, C, squares, reads, dscale, products, overlaps, dD, scale, sums, row, first_chunk, m, j,
                    length, square, group, part, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
                    Q, N, HALVES, P, BLOCKS, EVERY, True, RAGGED, VECTOR_D, num_warps,
                )  # fmt: skip
            else:
                pair_program(
                    x, dy, B, C, squares, reads, dscale, products, overlaps, dD, scale, sums, row, first_chunk, m, j,
                    length, square, group, part, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
                    Q, N, HALVES, P, BLOCKS, EVERY, False, RAGGED, VECTOR_D, num_warps,
                )  # fmt: skip


@triton.jit
def finish_side(
    totals, squares, key, out, batch, first, end, first_chunk, own, count, group, super_chunk, n_first, totals_l,
    key_b, key_l, key_h, out_b, out_l, out_h, d_state, padded, parts, square_part,
    Q: tl.constexpr, N: tl.constexpr, EVERY: tl.constexpr, ADD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """One chunk's dC, or with REVERSE dB: what came from states, and the pairs' weights times B, or C."""
    q, n = tl.arange(0, Q), tl.arange(0, N)
    columns = n_first + n
    total = tl.zeros([Q, N], tl.float32)
    for part in range(parts):
        line = part.to(tl.int64) * padded + (first_chunk + own) * Q + q
        total += tl.load(totals + line[:, None] * totals_l + group * d_state + columns[None, :])
    for other in range(own if REVERSE else 0, count if REVERSE else own + 1):
        m, j = (other, own) if REVERSE else (own, other)
        square = squares + ((super_chunk * (EVERY * (EVERY + 1) // 2) + m * (m + 1) // 2 + j) * Q * Q).to(tl.int64)
        weights = tl.zeros([Q, Q], tl.float32)
        for part in range(parts):
            here = square + part.to(tl.int64) * square_part
            if REVERSE:
                weights += tl.load(here + q[None, :] * Q + q[:, None])
            else:
                weights += tl.load(here + q[:, None] * Q + q[None, :])
        rows = first + other * Q + q
        place = key + batch.to(tl.int64) * key_b + rows.to(tl.int64)[:, None] * key_l + group * key_h
        k = tl.load(place + columns[None, :], mask=(rows < end)[:, None], other=0.0)
        # In two parts: the rounding of the sum over heads costs nothing to keep.
        high = weights.to(k.dtype)
        total = tl.dot(high, k, total)
        total = tl.dot((weights - high.to(tl.float32)).to(k.dtype), k, total)
    rows = first + own * Q + q
    here = out + batch.to(tl.int64) * out_b + rows.to(tl.int64)[:, None] * out_l + group * out_h + columns[None, :]
    mask = (rows < end)[:, None] & (n >= 0)[None, :]
    if ADD:
        total += tl.load(here, mask=mask, other=0.0)
    tl.store(here, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def finish_kernel(
    totals, squares, B, C, dB, dC, supers, totals_l, B_b, B_l, B_h, C_b, C_l, C_h, dB_b, dB_l, dB_h, dC_b, dC_l, dC_h,
    totals_side, square_part, d_state, padded, parts,
    Q: tl.constexpr, N: tl.constexpr, HALVES: tl.constexpr, EVERY: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Puts together dC and dB. Grid `(super-chunks * EVERY, groups * HALVES, 2)`; ADD adds to what is there."""
    super_chunk, own = tl.program_id(0) // EVERY, tl.program_id(0) % EVERY
    group, n_first = tl.program_id(1) // HALVES, (tl.program_id(1) % HALVES) * N
    supers_all = tl.num_programs(0) // EVERY
    batch = tl.load(supers + super_chunk * 4)
    first = tl.load(supers + super_chunk * 4 + 1)
    end = tl.load(supers + super_chunk * 4 + 2)
    first_chunk = tl.load(supers + super_chunk * 4 + 3)
    count = tl.minimum(tl.cdiv(end - first, Q), EVERY)
    squares += (group.to(tl.int64) * supers_all) * (EVERY * (EVERY + 1) // 2) * Q * Q
    if own < count:
        if tl.program_id(2) == 0:
            finish_side(
                totals, squares, B, dC, batch, first, end, first_chunk, own, count, group, super_chunk, n_first,
                totals_l, B_b, B_l, B_h, dC_b, dC_l, dC_h, d_state, padded, parts, square_part,
                Q, N, EVERY, ADD, False,
            )  # fmt: skip
        else:
            finish_side(
                totals + totals_side, squares, C, dB, batch, first, end, first_chunk, own, count, group, super_chunk,
                n_first, totals_l, C_b, C_l, C_h, dB_b, dB_l, dB_h, d_state, padded, parts, square_part,
                Q, N, EVERY, ADD, True,
            )  # fmt: skip
