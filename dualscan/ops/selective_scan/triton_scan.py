# ruff: noqa: RUF005 (Triton's tuples can be added, not unpacked)
"""The selective scan on a GPU: a program walks through a sequence with a block of channels, all sums in registers.

A tile of ROWS tokens is loaded at once, one row a token, so that a thread has all rows of its channels and the
recurrence needs no exchange. The loop over the N states is inside: a state is read, taken through the rows and written
back, to memory of which a program uses a few kilobytes again and again (a barrier stands between writers and readers).
So any N runs by the same code, and registers hold only what is one number a token and channel. B and C come as (group,
state, token), so that the rows' numbers are adjacent.

The backward keeps the states in front of every KEPT tiles in a first launch, and in the second those of the tiles in
between, then takes the tiles in reverse: the states of a tile again, for one n after the other, and with them every
gradient, as `chunked.backward` does. dB and dC are sums over channels: every program writes its own, and they are added
up afterwards in a fixed order. There are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher
from dualscan.ops.selective_scan.configs import BACKWARD, FORWARD, Tile
from dualscan.ops.ssd.triton_scan import step_size
from dualscan.ops.triton_common import LOG2E, sigmoid, silu_slope

LN2 = tl.constexpr(0.6931471805599453)
_STRIDES = [f"{name}_{dim}" for name in ("x", "dt", "z", "dy") for dim in ("b", "l")]
_SIZES = ["seqlen", "channels", "ngroups", "n_states", "segments"]


@triton.jit
def load_rows(base, first, end, stride, inside, ROWS: tl.constexpr):
    """The rows of ROWS tokens in float32; zeros from `end` on."""
    rows = ()
    for u in tl.static_range(ROWS):
        row = tl.load(base + (first + u) * stride, mask=inside & (first + u < end), other=0.0)
        rows = rows + (row.to(tl.float32),)
    return rows


@triton.jit
def load_steps(
    dt, x, shift, first, end, dt_l, x_l, inside, ROWS: tl.constexpr, SOFTPLUS: tl.constexpr
):  # fmt: skip
    """Δ, Δ x and x of ROWS tokens; those from `end` on have Δ = 0, so that they change nothing."""
    raw, values = load_rows(dt, first, end, dt_l, inside, ROWS), load_rows(x, first, end, x_l, inside, ROWS)
    delta, inputs = (), ()
    for u in tl.static_range(ROWS):
        size, _ = step_size(raw[u], shift, 0.0, 0.0, SOFTPLUS, False)
        size = tl.where(inside & (first + u < end), size, 0.0)
        delta = delta + (size,)
        inputs = inputs + (size * values[u],)
    return delta, inputs, values


@triton.jit
def load_shift(bias, c, inside, HAS_BIAS: tl.constexpr):
    """dt_bias of a program's channels, or zeros."""
    shift = tl.zeros(c.shape, tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    return shift


@triton.jit
def place(cu_seqlens, seqlen, channels, ngroups, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """A program's batch row, sequence, tokens [begin, end), block, group, channels, and which of them are inside."""
    per_group = channels // ngroups
    blocks = tl.cdiv(per_group, BLOCK)
    block, group = tl.program_id(0) % blocks, (tl.program_id(0) // blocks) % ngroups
    sequence = (tl.program_id(0) // (blocks * ngroups)).to(tl.int64)
    own = block * BLOCK + tl.arange(0, BLOCK)
    row, begin, end = sequence, 0, seqlen
    if PACKED:
        row = sequence * 0
        begin, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    return row, sequence, begin, end, block, group, group * per_group + own, own < per_group


@triton.jit
def advance(
    dt, x, rates, B, C, states, kept, y, z, skip, shift, c, inside, first, end, n_states, channels, seqlen,
    dt_l, x_l, z_l, keep,
    ROWS: tl.constexpr, SOFTPLUS: tl.constexpr, OUTPUT: tl.constexpr, HAS_Z: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A tile of tokens: the states after it in `states`, those before it in `kept` where `keep`, and its outputs."""
    delta, inputs, values = load_steps(dt, x, shift, first, end, dt_l, x_l, inside, ROWS, SOFTPLUS)
    sums = ()
    for u in tl.static_range(ROWS):
        sums = sums + (skip * values[u],)
    for n in range(n_states):
        rate = tl.load(rates + n * channels + c, mask=inside, other=0.0)
        h = tl.load(states + n * channels + c, mask=inside, other=0.0)
        if KEEP:
            tl.store(kept + n * channels + c, h, mask=inside & keep)
        read = ()
        for u in tl.static_range(ROWS):
            b = tl.load(B + n * seqlen + first + u, mask=first + u < end, other=0.0)
            h = tl.exp2(delta[u] * rate) * h + inputs[u] * b
            if OUTPUT:
                read = read + (sums[u] + tl.load(C + n * seqlen + first + u, mask=first + u < end, other=0.0) * h,)
        if OUTPUT:
            sums = read
        tl.store(states + n * channels + c, h, mask=inside)
    tl.debug_barrier()
    if OUTPUT:
        for u in tl.static_range(ROWS):
            out, live = sums[u], inside & (first + u < end)
            if HAS_Z:
                gate = tl.load(z + (first + u) * z_l, mask=live, other=0.0).to(tl.float32)
                out *= gate * sigmoid(gate)
            tl.store(y + (first + u) * channels, out.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=_STRIDES[:6] + _SIZES)
def forward_kernel(
    x, dt, z, rates, B, C, D, bias, cu_seqlens, states, kept, y,
    x_b: tl.int64, x_l: tl.int64, dt_b: tl.int64, dt_l: tl.int64, z_b: tl.int64, z_l: tl.int64,
    seqlen: tl.int32, channels: tl.int32, ngroups: tl.int32, n_states: tl.int32, segments: tl.int32,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr, SOFTPLUS: tl.constexpr, OUTPUT: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid `blocks of channels x groups x sequences`, in this order. With OUTPUT y and the final states in `states`,
    without it the states in front of every KEPT tiles, in `kept` (sequence, segment, n, channel)."""
    row, sequence, begin, end, _, group, c, inside = place(cu_seqlens, seqlen, channels, ngroups, PACKED, BLOCK)
    wide = channels.to(tl.int64)
    shift = load_shift(bias, c, inside, HAS_BIAS)
    skip = tl.zeros([BLOCK], tl.float32)
    if HAS_D:
        skip = tl.load(D + c, mask=inside, other=0.0).to(tl.float32)
    matrix = (row * ngroups + group) * n_states * seqlen.to(tl.int64)
    for first in range(begin, end, ROWS):
        segment = (first - begin) // (ROWS * KEPT)
        advance(
            dt + row * dt_b + c, x + row * x_b + c, rates, B + matrix, C + matrix, states + sequence * n_states * wide,
            kept + (sequence * segments + segment) * n_states * wide, y + row * seqlen * wide + c,
            z + row * z_b + c if HAS_Z else z, skip, shift, c, inside, first, end, n_states, wide, seqlen,
            dt_l, x_l, z_l, segment * (ROWS * KEPT) == first - begin,
            ROWS, SOFTPLUS, OUTPUT, HAS_Z, not OUTPUT,
        )  # fmt: skip


@triton.jit
def through_gate(dy, z, first, end, dy_l, z_l, inside, ROWS: tl.constexpr, HAS_Z: tl.constexpr):
    """The gradients `ds` of the sums before the gate."""
    ds = load_rows(dy, first, end, dy_l, inside, ROWS)
    if HAS_Z:
        gates, gated = load_rows(z, first, end, z_l, inside, ROWS), ()
        for u in tl.static_range(ROWS):
            gated = gated + (ds[u] * gates[u] * sigmoid(gates[u]),)
        ds = gated
    return ds


@triton.jit
def retreat(
    dt, x, z, dy, rates, B, C, before, g, drates, dB, dC, dx, ddt, dz, skip, shift, dskip, dshift,
    c, inside, first, end, n_states, channels, seqlen, dt_l, x_l, z_l, dy_l,
    ROWS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """A tile of tokens in reverse, from the states `before` it; `g` holds the gradient of the states after it, and then
    that of those before it. Returns the sums for D and dt_bias. What only the end needs is read again there: registers
    are what this kernel has least of."""
    delta, inputs, _ = load_steps(dt, x, shift, first, end, dt_l, x_l, inside, ROWS, SOFTPLUS)
    ds = through_gate(dy, z, first, end, dy_l, z_l, inside, ROWS, HAS_Z)
    sums, dinputs, ddelta = (), (), ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros(c.shape, tl.float32),)
        dinputs = dinputs + (tl.zeros(c.shape, tl.float32),)
        ddelta = ddelta + (tl.zeros(c.shape, tl.float32),)
    for n in range(n_states):
        rate = tl.load(rates + n * channels + c, mask=inside, other=0.0)
        h = tl.load(before + n * channels + c, mask=inside, other=0.0)
        gradient = tl.load(g + n * channels + c, mask=inside, other=0.0)
        drate = tl.load(drates + n * channels + c, mask=inside, other=0.0)
        decays, states = (), (h,)
        for u in tl.static_range(ROWS):
            b = tl.load(B + n * seqlen + first + u, mask=first + u < end, other=0.0)
            decays = decays + (tl.exp2(delta[u] * rate),)
            h = decays[u] * h + inputs[u] * b
            states = states + (h,)
        new_sums, new_dinputs, new_ddelta = (), (), ()
        for u in tl.static_range(ROWS - 1, -1, -1):
            live = first + u < end
            b = tl.load(B + n * seqlen + first + u, mask=live, other=0.0)
            r = tl.load(C + n * seqlen + first + u, mask=live, other=0.0)
            gradient += ds[u] * r
            tl.store(dC + n * seqlen + first + u, tl.sum(ds[u] * states[u + 1], 0), mask=live)
            tl.store(dB + n * seqlen + first + u, tl.sum(gradient * inputs[u], 0), mask=live)
            new_sums = (sums[u] + r * states[u + 1],) + new_sums
            new_dinputs = (dinputs[u] + gradient * b,) + new_dinputs
            gradient *= decays[u]
            through = gradient * states[u]
            new_ddelta = (ddelta[u] + through * rate,) + new_ddelta
            drate += through * delta[u]
        sums, dinputs, ddelta = new_sums, new_dinputs, new_ddelta
        tl.store(g + n * channels + c, gradient, mask=inside)
        tl.store(drates + n * channels + c, drate, mask=inside)
    tl.debug_barrier()
    for u in tl.static_range(ROWS):
        live, out = inside & (first + u < end), (first + u) * channels
        value = tl.load(x + (first + u) * x_l, mask=live, other=0.0).to(tl.float32)
        if HAS_Z:
            gate = tl.load(z + (first + u) * z_l, mask=live, other=0.0).to(tl.float32)
            outer = tl.load(dy + (first + u) * dy_l, mask=live, other=0.0).to(tl.float32)
            dgate = outer * (sums[u] + skip * value) * silu_slope(gate, sigmoid(gate))
            tl.store(dz + out, dgate.to(dz.dtype.element_ty), mask=live)
        tl.store(dx + out, (dinputs[u] * delta[u] + ds[u] * skip).to(dx.dtype.element_ty), mask=live)
        dskip += ds[u] * value
        size = dinputs[u] * value + ddelta[u] * LN2  # the rates are in powers of two
        if SOFTPLUS:
            raw = tl.load(dt + (first + u) * dt_l, mask=live, other=0.0).to(tl.float32)
            size = tl.where(live, size * sigmoid(raw + shift), 0.0)
        dshift += size
        tl.store(ddt + out, size.to(ddt.dtype.element_ty), mask=live)
    return dskip, dshift


@triton.jit(do_not_specialize=_STRIDES + _SIZES)
def backward_kernel(
    x, dt, z, dy, rates, B, C, D, bias, cu_seqlens, kept, states, tiles, g, dx, ddt, dz, drates, dB, dC, dD, dbias,
    x_b: tl.int64, x_l: tl.int64, dt_b: tl.int64, dt_l: tl.int64, z_b: tl.int64, z_l: tl.int64,
    dy_b: tl.int64, dy_l: tl.int64,
    seqlen: tl.int32, channels: tl.int32, ngroups: tl.int32, n_states: tl.int32, segments: tl.int32,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid as the forward's. `g` goes in as the gradient of the final states and comes out as that of the initial ones;
    `tiles` (sequence, tile, n, channel) is scratch; dB, dC (block, row, group, n, token), drates, dD and dbias have a
    part for every program along channels or sequences."""
    row, sequence, begin, end, block, group, c, inside = place(cu_seqlens, seqlen, channels, ngroups, PACKED, BLOCK)
    wide = channels.to(tl.int64)
    shift = load_shift(bias, c, inside, HAS_BIAS)
    skip, dskip, dshift = (tl.zeros([BLOCK], tl.float32),) * 3
    if HAS_D:
        skip = tl.load(D + c, mask=inside, other=0.0).to(tl.float32)
    rows = row * 0 + 1 if PACKED else tl.num_programs(0) // (tl.cdiv(channels // ngroups, BLOCK) * ngroups)
    matrix = (row * ngroups + group) * n_states * seqlen.to(tl.int64)
    partial = ((block * rows + row) * ngroups + group) * n_states * seqlen.to(tl.int64)
    own = sequence * n_states * wide
    x, dt, dy = x + row * x_b + c, dt + row * dt_b + c, dy + row * dy_b + c
    if HAS_Z:
        z, dz = z + row * z_b + c, dz + row * seqlen * wide + c
    dx, ddt = dx + row * seqlen * wide + c, ddt + row * seqlen * wide + c
    LENGTH: tl.constexpr = ROWS * KEPT
    for i in range(tl.cdiv(end - begin, LENGTH)):
        segment = tl.cdiv(end - begin, LENGTH) - 1 - i
        low = begin + segment * LENGTH
        high = tl.minimum(low + LENGTH, end)
        for n in range(n_states):
            start = tl.load(
                kept + (sequence * segments + segment) * n_states * wide + n * wide + c, mask=inside, other=0.0
            )
            tl.store(states + own + n * wide + c, start, mask=inside)
        tl.debug_barrier()
        for first in range(low, high, ROWS):
            tile = tiles + (sequence * KEPT + (first - low) // ROWS) * n_states * wide
            advance(
                dt, x, rates, B + matrix, C + matrix, states + own, tile, dx, z, skip, shift, c, inside, first, high,
                n_states, wide, seqlen, dt_l, x_l, z_l, True,
                ROWS, SOFTPLUS, False, HAS_Z, True,
            )  # fmt: skip
        for j in range(tl.cdiv(high - low, ROWS)):
            number = tl.cdiv(high - low, ROWS) - 1 - j
            dskip, dshift = retreat(
                dt, x, z, dy, rates, B + matrix, C + matrix, tiles + (sequence * KEPT + number) * n_states * wide,
                g + own, drates + own, dB + partial, dC + partial, dx, ddt, dz, skip, shift, dskip, dshift,
                c, inside, low + number * ROWS, high, n_states, wide, seqlen, dt_l, x_l, z_l, dy_l,
                ROWS, SOFTPLUS, HAS_Z,
            )  # fmt: skip
    tl.store(dD + sequence * wide + c, dskip, mask=inside)
    tl.store(dbias + sequence * wide + c, dshift, mask=inside)


_forward, _backward = Launcher(forward_kernel), Launcher(backward_kernel)


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
    call = _Call(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, dt_softplus)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    states = call.states(initial_states)
    call.forward(states, None, y, FORWARD)
    return y, states.transpose(1, 2).contiguous()


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
    call, tile = _Call(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, dt_softplus), BACKWARD
    device, (channels, d_state), nseq = x.device, A.shape, call.nseq
    dy = torch.zeros_like(x) if dy is None else _triton.rows_last(dy)
    wide = {"dtype": torch.float32, "device": device}
    kept = torch.empty(nseq, call.segments(tile), d_state, channels, **wide)
    call.forward(call.states(initial_states), kept, None, tile)
    g, drates = call.states(dfinal), torch.zeros(nseq, d_state, channels, **wide)
    tiles, states = torch.empty(nseq, tile.kept, d_state, channels, **wide), torch.empty_like(g)
    dx, ddt = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in (x, dt))
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=device)
    dB, dC = (torch.empty(call.blocks(tile), *call.B.shape, **wide) for _ in range(2))
    dD, dbias = (torch.empty(nseq, channels, **wide) for _ in range(2))
    if call.grid(tile)[0]:
        with _triton.on_device(x):
            _backward(
                call.grid(tile),
                (*(call.x, call.dt, call.z, dy, call.rates, call.B, call.C, D, dt_bias, cu_seqlens),
                 *(kept, states, tiles, g, dx, ddt, dz, drates, dB, dC, dD, dbias)),
                (*call.strides, dy.stride(0), dy.stride(1), *call.sizes(tile)),
                (tile.channels, tile.rows, tile.kept, dt_softplus, *call.given),
                tile.warps,
            )  # fmt: skip
    dB, dC = (t.sum(0).permute(0, 3, 1, 2).to(B.dtype).contiguous() for t in (dB, dC))
    dA = drates.sum(0).t().to(A.dtype).contiguous()
    return (
        *(dx, ddt, dA, dB, dC),
        x.new_empty(0) if D is None else dD.sum(0).to(D.dtype),
        x.new_empty(0) if dz is None else dz,
        x.new_empty(0) if dt_bias is None else dbias.sum(0).to(dt_bias.dtype),
        x.new_empty(0) if initial_states is None else g.transpose(1, 2).to(initial_states.dtype).contiguous(),
    )


class _Call:
    """What both passes hand to their kernels; the small matrices A, B and C are brought into the kernels' order."""

    def __init__(
        self,
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
        self.x, self.dt = _triton.rows_last(x), _triton.rows_last(dt)
        self.z = None if z is None else _triton.rows_last(z)
        self.D, self.dt_bias, self.cu_seqlens, self.dt_softplus = D, dt_bias, cu_seqlens, dt_softplus
        self.rates = (A.float() * LOG2E.value).t().contiguous()
        self.B, self.C = (t.float().permute(0, 2, 3, 1).contiguous() for t in (B, C))
        self.nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.ngroups = B.shape[2]
        gate = (0, 0) if self.z is None else self.z.stride()[:2]
        self.strides = (*self.x.stride()[:2], *self.dt.stride()[:2], *gate)
        self.given = (z is not None, D is not None, dt_bias is not None, cu_seqlens is not None)

    def states(self, initial: Tensor | None) -> Tensor:
        """States (sequence, n, channel) in fresh memory, which kernels change in place; None is zero."""
        d_state, channels = self.rates.shape
        states = torch.zeros(self.nseq, d_state, channels, dtype=torch.float32, device=self.x.device)
        return states if initial is None else states.copy_(initial.transpose(1, 2))

    def blocks(self, tile: Tile) -> int:
        """Programs along the channels of a group."""
        return _triton.cdiv(self.x.shape[2] // self.ngroups, tile.channels)

    def segments(self, tile: Tile) -> int:
        """Segments of the longest sequence that there can be."""
        return max(_triton.cdiv(self.x.shape[1], tile.rows * tile.kept), 1)

    def grid(self, tile: Tile) -> tuple[int, int, int]:
        """All programs in one dimension, which has room for them."""
        return self.blocks(tile) * self.ngroups * self.nseq, 1, 1

    def sizes(self, tile: Tile) -> tuple[int, ...]:
        """The kernels' last integers."""
        return self.x.shape[1], self.x.shape[2], self.ngroups, self.rates.shape[0], self.segments(tile)

    def forward(self, states: Tensor, kept: Tensor | None, y: Tensor | None, tile: Tile) -> None:
        """From the initial `states` to the final ones, with either `y` or the states that are kept."""
        if not self.grid(tile)[0]:
            return
        with _triton.on_device(self.x):
            _forward(
                self.grid(tile),
                (*(self.x, self.dt, self.z, self.rates, self.B, self.C, self.D, self.dt_bias, self.cu_seqlens, states),
                 *(states if kept is None else kept, states if y is None else y)),
                (*self.strides, *self.sizes(tile)),
                (tile.channels, tile.rows, tile.kept, self.dt_softplus, y is not None, *self.given),
                tile.warps,
            )  # fmt: skip
