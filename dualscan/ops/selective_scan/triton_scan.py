# ruff: noqa: RUF005 (Triton's tuples can be added, not unpacked)
"""The selective scan on a GPU: a thread walks through a sequence with one channel, all its sums in registers.

A tile of ROWS tokens is loaded at once, so that a thread has all rows of its channel and the recurrence needs no
exchange. The loop over the N states is inside: a state is read, taken through the rows and written back, to memory of
which a program uses a few kilobytes again and again. So any N runs by the same code, and registers hold only what is
one number a token and channel. B and C come packed (`triton_tiles`).

Few warps fit beside so many registers, so nobody else works while one waits for memory. Therefore all that a tile needs
is read once while the tile before is finished (`touch`), and comes from the first-level cache then.

Sequences are cut into segments (`_triton.Plan`) where they alone would not fill the multiprocessors. Then a scan from
zero states gives every segment's own contribution and the sum of its Δ, `combine_kernel` joins them, because

    h(end) = exp(A ΣΔ) h(start) + (what the segment adds),

and the scan runs again from the right states. The gradients of the states obey the same rule from the end to the start.

Where a gradient will be asked for, the forward keeps the states in front of every `configs.KEPT` tokens, a super-tile.
The backward takes the super-tiles in reverse: it runs forward once more to find the states in front of each tile, then
takes the tiles in reverse: their states again, for one n after the other, and with them every gradient, as
`chunked.backward` does. dB and dC are sums over channels, of 32 numbers of each lane at a time (`fold`).
Warps of a program add theirs up after a tile, programs theirs at last, in a fixed order. There are no atomics.

A kernel is compiled for the number of channels and the distances of tokens in memory, which saves a tenth of its
instructions: the rows' addresses are then one, with distances that are part of the instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher
from dualscan.ops.selective_scan import configs, triton_tiles
from dualscan.ops.selective_scan.triton_tiles import (
    SEGMENT,
    load_rows,
    load_vector,
    multiply_rows,
    packed_rows,
    place,
    step_rows,
    through_gate,
    touch_states,
    write_sums,
)
from dualscan.ops.triton_common import (
    LANES,
    LOG2E,
    fold_half_warps,
    fold_products,
    keep_touched,
    sigmoid,
    silu_slope,
    touch,
)

LN2 = tl.constexpr(0.6931471805599453)
# Fields of a state's record in the backward, after its rates; the states in front of tiles are the last.
GRADIENT, DRATE, FIELDS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
COMBINED = 128  # channels of a program that joins segments
MOST = 4096  # programs of the backward at a time, because each has memory of its own
PART = 4  # rows of B and C that the backward has in registers at a time
_STRIDES = ["dt_b", "x_b", "z_b", "dy_b"]
_SIZES = ["seqlen", "ngroups", "n_states", "padded"]


@triton.jit(do_not_specialize=_STRIDES[:3] + _SIZES)
def scan_kernel(
    dt, x, z, rates, packed, D, bias, segments, states, totals, kept, y,
    dt_b: tl.int64, x_b: tl.int64, z_b: tl.int64,
    seqlen: tl.int32, ngroups: tl.int32, n_states: tl.int32, padded: tl.int32,
    dt_l: tl.constexpr, x_l: tl.constexpr, z_l: tl.constexpr, channels: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, EVERY: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr,
    TOTAL: tl.constexpr, REVERSE: tl.constexpr, WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Takes `states` (segment, n, channel) through their segments, in place. Grid `blocks x groups x segments`.

    OUTPUT writes y, KEEP the states in front of every EVERY-th tile (super-tile, n, channel), TOTAL the segments' sums
    of Δ (segment, channel). With REVERSE, `states` are the gradients of the states after the segments and become those
    before them; x is dy then.
    """
    number = tl.program_id(0)
    segment, row, begin, end, tile, long, _, group, edge, width = place(number, segments, channels, ngroups, BLOCK)
    c, inside, wide = edge + tl.arange(0, BLOCK), tl.full([BLOCK], True, tl.int1), seqlen.to(tl.int64) * channels
    if not WHOLE:
        inside = tl.arange(0, BLOCK) < width
    dt, x, y = dt + row * dt_b, x + row * x_b, y + row * wide
    GATE: tl.constexpr = HAS_Z and (OUTPUT or REVERSE)
    if GATE:
        z += row * z_b
    states += segment * n_states * channels
    shift, skip = load_vector(bias, c, inside, HAS_BIAS), load_vector(D, c, inside, HAS_D)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.cdiv(end - begin, ROWS)
    for i in range(count):
        j, step = i, 1
        if REVERSE:
            j, step = count - 1 - i, -1
        first = begin + j * ROWS
        raw = load_rows(dt, first, end, dt_l, c, inside, ROWS, WHOLE)
        values = load_rows(x, first, end, x_l, c, inside, ROWS, WHOLE)
        delta = step_rows(raw, shift, first, end, inside, ROWS, SOFTPLUS, WHOLE)
        gates = values
        if REVERSE:
            if GATE:
                gates = load_rows(z, first, end, z_l, c, inside, ROWS, WHOLE)
            inputs = through_gate(values, gates, ROWS, GATE)
        else:
            inputs = multiply_rows(delta, values, ROWS)
        sums = ()
        for u in tl.static_range(ROWS):
            sums = sums + (skip * values[u].to(tl.float32),)
        columns = packed + ((tile + j) * ngroups + group) * padded * (2 * ROWS)
        if TOTAL:
            for u in tl.static_range(ROWS):
                total += delta[u]
        if KEEP and j % EVERY == 0:
            keep = kept + (long + j // EVERY) * n_states * channels + c
            for n in range(n_states):
                h = tl.load(states + n * channels + c, mask=inside, other=0.0)
                tl.store(keep + n * channels, h, mask=inside)
        for n in range(n_states):
            rate = tl.load(rates + n * channels + c, mask=inside, other=0.0)
            h = tl.load(states + n * channels + c, mask=inside, other=0.0)
            if REVERSE:
                reads = packed_rows(columns + (n * 2 + 1) * ROWS, ROWS, (BLOCK,))
                for u in tl.static_range(ROWS - 1, -1, -1):
                    h = tl.fma(inputs[u], reads[u], h) * tl.exp2(delta[u] * rate)
            else:
                writes = packed_rows(columns + n * (2 * ROWS), ROWS, (BLOCK,))
                new = ()
                for u in tl.static_range(ROWS):
                    h = tl.fma(tl.exp2(delta[u] * rate), h, inputs[u] * writes[u])
                    new = new + (h,)
                if OUTPUT:
                    reads, read = packed_rows(columns + (n * 2 + 1) * ROWS, ROWS, (BLOCK,)), ()
                    for u in tl.static_range(ROWS):
                        read = read + (tl.fma(reads[u], new[u], sums[u]),)
                    sums = read
            tl.store(states + n * channels + c, h, mask=inside)
        tl.debug_barrier()
        # What the next tile needs goes to the cache while this one is finished.
        after, lines = first + step * ROWS, tl.where(i + 1 < count, n_states, 0)
        columns = packed + ((tile + j + step) * ngroups + group) * padded * (2 * ROWS)
        touched = (touch_states(columns, lines, 2 * ROWS, 2 * ROWS, 2 * ROWS),)
        touched = touched + (touch(dt, after, begin, end, dt_l, edge, width, ROWS, BLOCK),)
        touched = touched + (touch(x, after, begin, end, x_l, edge, width, ROWS, BLOCK),)
        if GATE:
            touched = touched + (touch(z, after, begin, end, z_l, edge, width, ROWS, BLOCK),)
        if OUTPUT:
            if HAS_Z:
                gates = load_rows(z, first, end, z_l, c, inside, ROWS, WHOLE)
            out = y + first.to(tl.int64) * channels + c
            for u in tl.static_range(ROWS):
                result, live = sums[u], inside
                if HAS_Z:
                    gate = gates[u].to(tl.float32)
                    result *= gate * sigmoid(gate)
                if not WHOLE:
                    live = inside & (first + u < end)
                tl.store(out + u * channels, result.to(y.dtype.element_ty), mask=live)
        keep_touched(states, touched, n_states)
    if TOTAL:
        tl.store(totals + segment * channels + c, total, mask=inside)


@triton.jit(do_not_specialize=["channels", "n_states"])
def combine_kernel(
    sequences, states, totals, rates, carried,
    channels: tl.int32, n_states: tl.int32, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Joins segments: `states` (segment, n, channel) are what each adds to the state after it, and become the state in
    front of it; `carried` (sequence, n, channel) goes from the first to the last (REVERSE: the other way round, for the
    gradients). Grid `blocks of channels x states x sequences`."""
    blocks = tl.cdiv(channels, BLOCK)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    n = (tl.program_id(0) // blocks) % n_states
    sequence = (tl.program_id(0) // (blocks * n_states)).to(tl.int64)
    wide, inside = channels.to(tl.int64), c < channels
    first, count = tl.load(sequences + sequence * 2), tl.load(sequences + sequence * 2 + 1)
    rate = tl.load(rates + n * wide + c, mask=inside, other=0.0)
    h = tl.load(carried + (sequence * n_states + n) * wide + c, mask=inside, other=0.0)
    for i in range(count):
        segment = (first + i).to(tl.int64)
        if REVERSE:
            segment = (first + count - 1 - i).to(tl.int64)
        own = states + (segment * n_states + n) * wide + c
        added = tl.load(own, mask=inside, other=0.0)
        total = tl.load(totals + segment * wide + c, mask=inside, other=0.0)
        tl.store(own, h, mask=inside)
        h = tl.fma(tl.exp2(rate * total), h, added)
    tl.store(carried + (sequence * n_states + n) * wide + c, h, mask=inside)


@triton.jit(do_not_specialize=_STRIDES + _SIZES + ["tiles", "number"])
def gradient_kernel(
    dt, x, z, dy, rates, packed, D, bias, segments, kept, g, records, dx, ddt, dz, drates, partial, dD, dbias,
    dt_b: tl.int64, x_b: tl.int64, z_b: tl.int64, dy_b: tl.int64,
    seqlen: tl.int32, ngroups: tl.int32, n_states: tl.int32, padded: tl.int32, tiles: tl.int32,
    number: tl.int32,
    dt_l: tl.constexpr, x_l: tl.constexpr, z_l: tl.constexpr, dy_l: tl.constexpr, channels: tl.constexpr,
    WARPS: tl.constexpr, ROWS: tl.constexpr, EVERY: tl.constexpr, PART: tl.constexpr, WHOLE: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A segment with 32 channels a warp, its tiles in reverse. Grid: of `blocks x groups x segments` those from the
    one of that number on for which there are records.

    `g` (segment, n, channel) goes in as the gradient of the states after the segments and comes out as that of the
    states before them. `kept` are the states in front of super-tiles of EVERY tiles. dB and dC go to `partial` (block,
    tile, group, n, dB or dC, row); drates, dD and dbias have a part for every segment.

    What a program reads and writes again and again is in its `records` (program, n, field, channel): the fields of a
    state are its rates, the gradient, the rates' gradients, and the states in front of EVERY tiles, in whose place a
    tile's dB and dC come.
    """
    BLOCK: tl.constexpr = WARPS * LANES
    STRIDE: tl.constexpr = (FIELDS + EVERY) * BLOCK
    UNIT: tl.constexpr = 16 // ROWS
    HALF: tl.constexpr = UNIT // 2
    number += tl.program_id(0)
    segment, row, begin, end, tile, long, block, group, edge, width = place(number, segments, channels, ngroups, BLOCK)
    lane = tl.broadcast_to(tl.arange(0, LANES)[None, :], [WARPS, LANES])
    warp = tl.broadcast_to(tl.arange(0, WARPS)[:, None], [WARPS, LANES])
    own, wide = warp * LANES + lane, row * seqlen * channels
    c, inside = edge + own, tl.full([WARPS, LANES], True, tl.int1)
    if not WHOLE:
        inside = own < width
    dt, x, dy, dx, ddt = dt + row * dt_b, x + row * x_b, dy + row * dy_b, dx + wide, ddt + wide
    if HAS_Z:
        z, dz = z + row * z_b, dz + wide
    records += tl.program_id(0).to(tl.int64) * padded * STRIDE
    record = records + own
    g, drates = g + segment * n_states * channels + c, drates + segment * n_states * channels + c
    partial += block.to(tl.int64) * tiles * ngroups * padded * (2 * ROWS)
    shift, skip = load_vector(bias, c, inside, HAS_BIAS), load_vector(D, c, inside, HAS_D)
    dskip, dshift = tl.zeros([WARPS, LANES], tl.float32), tl.zeros([WARPS, LANES], tl.float32)
    for n in range(padded):
        known = inside & (n < n_states)
        tl.store(record + n * STRIDE, tl.load(rates + n * channels + c, mask=known, other=0.0))
        tl.store(record + n * STRIDE + GRADIENT * BLOCK, tl.load(g + n * channels, mask=known, other=0.0))
        tl.store(record + n * STRIDE + DRATE * BLOCK, tl.zeros([WARPS, LANES], tl.float32))
    longs = tl.cdiv(end - begin, ROWS * EVERY)
    for k in range(longs):
        s = longs - 1 - k
        count = tl.minimum(tl.cdiv(end - begin, ROWS) - s * EVERY, EVERY)
        starts = kept + (long + s) * n_states * channels + c
        for n in range(padded):
            h = tl.load(starts + n * channels, mask=inside & (n < n_states), other=0.0)
            tl.store(record + n * STRIDE + FIELDS * BLOCK, h)
        for j in range(count - 1):
            first = begin + (s * EVERY + j) * ROWS
            raw = load_rows(dt, first, end, dt_l, c, inside, ROWS, WHOLE)
            values = load_rows(x, first, end, x_l, c, inside, ROWS, WHOLE)
            delta = step_rows(raw, shift, first, end, inside, ROWS, SOFTPLUS, WHOLE)
            inputs = multiply_rows(delta, values, ROWS)
            columns = packed + ((tile + s * EVERY + j) * ngroups + group) * padded * (2 * ROWS)
            here = record + (FIELDS + j) * BLOCK
            for n in range(0, padded, UNIT):
                states, at, start = (), record + n * STRIDE, here + n * STRIDE
                line = columns + n * (2 * ROWS)
                for v in tl.static_range(UNIT):
                    rate, h = tl.load(at + v * STRIDE), tl.load(start + v * STRIDE)
                    writes = packed_rows(line + v * (2 * ROWS), ROWS, (WARPS, LANES))
                    for u in tl.static_range(ROWS):
                        h = tl.fma(tl.exp2(delta[u] * rate), h, inputs[u] * writes[u])
                    states = states + (h,)
                for v in tl.static_range(UNIT):
                    tl.store(start + v * STRIDE + BLOCK, states[v])
            after = first + ROWS
            columns += ngroups * padded * (2 * ROWS)
            touched = (touch_states(columns, padded, 2 * ROWS, 2 * ROWS, 2 * ROWS),)
            touched = touched + (touch(dt, after, begin, end, dt_l, edge, width, ROWS, BLOCK),)
            touched = touched + (touch(x, after, begin, end, x_l, edge, width, ROWS, BLOCK),)
            if j == count - 2:
                last = (touch(dy, after, begin, end, dy_l, edge, width, ROWS, BLOCK),)
                if HAS_Z:
                    last = last + (touch(z, after, begin, end, z_l, edge, width, ROWS, BLOCK),)
                keep_touched(records, last, n_states)
            keep_touched(records, touched, n_states)
        for i in range(count):
            j = s * EVERY + count - 1 - i
            first = begin + j * ROWS
            raw = load_rows(dt, first, end, dt_l, c, inside, ROWS, WHOLE)
            values = load_rows(x, first, end, x_l, c, inside, ROWS, WHOLE)
            outer = load_rows(dy, first, end, dy_l, c, inside, ROWS, WHOLE)
            gates = outer
            if HAS_Z:
                gates = load_rows(z, first, end, z_l, c, inside, ROWS, WHOLE)
            delta = step_rows(raw, shift, first, end, inside, ROWS, SOFTPLUS, WHOLE)
            inputs, ds = multiply_rows(delta, values, ROWS), through_gate(outer, gates, ROWS, HAS_Z)
            sums, dinputs, ddelta = (), (), ()
            for _ in tl.static_range(ROWS):
                sums = sums + (tl.zeros([WARPS, LANES], tl.float32),)
                dinputs = dinputs + (tl.zeros([WARPS, LANES], tl.float32),)
                ddelta = ddelta + (tl.zeros([WARPS, LANES], tl.float32),)
            matrix = ((tile + j) * ngroups + group) * padded * (2 * ROWS)
            front = (FIELDS + count - 1 - i) * BLOCK
            for n in range(0, padded, UNIT):
                decays, states, at, start = (), (), record + n * STRIDE, record + front + n * STRIDE
                unit = packed + matrix + n * (2 * ROWS)
                for v in tl.static_range(UNIT):
                    rate, h = tl.load(at + v * STRIDE), tl.load(start + v * STRIDE)
                    writes = packed_rows(unit + v * (2 * ROWS), ROWS, (WARPS, LANES))
                    states = states + (h,)
                    for u in tl.static_range(ROWS):
                        decays = decays + (tl.exp2(delta[u] * rate),)
                        h = tl.fma(decays[v * ROWS + u], h, inputs[u] * writes[u])
                        states = states + (h,)
                gradients, ends = (), ()
                for v in tl.static_range(UNIT):
                    rate, line = tl.load(at + v * STRIDE), unit + v * (2 * ROWS)
                    gradient = tl.load(at + v * STRIDE + GRADIENT * BLOCK)
                    drate = tl.load(at + v * STRIDE + DRATE * BLOCK)
                    writes = packed_rows(line + (ROWS - PART), PART, (WARPS, LANES))
                    reads = packed_rows(line + (2 * ROWS - PART), PART, (WARPS, LANES))
                    new_gradients, new_sums, new_dinputs, new_ddelta = (), (), (), ()
                    for u in tl.static_range(ROWS - 1, -1, -1):
                        if u % PART == PART - 1 and u != ROWS - 1:  # a part of B and C: registers are short
                            writes = packed_rows(line + (u + 1 - PART), PART, (WARPS, LANES))
                            reads = packed_rows(line + (ROWS + u + 1 - PART), PART, (WARPS, LANES))
                        gradient = tl.fma(ds[u], reads[u % PART], gradient)
                        new_gradients = (gradient,) + new_gradients
                        if HAS_Z:
                            new_sums = (tl.fma(reads[u % PART], states[v * (ROWS + 1) + u + 1], sums[u]),) + new_sums
                        new_dinputs = (tl.fma(gradient, writes[u % PART], dinputs[u]),) + new_dinputs
                        gradient *= decays[v * ROWS + u]
                        through = gradient * states[v * (ROWS + 1) + u]
                        new_ddelta = (tl.fma(through, rate, ddelta[u]),) + new_ddelta
                        drate = tl.fma(through, delta[u], drate)
                    if HAS_Z:
                        sums = new_sums
                    dinputs, ddelta = new_dinputs, new_ddelta
                    gradients, ends = gradients + new_gradients, ends + (gradient, drate)
                # Half of the lanes go on with the first states' dB and dC, half with those of the states HALF after.
                total = ()
                for v in tl.static_range(HALF):
                    for u in tl.static_range(ROWS):
                        a, b = gradients[v * ROWS + u], gradients[(v + HALF) * ROWS + u]
                        total = total + (fold_products(a, b, inputs[u], lane, 16),)
                    for u in tl.static_range(ROWS):
                        a, b = states[v * (ROWS + 1) + u + 1], states[(v + HALF) * (ROWS + 1) + u + 1]
                        total = total + (fold_products(a, b, ds[u], lane, 16),)
                for v in tl.static_range(UNIT):
                    tl.store(at + v * STRIDE + GRADIENT * BLOCK, ends[2 * v])
                    tl.store(at + v * STRIDE + DRATE * BLOCK, ends[2 * v + 1])
                tl.store(start, fold_half_warps(total, lane))
            tl.debug_barrier()
            write_sums(records + front, partial + matrix, padded // UNIT, UNIT * STRIDE, WARPS)
            # The first token is read again, because the rows' addresses would be kept through the loop otherwise.
            first = tl.load(segments + segment * SEGMENT + 1) + j * ROWS
            # Next comes the tile before, or the first one of the super-tile before.
            back = tl.where(i + 1 < count, 1, EVERY)
            after, lines = first - back * ROWS, tl.where(j >= back, padded, 0)
            columns = packed + matrix - back * ngroups * padded * (2 * ROWS)
            touched = (touch_states(columns, lines, 2 * ROWS, 2 * ROWS, 2 * ROWS),)
            touched = touched + (touch(dt, after, begin, end, dt_l, edge, width, ROWS, BLOCK),)
            touched = touched + (touch(x, after, begin, end, x_l, edge, width, ROWS, BLOCK),)
            touched = touched + (touch(dy, after, begin, end, dy_l, edge, width, ROWS, BLOCK),)
            if HAS_Z:
                touched = touched + (touch(z, after, begin, end, z_l, edge, width, ROWS, BLOCK),)
            # What only the end needs is read again, too.
            values = load_rows(x, first, end, x_l, c, inside, ROWS, WHOLE)
            if SOFTPLUS:
                raw = load_rows(dt, first, end, dt_l, c, inside, ROWS, WHOLE)
            if HAS_Z:
                gates = load_rows(z, first, end, z_l, c, inside, ROWS, WHOLE)
                outer = load_rows(dy, first, end, dy_l, c, inside, ROWS, WHOLE)
            out = first.to(tl.int64) * channels + c
            for u in tl.static_range(ROWS):
                live, value, to = inside, values[u].to(tl.float32), out + u * channels
                if not WHOLE:
                    live = inside & (first + u < end)
                if HAS_Z:
                    gate = gates[u].to(tl.float32)
                    slope = silu_slope(gate, sigmoid(gate))
                    dgate = outer[u].to(tl.float32) * tl.fma(skip, value, sums[u]) * slope
                    tl.store(dz + to, dgate.to(dz.dtype.element_ty), mask=live)
                tl.store(dx + to, tl.fma(dinputs[u], delta[u], ds[u] * skip).to(dx.dtype.element_ty), mask=live)
                dskip = tl.fma(ds[u], value, dskip)
                size = tl.fma(dinputs[u], value, ddelta[u] * LN2)  # the rates are in powers of two
                if SOFTPLUS:
                    size *= sigmoid(raw[u].to(tl.float32) + shift)
                    if not WHOLE:
                        size = tl.where(live, size, 0.0)
                dshift += size
                tl.store(ddt + to, size.to(ddt.dtype.element_ty), mask=live)
            keep_touched(records, touched, n_states)
            if WARPS > 1:
                tl.debug_barrier()
    for n in range(n_states):
        tl.store(g + n * channels, tl.load(record + n * STRIDE + GRADIENT * BLOCK), mask=inside)
        tl.store(drates + n * channels, tl.load(record + n * STRIDE + DRATE * BLOCK), mask=inside)
    tl.store(dD + segment * channels + c, dskip, mask=inside)
    tl.store(dbias + segment * channels + c, dshift, mask=inside)


_scan, _combine, _gradient = Launcher(scan_kernel), Launcher(combine_kernel), Launcher(gradient_kernel)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_states: Tensor | None, cu_seqlens: Tensor | None, dt_softplus: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`y`, the final states, and to `keep` the states of `configs.kept_states`; the rest is as in `chunked.forward`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with _triton.on_device(x):
        call = _Call(configs.FORWARD, x, dt, A, B, C, D, z, dt_bias, cu_seqlens, dt_softplus)
        carried, kept = call.states(initial_states), call.kept() if keep else None
        call.run(carried, y, kept)
    return y, carried.transpose(1, 2).contiguous(), x.new_empty(0, dtype=torch.float32) if kept is None else kept


def backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    kept: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of all tensors but cu_seqlens, in their order; an empty tensor for an argument that was None.

    `kept` are the states that the forward kept; of no elements, they are computed again.
    """
    dy = torch.zeros_like(x) if dy is None else _triton.rows_last(dy)
    gradients = [torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (x, dt, B, C)]
    dx, ddt, dB, dC = gradients
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=x.device)
    with _triton.on_device(x):
        call = _Call(configs.BACKWARD, x, dt, A, B, C, D, z, dt_bias, cu_seqlens, dt_softplus)
        if not kept.numel():
            kept = call.kept()
            call.run(call.states(initial_states), None, kept)
        g = dinitial = call.states(dfinal)
        if call.plan.split:
            g, totals = call.segment_states(), call.totals()
            call.scan(dy, g, totals=totals, reverse=True)
            call.combine(g, totals, dinitial, reverse=True)
        drates, dD, dbias, partial = call.gradient(dy, kept, g, dx, ddt, dz)
        triton_tiles.unpack(partial, call.plan, dB, dC)
    return (
        *(dx, ddt, drates.sum(0).t().to(A.dtype).contiguous(), dB, dC),
        x.new_empty(0) if D is None else dD.sum(0).to(D.dtype),
        x.new_empty(0) if dz is None else dz,
        x.new_empty(0) if dt_bias is None else dbias.sum(0).to(dt_bias.dtype),
        x.new_empty(0) if initial_states is None else dinitial.transpose(1, 2).to(initial_states.dtype).contiguous(),
    )


class _Call:
    """What all launches of a pass have in common; A, B and C are brought into the kernels' order."""

    def __init__(
        self,
        tile: configs.Tile,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
    ):
        (batch, seqlen, channels), self.ngroups, self.d_state = x.shape, B.shape[2], A.shape[1]
        self.tile, self.D, self.dt_bias, self.dt_softplus = tile, D, dt_bias, dt_softplus
        self.x, self.dt = _triton.rows_last(x), _triton.rows_last(dt)
        self.z = None if z is None else _triton.rows_last(z)
        self.nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.blocks, self.every = _triton.cdiv(channels // self.ngroups, tile.channels), configs.KEPT // tile.rows
        warps = self.blocks * self.ngroups * tile.warps
        segment = tile.segment(warps, _triton.multiprocessors(x.device), batch, seqlen)
        self.plan = _triton.plan(cu_seqlens, batch, seqlen, tile.rows, self.every, segment, x.device)
        self.rates = (A.float() * LOG2E.value).t().contiguous()
        unit = max(16 // tile.rows, 1)  # states that the backward takes at once
        self.padded = _triton.cdiv(self.d_state, unit) * unit
        self.packed = triton_tiles.pack(B, C, self.plan, tile.rows, self.padded)
        self.nsegments, self.tiles = self.plan.segments.shape[0], self.plan.chunks.shape[0]
        self.programs = self.blocks * self.ngroups * self.nsegments
        whole = not (self.plan.ragged or seqlen % tile.rows or channels // self.ngroups % tile.channels)
        self.given = (whole, dt_softplus, z is not None, D is not None, dt_bias is not None)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.x.device)

    def states(self, initial: Tensor | None) -> Tensor:
        """States (sequence, n, channel) in fresh memory, which kernels change in place; None is zero."""
        states = self._empty(self.nseq, self.d_state, self.x.shape[2])
        return states.zero_() if initial is None else states.copy_(initial.transpose(1, 2))

    def segment_states(self) -> Tensor:
        """Zeros (segment, n, channel)."""
        return self._empty(self.nsegments, self.d_state, self.x.shape[2]).zero_()

    def totals(self) -> Tensor:
        """Memory for the sums of Δ (segment, channel)."""
        return self._empty(self.nsegments, self.x.shape[2])

    def kept(self) -> Tensor:
        """Memory for the states in front of super-tiles (super-tile, n, channel), of which packs may not have all."""
        kept = self._empty(self.plan.supers.shape[0], self.d_state, self.x.shape[2])
        return kept.zero_() if self.plan.ragged else kept

    def run(self, carried: Tensor, y: Tensor | None, kept: Tensor | None) -> None:
        """The whole scan: `carried` (sequence, n, channel) becomes the final states; fills what else is given."""
        starts = carried
        if self.plan.split:
            starts, totals = self.segment_states(), self.totals()
            self.scan(self.x, starts, totals=totals)
            self.combine(starts, totals, carried)
        self.scan(self.x, starts, y=y, kept=kept)

    def scan(
        self,
        values: Tensor,
        states: Tensor,
        *,
        y: Tensor | None = None,
        totals: Tensor | None = None,
        kept: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """`scan_kernel` on `states`, for those of the results that are given; `values` is x, or dy for the reverse."""
        if not values.numel():
            return
        steps = self._strides(self.dt, values, self.z)
        _scan(
            (self.programs, 1, 1),
            (*(self.dt, values, self.z, self.rates, self.packed, self.D, self.dt_bias, self.plan.segments, states),
             *(states if t is None else t for t in (totals, kept, y))),
            (*steps[0], *self._sizes()),
            (*steps[1], self.x.shape[2], self.tile.channels, self.tile.rows, self.every,
             *(t is not None for t in (y, kept, totals)), reverse, *self.given),
            self.tile.warps,
            self.tile.registers,
        )  # fmt: skip

    def combine(self, states: Tensor, totals: Tensor, carried: Tensor, reverse: bool = False) -> None:
        """`combine_kernel`: `states` become those in front of the segments, `carried` goes through all."""
        if not self.x.numel():
            return
        channels = self.x.shape[2]
        grid = (_triton.cdiv(channels, COMBINED) * self.d_state * self.nseq, 1, 1)
        tensors = (self.plan.sequences, states, totals, self.rates, carried)
        _combine(grid, tensors, (channels, self.d_state), (COMBINED, reverse), 1)

    def gradient(
        self, dy: Tensor, kept: Tensor, g: Tensor, dx: Tensor, ddt: Tensor, dz: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`gradient_kernel`: fills dx, ddt and dz, and returns the parts of dA, of dD, of dt_bias' and of dB and dC."""
        channels, rows, warps = self.x.shape[2], self.tile.rows, self.tile.warps
        records = self._empty(min(self.programs, MOST), self.padded, FIELDS.value + self.every, self.tile.channels)
        drates = self._empty(self.nsegments, self.d_state, channels)
        dD, dbias = self._empty(2, self.nsegments, channels)
        partial = self._empty(self.blocks, self.tiles, self.ngroups, self.padded, 2, rows)
        steps = self._strides(self.dt, self.x, self.z, dy)
        for first in range(0, self.programs, MOST):
            _gradient(
                (min(self.programs - first, MOST), 1, 1),
                (*(self.dt, self.x, self.z, dy, self.rates, self.packed, self.D, self.dt_bias, self.plan.segments),
                 *(kept, g, records, dx, ddt, dz, drates, partial, dD, dbias)),
                (*steps[0], *self._sizes(), self.tiles, first),
                (*steps[1], channels, warps, rows, self.every, PART, *self.given),
                warps,
                self.tile.registers,
            )  # fmt: skip
        return drates, dD, dbias, partial

    def _sizes(self) -> tuple[int, ...]:
        return self.x.shape[1], self.ngroups, self.d_state, self.padded

    @staticmethod
    def _strides(*tensors: Tensor | None) -> tuple[list[int], list[int]]:
        """From batch row to batch row, and from token to token: a kernel is compiled for the latter."""
        by_row, by_token = ([0 if t is None else t.stride(dim) for t in tensors] for dim in (0, 1))
        return by_row, by_token
