"""The convolution on a CPU in one pass, forward and backward: `x` is read once and `y` written once.

A sequence is its initial state followed by its tokens; positions count from the first token, so the state's are
negative. With `v` the sequence, `p[t] = bias + sum_j w[j] v[t - halo + j]` and `y = silu(p)`,

    dv[t] = sum_j w[j] dp[t + halo - j],    dw[j] = sum_t dp[t] v[t - halo + j],    dbias = sum_t dp[t],

for the tokens and the state alike. The final state is the last `halo` values of `v`.
"""

import torch
from torch import Tensor

from dualscan.ops._numba import vector
from dualscan.ops._numba.launch import adjacent, workers_for
from dualscan.ops._numba.segments import sequence_of, table
from dualscan.ops._numba.vector import ONE, ZERO, Kernel, at, device_function, load, share, store

# Tokens and channels that a worker takes at a time in the backward: dp of a tile stays in the first-level cache.
TOKENS, CHANNELS = 64, 128


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    activate: bool,
) -> tuple[Tensor, Tensor]:
    """`y` and the final states; arguments as in `reference.causal_conv1d_reference`."""
    (batch, seqlen, channels), width = x.shape, weight.shape[1]
    x = adjacent(x)
    y = torch.empty(x.shape, dtype=x.dtype)
    segments, blocks = table(batch, seqlen, cu_seqlens, TOKENS)
    states, state_stride = _states(x, initial_states, width)
    finals = torch.empty(len(segments), width - 1, channels, dtype=x.dtype)
    taps, offset = _parameters(weight, bias)
    workers = workers_for(x.numel())
    scratch = torch.empty(workers, channels, dtype=torch.float32)
    _FORWARD[x.dtype](
        *(x, x.stride(0), x.stride(1), y, taps, offset, states, state_stride, finals, scratch),
        *(segments, len(segments), blocks, seqlen, channels, width, activate),
        workers=workers,
    )
    return y, finals.transpose(1, 2)


def backward(
    dy: Tensor,
    dfinal_states: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    activate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dx, dweight, dbias, dinitial_states`; arguments and results as in `chunked.backward`."""
    (batch, seqlen, channels), width = x.shape, weight.shape[1]
    x, dy = adjacent(x), adjacent(dy)
    dx = torch.empty(x.shape, dtype=x.dtype)
    segments, blocks = table(batch, seqlen, cu_seqlens, TOKENS)
    states, state_stride = _states(x, initial_states, width)
    dstates = x.new_empty(0)
    if initial_states is not None:
        dstates = torch.empty(len(segments), width - 1, channels, dtype=x.dtype)
    dfinals = dfinal_states.to(x.dtype).transpose(1, 2).contiguous() if dfinal_states.numel() else None
    taps, offset = _parameters(weight, bias)
    workers = workers_for(x.numel())
    sums = torch.zeros(workers, width + 1, channels, dtype=torch.float32)
    scratch = torch.empty(workers, TOKENS + width, CHANNELS, dtype=torch.float32)
    _BACKWARD[x.dtype](
        *(x, x.stride(0), x.stride(1), dy, dy.stride(0), dy.stride(1), dx),
        *(taps, offset, states, state_stride, dstates if initial_states is not None else None, dfinals),
        *(sums, scratch, segments, len(segments), blocks, seqlen, channels, width, activate),
        workers=workers,
    )
    total = sums.sum(0)
    return (
        dx,
        total[:width].t().to(weight.dtype).contiguous(),
        dx.new_empty(0) if bias is None else total[width].to(bias.dtype),
        dstates if initial_states is None else dstates.transpose(1, 2),
    )


def _states(x: Tensor, initial_states: Tensor | None, width: int) -> tuple[Tensor, int]:
    """Initial states `(nseq, halo, channels)` and the stride from one to the next: 0 where all share a zero state."""
    if initial_states is None:
        return x.new_zeros(width - 1, x.shape[2]), 0
    states = initial_states.transpose(1, 2).contiguous()
    return states, states.stride(0)


def _parameters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    taps = weight.t().float().contiguous()
    return taps, taps.new_zeros(taps.shape[1]) if bias is None else bias.float().contiguous()


@device_function
def _row(x, stride, states, channels, halo, position):
    """The values at a position of a sequence whose first token `x` points to."""
    if position >= 0:
        return at(x, position * stride)
    return at(states, (halo + position) * channels)


@device_function
def _preactivate(x, stride, states, taps, bias, channels, width, position, start, count, out):
    """`out[:count] = p[position, start : start + count]`."""
    halo = width - 1
    if width == 4:
        v0 = at(_row(x, stride, states, channels, halo, position - 3), start)
        v1 = at(_row(x, stride, states, channels, halo, position - 2), start)
        v2 = at(_row(x, stride, states, channels, halo, position - 1), start)
        v3 = at(_row(x, stride, states, channels, halo, position), start)
        w0, b = at(taps, start), at(bias, start)
        w1, w2, w3 = at(w0, channels), at(w0, 2 * channels), at(w0, 3 * channels)
        for c in range(count):
            value = b[c] + w0[c] * load(v0, c)
            value += w1[c] * load(v1, c)
            value += w2[c] * load(v2, c)
            out[c] = value + w3[c] * load(v3, c)
        return
    for c in range(count):
        out[c] = bias[start + c]
    for j in range(width):
        v, w = at(_row(x, stride, states, channels, halo, position - halo + j), start), at(taps, j * channels + start)
        for c in range(count):
            out[c] += w[c] * load(v, c)


@device_function
def _forward(p, x, y, states, finals):
    x_row, x_token, taps, bias = p[3], p[4], vector.float32(p[6]), vector.float32(p[7])
    state_stride, segments = p[9], vector.int64(p[12])
    nseq, blocks, seqlen, channels, width, activate = p[13], p[14], p[15], p[16], p[17], p[18]
    begin, stop, worker = share(p, blocks)
    pre = at(vector.float32(p[11]), worker * channels)
    sequence = 0
    for block in range(begin, stop):
        sequence = sequence_of(segments, nseq, block, sequence)
        row, start, length = segments[4 * sequence], segments[4 * sequence + 1], segments[4 * sequence + 2]
        first = (block - segments[4 * sequence + 3]) * TOKENS
        end = min(first + TOKENS, length)
        own, state = at(x, row * x_row + start * x_token), at(states, sequence * state_stride)
        for position in range(first, end):
            _preactivate(own, x_token, state, taps, bias, channels, width, position, 0, channels, pre)
            out = at(y, (row * seqlen + start + position) * channels)
            if activate:
                for c in range(channels):
                    store(out, c, vector.silu(pre[c]))
            else:
                for c in range(channels):
                    store(out, c, pre[c])
        if end == length:
            for i in range(width - 1):
                last = _row(own, x_token, state, channels, width - 1, length - (width - 1) + i)
                out = at(finals, (sequence * (width - 1) + i) * channels)
                for c in range(channels):
                    out[c] = last[c]


def _forward_float32(p):
    _forward(p, vector.float32(p[2]), vector.float32(p[5]), vector.float32(p[8]), vector.float32(p[10]))


def _forward_bfloat16(p):
    _forward(p, vector.bfloat16(p[2]), vector.bfloat16(p[5]), vector.bfloat16(p[8]), vector.bfloat16(p[10]))


@device_function
def _sum_products(total, dpre, x, stride, states, channels, halo, shift, first, end, start, count):
    """`total[:count] += sum over positions of dp[position] v[position + shift]`, four positions at a time."""
    position = first
    while position + 4 <= end:
        g0 = at(dpre, (position - first) * CHANNELS)
        g1, g2, g3 = at(g0, CHANNELS), at(g0, 2 * CHANNELS), at(g0, 3 * CHANNELS)
        v0 = at(_row(x, stride, states, channels, halo, position + shift), start)
        v1 = at(_row(x, stride, states, channels, halo, position + shift + 1), start)
        v2 = at(_row(x, stride, states, channels, halo, position + shift + 2), start)
        v3 = at(_row(x, stride, states, channels, halo, position + shift + 3), start)
        for c in range(count):
            value = g0[c] * load(v0, c) + g1[c] * load(v1, c)
            total[c] += value + (g2[c] * load(v2, c) + g3[c] * load(v3, c))
        position += 4
    while position < end:
        g, v = (
            at(dpre, (position - first) * CHANNELS),
            at(_row(x, stride, states, channels, halo, position + shift), start),
        )
        for c in range(count):
            total[c] += g[c] * load(v, c)
        position += 1


@device_function
def _backward_tile(
    x, stride, dy, dy_stride, dx, taps, bias, states, dstates, dfinals, has, sums, dpre,
    first, end, length, start, count, channels, width, activate,
):  # fmt: skip
    """A tile's part of every gradient; `dpre[i]` belongs to position `first + i`."""
    halo = width - 1
    for position in range(first, end + halo):
        own, g = at(dpre, (position - first) * CHANNELS), at(dy, position * dy_stride + start)
        if position < 0 or position >= length:
            for c in range(count):
                own[c] = ZERO
        elif activate:
            _preactivate(x, stride, states, taps, bias, channels, width, position, start, count, own)
            for c in range(count):
                s = vector.sigmoid(own[c])
                own[c] = load(g, c) * (s + own[c] * s * (ONE - s))
        else:
            for c in range(count):
                own[c] = load(g, c)
    if first >= 0:
        for j in range(width):
            tap = at(sums, j * channels + start)
            _sum_products(tap, dpre, x, stride, states, channels, halo, j - halo, first, end, start, count)
        total = at(sums, width * channels + start)
        for position in range(first, end):
            own = at(dpre, (position - first) * CHANNELS)
            for c in range(count):
                total[c] += own[c]
    total = at(dpre, (TOKENS + halo) * CHANNELS)
    for position in range(first, end):
        w = at(taps, start)
        newest = at(dpre, (position - first + halo) * CHANNELS)
        if width == 4:
            g1, g2, g3 = at(newest, -CHANNELS), at(newest, -2 * CHANNELS), at(newest, -3 * CHANNELS)
            w1, w2, w3 = at(w, channels), at(w, 2 * channels), at(w, 3 * channels)
            for c in range(count):
                total[c] = w[c] * newest[c] + w1[c] * g1[c] + w2[c] * g2[c] + w3[c] * g3[c]
        else:
            for c in range(count):
                total[c] = w[c] * newest[c]
            for j in range(1, width):
                w, g = at(taps, j * channels + start), at(newest, -j * CHANNELS)
                for c in range(count):
                    total[c] += w[c] * g[c]
        if has & 2 and position >= length - halo:
            carried = at(dfinals, (position - length + halo) * channels + start)
            for c in range(count):
                total[c] += load(carried, c)
        if position >= 0:
            out = at(dx, position * channels + start)
        else:
            out = at(dstates, (halo + position) * channels + start)
        for c in range(count):
            store(out, c, total[c])


@device_function
def _backward(p, x, dy, dx, states, dstates, dfinals):
    x_row, x_token, dy_row, dy_token = p[3], p[4], p[6], p[7]
    taps, bias, state_stride, segments = vector.float32(p[9]), vector.float32(p[10]), p[12], vector.int64(p[17])
    nseq, blocks, seqlen, channels, width, activate = p[18], p[19], p[20], p[21], p[22], p[23]
    has = (1 if p[13] else 0) + (2 if p[14] else 0)
    begin, stop, worker = share(p, blocks)
    sums = at(vector.float32(p[15]), worker * (width + 1) * channels)
    dpre = at(vector.float32(p[16]), worker * (TOKENS + width) * CHANNELS)
    sequence = 0
    for block in range(begin, stop):
        sequence = sequence_of(segments, nseq, block, sequence)
        row, begins, length = segments[4 * sequence], segments[4 * sequence + 1], segments[4 * sequence + 2]
        first = (block - segments[4 * sequence + 3]) * TOKENS
        end = min(first + TOKENS, length)
        x_own, dy_own = at(x, row * x_row + begins * x_token), at(dy, row * dy_row + begins * dy_token)
        dx_own, state = at(dx, (row * seqlen + begins) * channels), at(states, sequence * state_stride)
        before = sequence * (width - 1) * channels
        dstate, dfinal = at(dstates, before), at(dfinals, before)
        # The first block of a sequence does its initial state too.
        parts = 2 if first == 0 and has & 1 else 1
        for start in range(0, channels, CHANNELS):
            count = min(CHANNELS, channels - start)
            for part in range(parts):
                low, high = (first, end) if part == 0 else (1 - width, 0)
                _backward_tile(
                    x_own, x_token, dy_own, dy_token, dx_own, taps, bias, state, dstate, dfinal, has, sums, dpre,
                    low, high, length, start, count, channels, width, activate,
                )  # fmt: skip


def _backward_float32(p):
    pointers = vector.float32(p[2]), vector.float32(p[5]), vector.float32(p[8])
    states = vector.float32(p[11]), vector.float32(p[13]), vector.float32(p[14])
    _backward(p, *pointers, *states)


def _backward_bfloat16(p):
    pointers = vector.bfloat16(p[2]), vector.bfloat16(p[5]), vector.bfloat16(p[8])
    states = vector.bfloat16(p[11]), vector.bfloat16(p[13]), vector.bfloat16(p[14])
    _backward(p, *pointers, *states)


_FORWARD = {torch.float32: Kernel(_forward_float32), torch.bfloat16: Kernel(_forward_bfloat16)}
_BACKWARD = {torch.float32: Kernel(_backward_float32), torch.bfloat16: Kernel(_backward_bfloat16)}
