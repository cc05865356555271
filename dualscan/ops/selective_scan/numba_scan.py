"""The selective scan on a CPU, forward and backward: states stay in the first-level cache, decays are never stored.

A worker takes a tile of channels through all sequences, token by token. The tile's states and A lie in scratch memory
as (vector of channels, state, lane), so that one vector instruction works on LANES channels of one state; a token's
rows of Δ, Δ x and so on are padded to whole vectors with zeros, which change nothing.

The backward of a tile goes over a sequence once to keep the state at the start of every `CHUNK` tokens, then takes the
chunks in reverse, as `chunked.backward` does; decays and states of one chunk lie in the second-level cache. A tile has
its channels to itself; only dB and dC are sums over channels: every worker has its own, added up at the end.
"""

import numpy as np
import torch
from torch import Tensor

from dualscan.ops._numba import lanes, vector
from dualscan.ops._numba.lanes import LANES
from dualscan.ops._numba.launch import adjacent, workers_for
from dualscan.ops._numba.segments import table
from dualscan.ops._numba.vector import ONE, ZERO, Kernel, at, device_function, like, load, share, store

# Channels of a tile at most, and tokens between the states that the backward keeps.
WIDEST, CHUNK = 128, 16


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
    call = _Call(x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus)
    y = torch.empty(x.shape, dtype=call.dtype)
    finals = torch.empty(call.nseq, *A.shape, dtype=torch.float32)
    scratch = torch.empty(call.workers, call.width * (2 * call.d_state + 3), dtype=torch.float32)
    _FORWARD[call.dtype](*call.arguments, scratch, scratch.shape[1], y, finals, workers=call.workers)
    return y.to(x.dtype), finals


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
    call = _Call(x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus)
    dy = x.new_zeros(x.shape) if dy is None else dy
    dy = adjacent(dy.to(call.dtype))
    dx, ddt = torch.empty(x.shape, dtype=call.dtype), torch.empty(x.shape, dtype=call.dtype)
    dz = None if z is None else torch.empty(x.shape, dtype=call.dtype)
    dA, dD, ddt_bias = (torch.empty(shape, dtype=torch.float32) for shape in (A.shape, A.shape[:1], A.shape[:1]))
    dinitial = torch.empty(call.nseq, *A.shape, dtype=torch.float32)
    # dB and dC of every worker.
    sums = torch.zeros(call.workers, 2, *B.shape, dtype=torch.float32)
    kept = -(-call.longest // CHUNK)
    states, rows = 3 + kept + 2 * CHUNK, 3 * CHUNK + 5
    scratch = torch.empty(
        call.workers, call.width * (states * call.d_state + rows) + 2 * LANES * call.d_state, dtype=torch.float32
    )
    _BACKWARD[call.dtype](
        *(*call.arguments, scratch, scratch.shape[1], dy, dy.stride(0), dy.stride(1)),
        *(None if dfinal is None else dfinal.float().contiguous(), dx, ddt, dz, dA, dD, ddt_bias, dinitial),
        *(sums, sums[0, 0].numel(), kept),
        workers=call.workers,
    )
    dB, dC = sums[:, 0].sum(0), sums[:, 1].sum(0)
    return (
        *(dx.to(x.dtype), ddt.to(dt.dtype), dA.to(A.dtype), dB.to(B.dtype), dC.to(C.dtype)),
        x.new_empty(0) if D is None else dD.to(D.dtype),
        x.new_empty(0) if dz is None else dz.to(x.dtype),
        x.new_empty(0) if dt_bias is None else ddt_bias.to(dt_bias.dtype),
        x.new_empty(0) if initial_states is None else dinitial.to(initial_states.dtype),
    )


class _Call:
    """What both passes hand to their kernels: everything in one dtype, with adjacent channels and states."""

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
        initial_states: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
    ):
        batch, seqlen, channels = x.shape
        ngroups, self.d_state = B.shape[2:]
        # Step sizes of another dtype are rare: then all is float32.
        self.dtype = x.dtype if dt.dtype == x.dtype else torch.float32
        x, dt, B, C = (adjacent(t.to(self.dtype)) for t in (x, dt, B, C))
        z = None if z is None else adjacent(z.to(self.dtype))
        self.workers = workers_for(x.numel() * self.d_state)
        each = -(-channels // (ngroups * self.workers)) if ngroups < self.workers else channels // ngroups
        self.width = min(WIDEST, -(-each // LANES) * LANES)
        segments, _ = table(batch, seqlen, cu_seqlens, CHUNK)
        self.nseq, self.longest = len(segments), int(segments[:, 2].max()) if len(segments) else 0
        parameters = [None if t is None else t.float().contiguous() for t in (A, D, dt_bias, initial_states)]
        gate = (None, 0, 0) if z is None else (z, z.stride(0), z.stride(1))
        self.arguments = (
            *(x, x.stride(0), x.stride(1), dt, dt.stride(0), dt.stride(1), *gate),
            *(B, *B.stride()[:3], C, *C.stride()[:3], *parameters, dt_softplus),
            *(segments, self.nseq, seqlen, channels, ngroups, self.d_state, self.width),
        )


# log(1 + e) = 2 artanh(e / (2 + e)), as a series in the square of a number <= 1 / 3.
_THIRD, _FIFTH, _SEVENTH, _NINTH, _ELEVENTH, _THIRTEENTH, _FIFTEENTH = (np.float32(1 / n) for n in range(3, 17, 2))
_TWO = np.float32(2)


@device_function
def softplus(x):
    """log(1 + exp(x)) in arithmetic that LLVM widens to vectors."""
    e = vector.exp(-abs(x))
    t = e / (_TWO + e)
    s = t * t
    p = s * _FIFTEENTH + _THIRTEENTH
    p = s * p + _ELEVENTH
    p = s * p + _NINTH
    p = s * p + _SEVENTH
    p = s * p + _FIFTH
    p = s * p + _THIRD
    log1p = _TWO * t * (s * p + ONE)
    return log1p + (x if x > ZERO else ZERO)


@device_function
def _step_sizes(dt, bias, x, use_bias, use_softplus, count, delta, inputs):
    """Δ and Δ x of a token; `delta` holds dt + bias on the way."""
    if use_bias:
        for i in range(count):
            delta[i] = load(dt, i) + bias[i]
    else:
        for i in range(count):
            delta[i] = load(dt, i)
    if use_softplus:
        for i in range(count):
            delta[i] = softplus(delta[i])
    for i in range(count):
        inputs[i] = delta[i] * load(x, i)


@device_function
def _advance(before, after, decays, keep, A, delta, inputs, B, C, sums, width, n_states):
    """A token: the states after it, its decays if they are to be kept, and in `sums` Σ_n C h."""
    for first in range(0, width, LANES):
        d, u, result = lanes.read(delta, first), lanes.read(inputs, first), lanes.spread(ZERO)
        for n in range(n_states):
            place = first * n_states + n * LANES
            decay = lanes.exp(lanes.times(d, lanes.read(A, place)))
            added = lanes.times(u, lanes.spread(load(B, n)))
            h = lanes.times_plus(decay, lanes.read(before, place), added)
            lanes.write(after, place, h)
            if keep:
                lanes.write(decays, place, decay)
            result = lanes.times_plus(lanes.spread(load(C, n)), h, result)
        lanes.write(sums, first, result)


@device_function
def _retreat(
    g, before, after, decays, A, dA, delta, inputs, ds, B, C, dinputs, ddelta, row_B, row_C, width, n_states
):  # fmt: skip
    """A token in reverse: `g` becomes the gradient of the states before it; row_B, row_C gain dB and dC by lanes."""
    for first in range(0, width, LANES):
        d, u, outer = lanes.read(delta, first), lanes.read(inputs, first), lanes.read(ds, first)
        through_inputs, through_decay = lanes.spread(ZERO), lanes.spread(ZERO)
        for n in range(n_states):
            place, row = first * n_states + n * LANES, n * LANES
            gradient = lanes.times_plus(outer, lanes.spread(load(C, n)), lanes.read(g, place))
            h = lanes.read(after, place)
            lanes.write(row_C, row, lanes.times_plus(outer, h, lanes.read(row_C, row)))
            lanes.write(row_B, row, lanes.times_plus(gradient, u, lanes.read(row_B, row)))
            through_inputs = lanes.times_plus(gradient, lanes.spread(load(B, n)), through_inputs)
            gradient = lanes.times(gradient, lanes.read(decays, place))
            lanes.write(g, place, gradient)
            exponent = lanes.times(gradient, lanes.read(before, place))
            through_decay = lanes.times_plus(exponent, lanes.read(A, place), through_decay)
            lanes.write(dA, place, lanes.times_plus(exponent, d, lanes.read(dA, place)))
        lanes.write(dinputs, first, through_inputs)
        lanes.write(ddelta, first, through_decay)


@device_function
def _clear(target, count):
    for i in range(count):
        target[i] = ZERO


@device_function
def _into_tile(source, given, tile, count, width, n_states):
    """(channel, state) to (vector, state, lane), padded with zeros; zeros where no source is given."""
    _clear(tile, width * n_states)
    if given:
        for c in range(count):
            place = c // LANES * LANES * n_states + c % LANES
            for n in range(n_states):
                tile[place + n * LANES] = source[c * n_states + n]


@device_function
def _out_of_tile(tile, target, count, n_states):
    for c in range(count):
        place = c // LANES * LANES * n_states + c % LANES
        for n in range(n_states):
            target[c * n_states + n] = tile[place + n * LANES]


@device_function
def _tiles(channels, ngroups, width):
    return ngroups * ((channels // ngroups + width - 1) // width)


@device_function
def _tile(number, channels, ngroups, width):
    """A tile's group, its first channel and the number of its channels."""
    per_group = channels // ngroups
    tiles = (per_group + width - 1) // width
    group, first = number // tiles, number % tiles * width
    return group, group * per_group + first, min(width, per_group - first)


@device_function
def _write_output(sums, x, D, z, use_D, use_z, count, y):
    if use_D:
        for i in range(count):
            sums[i] += D[i] * load(x, i)
    if use_z:
        for i in range(count):
            sums[i] *= vector.silu(load(z, i))
    for i in range(count):
        store(y, i, sums[i])


@device_function
def _forward(p, x):
    dt, z, B, C, y = like(x, p[5]), like(x, p[8]), like(x, p[11]), like(x, p[15]), like(x, p[33])
    A, D, bias = vector.float32(p[19]), vector.float32(p[20]), vector.float32(p[21])
    initial, finals, segments = vector.float32(p[22]), vector.float32(p[34]), vector.int64(p[24])
    nseq, seqlen, channels, ngroups, n_states, width = p[25], p[26], p[27], p[28], p[29], p[30]
    begin, end, worker = share(p, _tiles(channels, ngroups, width))
    h = at(vector.float32(p[31]), worker * p[32])
    rates = at(h, width * n_states)
    delta = at(rates, width * n_states)
    inputs, sums = at(delta, width), at(delta, 2 * width)
    for number in range(begin, end):
        group, c, count = _tile(number, channels, ngroups, width)
        _into_tile(at(A, c * n_states), True, rates, count, width, n_states)
        _clear(delta, 3 * width)
        for sequence in range(nseq):
            row, start, length = segments[4 * sequence], segments[4 * sequence + 1], segments[4 * sequence + 2]
            state = (sequence * channels + c) * n_states
            _into_tile(at(initial, state), p[22] != 0, h, count, width, n_states)
            for t in range(start, start + length):
                x_t, B_t = at(x, row * p[3] + t * p[4] + c), at(B, row * p[12] + t * p[13] + group * p[14])
                dt_t, C_t = at(dt, row * p[6] + t * p[7] + c), at(C, row * p[16] + t * p[17] + group * p[18])
                _step_sizes(dt_t, at(bias, c), x_t, p[21] != 0, p[23] != 0, count, delta, inputs)
                _advance(h, h, h, False, rates, delta, inputs, B_t, C_t, sums, width, n_states)
                z_t, y_t = at(z, row * p[9] + t * p[10] + c), at(y, (row * seqlen + t) * channels + c)
                _write_output(sums, x_t, at(D, c), z_t, p[20] != 0, p[8] != 0, count, y_t)
            _out_of_tile(h, at(finals, state), count, n_states)


@device_function
def _through_gate(dy, z, x, D, use_D, use_z, sums, count, ds, dz):
    """The gradient `ds` of the sum before the gate, and the gate's."""
    if not use_z:
        for i in range(count):
            ds[i] = load(dy, i)
        return
    if use_D:
        for i in range(count):
            sums[i] += D[i] * load(x, i)
    for i in range(count):
        outer, gate = load(dy, i), load(z, i)
        s = vector.sigmoid(gate)
        ds[i] = outer * (gate * s)
        store(dz, i, outer * sums[i] * (s + gate * s * (ONE - s)))


@device_function
def _write_gradients(x, D, use_D, delta, ds, dinputs, ddelta, dD, count, dx):
    """dx; `ddelta` becomes the whole gradient of Δ."""
    if use_D:
        for i in range(count):
            dD[i] += ds[i] * load(x, i)
        for i in range(count):
            store(dx, i, dinputs[i] * delta[i] + ds[i] * D[i])
    else:
        for i in range(count):
            store(dx, i, dinputs[i] * delta[i])
    for i in range(count):
        ddelta[i] += dinputs[i] * load(x, i)


@device_function
def _write_step_sizes(dt, bias, use_bias, use_softplus, ddelta, dbias, count, ddt):
    if use_softplus:
        for i in range(count):
            ddelta[i] *= vector.sigmoid(load(dt, i) + (bias[i] if use_bias else ZERO))
    for i in range(count):
        dbias[i] += ddelta[i]
    for i in range(count):
        store(ddt, i, ddelta[i])


@device_function
def _add_totals(row, target, n_states):
    for n in range(n_states):
        target[n] += lanes.total(lanes.read(row, n * LANES))


@device_function
def _backward(p, x):
    dt, z, B, C = like(x, p[5]), like(x, p[8]), like(x, p[11]), like(x, p[15])
    A, D, bias, segments = vector.float32(p[19]), vector.float32(p[20]), vector.float32(p[21]), vector.int64(p[24])
    initial, dfinal, dinitial = vector.float32(p[22]), vector.float32(p[36]), vector.float32(p[43])
    nseq, seqlen, channels, ngroups, n_states, width = p[25], p[26], p[27], p[28], p[29], p[30]
    dy, dx, ddt, dz = like(x, p[33]), like(x, p[37]), like(x, p[38]), like(x, p[39])
    begin, end, worker = share(p, _tiles(channels, ngroups, width))
    size = width * n_states
    # Every worker's memory: A, dA, g, the states kept, those of a chunk, its decays; rows; dB and dC of a token.
    rates = at(vector.float32(p[31]), worker * p[32])
    drates, g, kept = at(rates, size), at(rates, 2 * size), at(rates, 3 * size)
    states = at(kept, p[46] * size)
    decays, rows = at(states, CHUNK * size), at(states, 2 * CHUNK * size)
    ds = at(rows, 3 * CHUNK * width)
    dinputs, ddelta, dD, dbias = at(ds, width), at(ds, 2 * width), at(ds, 3 * width), at(ds, 4 * width)
    row_B = at(ds, 5 * width)
    row_C = at(row_B, n_states * LANES)
    dB = at(vector.float32(p[44]), worker * 2 * p[45])
    dC = at(dB, p[45])
    for number in range(begin, end):
        group, c, count = _tile(number, channels, ngroups, width)
        _into_tile(at(A, c * n_states), True, rates, count, width, n_states)
        _clear(drates, size)
        _clear(rows, (3 * CHUNK + 5) * width)
        for sequence in range(nseq):
            row, start, length = segments[4 * sequence], segments[4 * sequence + 1], segments[4 * sequence + 2]
            state = (sequence * channels + c) * n_states
            chunks = (length + CHUNK - 1) // CHUNK
            if chunks:
                _into_tile(at(initial, state), p[22] != 0, kept, count, width, n_states)
            for t in range((chunks - 1) * CHUNK):
                x_t = at(x, row * p[3] + (start + t) * p[4] + c)
                dt_t = at(dt, row * p[6] + (start + t) * p[7] + c)
                B_t = at(B, row * p[12] + (start + t) * p[13] + group * p[14])
                _step_sizes(dt_t, at(bias, c), x_t, p[21] != 0, p[23] != 0, count, rows, at(rows, width))
                after = at(kept, (t // CHUNK + 1) * size)
                before = at(kept, t // CHUNK * size) if t % CHUNK == 0 else after
                _advance(before, after, after, False, rates, rows, at(rows, width), B_t, B_t, ds, width, n_states)
            _into_tile(at(dfinal, state), p[36] != 0, g, count, width, n_states)
            for chunk in range(chunks - 1, -1, -1):
                first = chunk * CHUNK
                tokens = min(CHUNK, length - first)
                for j in range(tokens):
                    t = start + first + j
                    x_t, B_t = at(x, row * p[3] + t * p[4] + c), at(B, row * p[12] + t * p[13] + group * p[14])
                    dt_t, C_t = at(dt, row * p[6] + t * p[7] + c), at(C, row * p[16] + t * p[17] + group * p[18])
                    delta = at(rows, 3 * j * width)
                    inputs, sums = at(delta, width), at(delta, 2 * width)
                    _step_sizes(dt_t, at(bias, c), x_t, p[21] != 0, p[23] != 0, count, delta, inputs)
                    before = at(kept, chunk * size) if j == 0 else at(states, (j - 1) * size)
                    _advance(
                        before, at(states, j * size), at(decays, j * size), True, rates, delta, inputs, B_t, C_t,
                        sums, width, n_states,
                    )  # fmt: skip
                for j in range(tokens - 1, -1, -1):
                    t = start + first + j
                    x_t, B_t = at(x, row * p[3] + t * p[4] + c), at(B, row * p[12] + t * p[13] + group * p[14])
                    dt_t, C_t = at(dt, row * p[6] + t * p[7] + c), at(C, row * p[16] + t * p[17] + group * p[18])
                    z_t, dy_t = at(z, row * p[9] + t * p[10] + c), at(dy, row * p[34] + t * p[35] + c)
                    delta = at(rows, 3 * j * width)
                    inputs, sums = at(delta, width), at(delta, 2 * width)
                    out = (row * seqlen + t) * channels + c
                    _through_gate(dy_t, z_t, x_t, at(D, c), p[20] != 0, p[8] != 0, sums, count, ds, at(dz, out))
                    _clear(row_B, 2 * n_states * LANES)
                    before = at(kept, chunk * size) if j == 0 else at(states, (j - 1) * size)
                    _retreat(
                        g, before, at(states, j * size), at(decays, j * size), rates, drates, delta, inputs, ds,
                        B_t, C_t, dinputs, ddelta, row_B, row_C, width, n_states,
                    )  # fmt: skip
                    place = ((row * seqlen + t) * ngroups + group) * n_states
                    _add_totals(row_B, at(dB, place), n_states)
                    _add_totals(row_C, at(dC, place), n_states)
                    _write_gradients(x_t, at(D, c), p[20] != 0, delta, ds, dinputs, ddelta, dD, count, at(dx, out))
                    _write_step_sizes(dt_t, at(bias, c), p[21] != 0, p[23] != 0, ddelta, dbias, count, at(ddt, out))
            _out_of_tile(g, at(dinitial, state), count, n_states)
        _out_of_tile(drates, at(vector.float32(p[40]), c * n_states), count, n_states)
        for i in range(count):
            vector.float32(p[41])[c + i] = dD[i]
            vector.float32(p[42])[c + i] = dbias[i]


def _forward_float32(p):
    _forward(p, vector.float32(p[2]))


def _forward_bfloat16(p):
    _forward(p, vector.bfloat16(p[2]))


def _backward_float32(p):
    _backward(p, vector.float32(p[2]))


def _backward_bfloat16(p):
    _backward(p, vector.bfloat16(p[2]))


_FORWARD = {torch.float32: Kernel(_forward_float32), torch.bfloat16: Kernel(_forward_bfloat16)}
_BACKWARD = {torch.float32: Kernel(_backward_float32), torch.bfloat16: Kernel(_backward_bfloat16)}
