# ruff: noqa: RUF005 (Triton's tuples can be added, not unpacked)
"""The selective scan on a GPU: a thread walks through a sequence with one channel, all its sums in registers.

A tile of ROWS tokens is loaded at once, so that a thread has all rows of its channel and the recurrence needs no
exchange. The loop over the N states is inside: a state is read, taken through the rows and written back, to memory of
which a program uses a few kilobytes again and again. So any N runs by the same code, and registers hold only what is
one number a token and channel. B and C come packed (`triton_columns`).

Few warps fit beside so many registers, so nobody else works while one waits for memory. Therefore all that a tile needs
is read once while the tile before is finished (`touch`), and comes from the first-level cache then.

Sequences are cut into segments (`_triton.Plan`) where they alone would not fill the multiprocessors. Then a scan from
zero states gives every segment's own contribution and the sum of its Δ, `combine_kernel` joins them, because

    h(end) = exp(A ΣΔ) h(start) + (what the segment adds),

and the scan runs again from the right states. The gradients of the states obey the same rule from the end to the start.

The backward keeps the states in front of every tile in one launch, and takes the tiles in reverse in another: the
states of a tile again, for one n after the other, and with them every gradient, as `chunked.backward` does. dB and dC
are sums over channels: 2 ROWS numbers of a warp are added up at once, each lane giving half of what it holds for half
of what its partner holds, until every lane has one sum. They are added over the programs afterwards, in a fixed order.
There are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher
from dualscan.ops.selective_scan import configs, triton_columns
from dualscan.ops.selective_scan.triton_columns import packed_rows
from dualscan.ops.triton_common import LOG2E, fold, keep_touched, sigmoid, silu_slope, sum_lanes, touch

LN2 = tl.constexpr(0.6931471805599453)
LANES = tl.constexpr(32)
TOUCHED = tl.constexpr(16)  # states whose numbers are fetched at once
COMBINED = 128  # channels of a program that joins segments
PART = 8  # rows of B and C that the backward has in registers at a time
_STRIDES = [f"{name}_{dim}" for name in ("x", "dt", "z", "dy") for dim in ("b", "l")]
_SIZES = ["seqlen", "channels", "ngroups", "n_states"]


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
def load_rows(base, first, end, stride, c, inside, ROWS: tl.constexpr):
    """The rows of ROWS tokens as they are in memory; zeros from `end` on."""
    place, rows = base + first * stride + c, ()
    for u in tl.static_range(ROWS):
        rows = rows + (tl.load(place, mask=inside & (first + u < end), other=0.0),)
        place += stride
    return rows


@triton.jit
def step_rows(raw, shift, first, end, inside, ROWS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Δ of ROWS tokens; it is 0 from `end` on, so that these change nothing."""
    delta = ()
    for u in tl.static_range(ROWS):
        size = raw[u].to(tl.float32) + shift
        if SOFTPLUS:
            size = softplus(size)
        delta = delta + (tl.where(inside & (first + u < end), size, 0.0),)
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
def place(segments, channels, ngroups, BLOCK: tl.constexpr):
    """A program's segment: its number, batch row, tokens [begin, end) and first tile; its block and group, its first
    channel, and how many there are from it to the group's end."""
    per_group = channels // ngroups
    blocks = tl.cdiv(per_group, BLOCK)
    block, group = tl.program_id(0) % blocks, (tl.program_id(0) // blocks) % ngroups
    segment = (tl.program_id(0) // (blocks * ngroups)).to(tl.int64)
    row = tl.load(segments + segment * 7).to(tl.int64)
    begin, end = tl.load(segments + segment * 7 + 1), tl.load(segments + segment * 7 + 2)
    tile = tl.load(segments + segment * 7 + 3).to(tl.int64)
    return segment, row, begin, end, tile, block, group, group * per_group + block * BLOCK, per_group - block * BLOCK


@triton.jit(do_not_specialize=_STRIDES[:6] + _SIZES)
def scan_kernel(
    dt, x, z, rates, packed, D, bias, segments, states, totals, kept, kept_totals, y,
    dt_b: tl.int64, dt_l: tl.int64, x_b: tl.int64, x_l: tl.int64, z_b: tl.int64, z_l: tl.int64,
    seqlen: tl.int32, channels: tl.int32, ngroups: tl.int32, n_states: tl.int32,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr, TOTAL: tl.constexpr,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Takes `states` (segment, n, channel) through their segments, in place. Grid `blocks x groups x segments`.

    OUTPUT writes y, KEEP the states in front of every tile (tile, n, channel), TOTAL the sums of Δ: of the segments
    (segment, channel) and, with KEEP, of what comes before a tile in its segment (tile, channel). With REVERSE,
    `states` are the gradients of the states after the segments and become those before them; x is dy then.
    """
    segment, row, begin, end, tile, _, group, edge, width = place(segments, channels, ngroups, BLOCK)
    c, inside, wide = edge + tl.arange(0, BLOCK), tl.arange(0, BLOCK) < width, channels.to(tl.int64)
    dt, x, y = dt + row * dt_b, x + row * x_b, y + row * seqlen * wide
    GATE: tl.constexpr = HAS_Z and (OUTPUT or REVERSE)
    if GATE:
        z += row * z_b
    states += segment * n_states * wide
    shift, skip = load_vector(bias, c, inside, HAS_BIAS), load_vector(D, c, inside, HAS_D)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.cdiv(end - begin, ROWS)
    for i in range(count):
        j, step = i, 1
        if REVERSE:
            j, step = count - 1 - i, -1
        first = begin + j * ROWS
        raw = load_rows(dt, first, end, dt_l, c, inside, ROWS)
        values = load_rows(x, first, end, x_l, c, inside, ROWS)
        delta = step_rows(raw, shift, first, end, inside, ROWS, SOFTPLUS)
        gates = values
        if REVERSE:
            if GATE:
                gates = load_rows(z, first, end, z_l, c, inside, ROWS)
            inputs = through_gate(values, gates, ROWS, GATE)
        else:
            inputs = multiply_rows(delta, values, ROWS)
        sums = ()
        for u in tl.static_range(ROWS):
            sums = sums + (skip * values[u].to(tl.float32),)
        columns = packed + ((tile + j) * ngroups + group) * n_states * (2 * ROWS)
        if TOTAL:
            if KEEP:
                tl.store(kept_totals + (tile + j) * wide + c, total, mask=inside)
            for u in tl.static_range(ROWS):
                total += delta[u]
        for n in range(n_states):
            rate = tl.load(rates + n * wide + c, mask=inside, other=0.0)
            h = tl.load(states + n * wide + c, mask=inside, other=0.0)
            if KEEP:
                tl.store(kept + ((tile + j) * n_states + n) * wide + c, h, mask=inside)
            if REVERSE:
                reads = packed_rows(columns + (n * 2 + 1) * ROWS, ROWS, BLOCK)
                for u in tl.static_range(ROWS - 1, -1, -1):
                    h = tl.fma(inputs[u], reads[u], h) * tl.exp2(delta[u] * rate)
            else:
                writes = packed_rows(columns + n * (2 * ROWS), ROWS, BLOCK)
                new = ()
                for u in tl.static_range(ROWS):
                    h = tl.fma(tl.exp2(delta[u] * rate), h, inputs[u] * writes[u])
                    new = new + (h,)
                if OUTPUT:
                    reads, read = packed_rows(columns + (n * 2 + 1) * ROWS, ROWS, BLOCK), ()
                    for u in tl.static_range(ROWS):
                        read = read + (tl.fma(reads[u], new[u], sums[u]),)
                    sums = read
            tl.store(states + n * wide + c, h, mask=inside)
        tl.debug_barrier()
        # What the next tile needs goes to the cache while this one is finished.
        after, lines = first + step * ROWS, tl.where(i + 1 < count, n_states, 0)
        columns = packed + ((tile + j + step) * ngroups + group) * n_states * (2 * ROWS)
        touched = (touch_states(columns, lines, 2 * ROWS, 2 * ROWS, 2 * ROWS),)
        touched = touched + (touch(dt, after, begin, end, dt_l, edge, width, ROWS, BLOCK),)
        touched = touched + (touch(x, after, begin, end, x_l, edge, width, ROWS, BLOCK),)
        if GATE:
            touched = touched + (touch(z, after, begin, end, z_l, edge, width, ROWS, BLOCK),)
        if OUTPUT:
            if HAS_Z:
                gates = load_rows(z, first, end, z_l, c, inside, ROWS)
            out = y + first * wide + c
            for u in tl.static_range(ROWS):
                result = sums[u]
                if HAS_Z:
                    gate = gates[u].to(tl.float32)
                    result *= gate * sigmoid(gate)
                tl.store(out, result.to(y.dtype.element_ty), mask=inside & (first + u < end))
                out += wide
        keep_touched(states, touched, n_states)
    if TOTAL:
        tl.store(totals + segment * wide + c, total, mask=inside)


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


@triton.jit(do_not_specialize=_STRIDES + _SIZES + ["tiles"])
def gradient_kernel(
    dt, x, z, dy, rates, packed, D, bias, segments, starts, kept, kept_totals, g,
    dx, ddt, dz, drates, partial, dD, dbias,
    dt_b: tl.int64, dt_l: tl.int64, x_b: tl.int64, x_l: tl.int64, z_b: tl.int64, z_l: tl.int64,
    dy_b: tl.int64, dy_l: tl.int64,
    seqlen: tl.int32, channels: tl.int32, ngroups: tl.int32, n_states: tl.int32, tiles: tl.int32,
    ROWS: tl.constexpr, PART: tl.constexpr, SPLIT: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A segment with 32 channels, its tiles in reverse. Grid `blocks x groups x segments`.

    `g` (segment, n, channel) goes in as the gradient of the states after the segments and comes out as that of the
    states before them. `kept` are the states in front of the tiles; with SPLIT without what `starts`, the states in
    front of the segments, still add. dB and dC go to `partial` (block, tile, group, n, dB or dC, row); drates, dD and
    dbias have a part for every segment; drates starts as zeros.
    """
    segment, row, begin, end, tile, block, group, edge, width = place(segments, channels, ngroups, LANES)
    wide, lane = channels.to(tl.int64), tl.arange(0, LANES)
    c, inside = edge + lane, lane < width
    dt, x, dy, dx, ddt = (
        dt + row * dt_b,
        x + row * x_b,
        dy + row * dy_b,
        dx + row * seqlen * wide,
        ddt + row * seqlen * wide,
    )
    if HAS_Z:
        z, dz = z + row * z_b, dz + row * seqlen * wide
    own = segment * n_states * wide
    starts, g, drates = starts + own, g + own, drates + own
    partial += block.to(tl.int64) * tiles * ngroups * n_states * (2 * ROWS)
    shift, skip = load_vector(bias, c, inside, HAS_BIAS), load_vector(D, c, inside, HAS_D)
    dskip, dshift = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    count = tl.cdiv(end - begin, ROWS)
    for i in range(count):
        j = count - 1 - i
        first = begin + j * ROWS
        raw = load_rows(dt, first, end, dt_l, c, inside, ROWS)
        values = load_rows(x, first, end, x_l, c, inside, ROWS)
        outer = load_rows(dy, first, end, dy_l, c, inside, ROWS)
        gates = outer
        if HAS_Z:
            gates = load_rows(z, first, end, z_l, c, inside, ROWS)
        delta = step_rows(raw, shift, first, end, inside, ROWS, SOFTPLUS)
        inputs, ds = multiply_rows(delta, values, ROWS), through_gate(outer, gates, ROWS, HAS_Z)
        sums, dinputs, ddelta = (), (), ()
        for _ in tl.static_range(ROWS):
            sums = sums + (tl.zeros([LANES], tl.float32),)
            dinputs = dinputs + (tl.zeros([LANES], tl.float32),)
            ddelta = ddelta + (tl.zeros([LANES], tl.float32),)
        before = tl.zeros([LANES], tl.float32)
        if SPLIT:
            before = tl.load(kept_totals + (tile + j) * wide + c, mask=inside, other=0.0)
        matrix = ((tile + j) * ngroups + group) * n_states * (2 * ROWS)
        for n in range(n_states):
            rate = tl.load(rates + n * wide + c, mask=inside, other=0.0)
            h = tl.load(kept + ((tile + j) * n_states + n) * wide + c, mask=inside, other=0.0)
            gradient = tl.load(g + n * wide + c, mask=inside, other=0.0)
            drate_before = tl.load(drates + n * wide + c, mask=inside, other=0.0)
            line = packed + matrix + n * (2 * ROWS)
            writes = packed_rows(line, ROWS, LANES)
            reads = writes
            if SPLIT:
                h = tl.fma(tl.exp2(before * rate), tl.load(starts + n * wide + c, mask=inside, other=0.0), h)
            decays, states = (), (h,)
            for u in tl.static_range(ROWS):
                decays = decays + (tl.exp2(delta[u] * rate),)
                h = tl.fma(decays[u], h, inputs[u] * writes[u])
                states = states + (h,)
            drate = tl.zeros([LANES], tl.float32)
            products, new_sums, new_dinputs, new_ddelta = (), (), (), ()
            for u in tl.static_range(ROWS - 1, -1, -1):
                if u % PART == PART - 1:  # a part of C, and of B again: registers are what this kernel has least of
                    writes = packed_rows(line + (u + 1 - PART), PART, LANES)
                    reads = packed_rows(line + (ROWS + u + 1 - PART), PART, LANES)
                gradient = tl.fma(ds[u], reads[u % PART], gradient)
                products = (fold(gradient * inputs[u], ds[u] * states[u + 1], lane, 16),) + products
                if HAS_Z:
                    new_sums = (tl.fma(reads[u % PART], states[u + 1], sums[u]),) + new_sums
                new_dinputs = (tl.fma(gradient, writes[u % PART], dinputs[u]),) + new_dinputs
                gradient *= decays[u]
                through = gradient * states[u]
                new_ddelta = (tl.fma(through, rate, ddelta[u]),) + new_ddelta
                drate = tl.fma(through, delta[u], drate)
            if HAS_Z:
                sums = new_sums
            dinputs, ddelta = new_dinputs, new_ddelta
            tl.store(g + n * wide + c, gradient, mask=inside)
            tl.store(drates + n * wide + c, drate_before + drate, mask=inside)
            total = sum_lanes(products, lane, ROWS)
            tl.store(partial + matrix + n * (2 * ROWS) + lane // 16 * ROWS + lane % ROWS, total, mask=lane % 16 < ROWS)
        tl.debug_barrier()
        # The first token is read again, because the rows' addresses would be kept through the loop otherwise.
        first = tl.load(segments + segment * 7 + 1) + j * ROWS
        after, lines = first - ROWS, tl.where(i + 1 < count, n_states, 0)
        columns = packed + ((tile + j - 1) * ngroups + group) * n_states * (2 * ROWS)
        touched = (touch_states(columns, lines, 2 * ROWS, 2 * ROWS, 2 * ROWS),)
        starts_before = kept + (tile + j - 1) * n_states * wide + edge
        touched = touched + (touch_states(starts_before, lines, wide, width, LANES),)
        touched = touched + (touch(dt, after, begin, end, dt_l, edge, width, ROWS, LANES),)
        touched = touched + (touch(x, after, begin, end, x_l, edge, width, ROWS, LANES),)
        touched = touched + (touch(dy, after, begin, end, dy_l, edge, width, ROWS, LANES),)
        if HAS_Z:
            touched = touched + (touch(z, after, begin, end, z_l, edge, width, ROWS, LANES),)
        # What only the end needs is read again, too.
        values = load_rows(x, first, end, x_l, c, inside, ROWS)
        if SOFTPLUS:
            raw = load_rows(dt, first, end, dt_l, c, inside, ROWS)
        if HAS_Z:
            gates, outer = (
                load_rows(z, first, end, z_l, c, inside, ROWS),
                load_rows(dy, first, end, dy_l, c, inside, ROWS),
            )
        out = first * wide + c
        for u in tl.static_range(ROWS):
            live, value = inside & (first + u < end), values[u].to(tl.float32)
            if HAS_Z:
                gate = gates[u].to(tl.float32)
                slope = silu_slope(gate, sigmoid(gate))
                dgate = outer[u].to(tl.float32) * tl.fma(skip, value, sums[u]) * slope
                tl.store(dz + out, dgate.to(dz.dtype.element_ty), mask=live)
            tl.store(dx + out, tl.fma(dinputs[u], delta[u], ds[u] * skip).to(dx.dtype.element_ty), mask=live)
            dskip = tl.fma(ds[u], value, dskip)
            size = tl.fma(dinputs[u], value, ddelta[u] * LN2)  # the rates are in powers of two
            if SOFTPLUS:
                size = tl.where(live, size * sigmoid(raw[u].to(tl.float32) + shift), 0.0)
            dshift += size
            tl.store(ddt + out, size.to(ddt.dtype.element_ty), mask=live)
            out += wide
        keep_touched(g, touched, n_states)
    tl.store(dD + segment * wide + c, dskip, mask=inside)
    tl.store(dbias + segment * wide + c, dshift, mask=inside)


_scan, _combine, _gradient = Launcher(scan_kernel), Launcher(combine_kernel), Launcher(gradient_kernel)


def forward(
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
) -> tuple[Tensor, Tensor]:
    """`y` and the final states; arguments and results as in `chunked.forward`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with _triton.on_device(x):
        call = _Call(configs.FORWARD, x, dt, A, B, C, D, z, dt_bias, cu_seqlens, dt_softplus)
        carried = call.states(initial_states)
        if call.plan.split:
            starts, totals = call.segment_states(), call.totals()
            call.scan(call.x, starts, totals=totals)
            call.combine(starts, totals, carried)
            call.scan(call.x, starts, y=y)
        else:
            call.scan(call.x, carried, y=y)
    return y, carried.transpose(1, 2).contiguous()


def backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
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
) -> tuple[Tensor, ...]:
    """Gradients of all tensors but cu_seqlens, in their order; an empty tensor for an argument that was None."""
    dy = torch.zeros_like(x) if dy is None else _triton.rows_last(dy)
    gradients = [torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (x, dt, B, C)]
    dx, ddt, dB, dC = gradients
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=x.device)
    with _triton.on_device(x):
        call = _Call(configs.BACKWARD, x, dt, A, B, C, D, z, dt_bias, cu_seqlens, dt_softplus)
        carried, g = call.states(initial_states), call.states(dfinal)
        dinitial = g
        kept, totals, kept_totals = call.kept(), None, None
        starts = carried
        if call.plan.split:
            starts, totals, kept_totals = call.segment_states(), call.totals(), call.kept_totals()
        call.scan(call.x, starts, totals=totals, kept=kept, kept_totals=kept_totals)
        if totals is not None:
            call.combine(starts, totals, carried)
            g = call.segment_states()
            call.scan(dy, g, reverse=True)
            call.combine(g, totals, dinitial, reverse=True)
        drates, dD, dbias, partial = call.gradient(dy, starts, kept, kept_totals, g, dx, ddt, dz)
        triton_columns.unpack(partial, call.plan, dB, dC)
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
        self.blocks = _triton.cdiv(channels // self.ngroups, tile.channels)
        warps = self.blocks * self.ngroups * tile.warps
        segment = tile.segment(warps, _triton.multiprocessors(x.device), batch, seqlen)
        self.plan = _triton.plan(cu_seqlens, batch, seqlen, tile.rows, 1, segment, x.device)
        self.rates = (A.float() * LOG2E.value).t().contiguous()
        self.packed = triton_columns.pack(B, C, self.plan, tile.rows)
        self.nsegments, self.tiles = self.plan.segments.shape[0], self.plan.chunks.shape[0]
        self.given = (dt_softplus, z is not None, D is not None, dt_bias is not None)

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
        """Memory for the states in front of all tiles (tile, n, channel)."""
        return self._empty(self.tiles, self.d_state, self.x.shape[2])

    def kept_totals(self) -> Tensor:
        """Memory for the sums of Δ in front of all tiles (tile, channel)."""
        return self._empty(self.tiles, self.x.shape[2])

    def scan(
        self,
        values: Tensor,
        states: Tensor,
        *,
        y: Tensor | None = None,
        totals: Tensor | None = None,
        kept: Tensor | None = None,
        kept_totals: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """`scan_kernel` on `states`, for those of the results that are given; `values` is x, or dy for the reverse."""
        if not values.numel():
            return
        _scan(
            (self.blocks * self.ngroups * self.nsegments, 1, 1),
            (*(self.dt, values, self.z, self.rates, self.packed, self.D, self.dt_bias, self.plan.segments, states),
             *(states if t is None else t for t in (totals, kept, kept_totals, y))),
            (*self._strides(values), *self._sizes()),
            (self.tile.channels, self.tile.rows, *(t is not None for t in (y, kept, totals)), reverse, *self.given),
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
        self,
        dy: Tensor,
        starts: Tensor,
        kept: Tensor,
        kept_totals: Tensor | None,
        g: Tensor,
        dx: Tensor,
        ddt: Tensor,
        dz: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`gradient_kernel`: fills dx, ddt and dz, and returns the parts of dA, of dD, of dt_bias' and of dB and dC."""
        channels, rows = self.x.shape[2], self.tile.rows
        drates = self.segment_states()
        dD, dbias = self._empty(2, self.nsegments, channels).zero_()
        partial = self._empty(self.blocks, self.tiles, self.ngroups, self.d_state, 2, rows)
        if self.x.numel():
            _gradient(
                (self.blocks * self.ngroups * self.nsegments, 1, 1),
                (*(self.dt, self.x, self.z, dy, self.rates, self.packed, self.D, self.dt_bias, self.plan.segments),
                 *(starts, kept, starts if kept_totals is None else kept_totals, g, dx, ddt, dz),
                 *(drates, partial, dD, dbias)),
                (*self._strides(self.x), dy.stride(0), dy.stride(1), *self._sizes(), self.tiles),
                (rows, min(rows, PART), kept_totals is not None, *self.given),
                1,
                self.tile.registers,
            )  # fmt: skip
        return drates, dD, dbias, partial

    def _strides(self, values: Tensor) -> tuple[int, ...]:
        gate = (0, 0) if self.z is None else self.z.stride()[:2]
        return (*self.dt.stride()[:2], *values.stride()[:2], *gate)

    def _sizes(self) -> tuple[int, ...]:
        return self.x.shape[1], self.x.shape[2], self.ngroups, self.d_state
