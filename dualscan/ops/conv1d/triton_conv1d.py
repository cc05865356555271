# ruff: noqa: RUF005 (Triton's tuples can be added, not unpacked)
"""The convolution on a GPU: every program walks a segment of time with the last inputs in registers.

A program holds BLOCK channels. It reads each input row once, keeps the `width - 1` rows before it, and so needs neither
shifted loads nor shared memory; several rows are loaded before the first is used. The backward walks forward in time
too: with g the gradient of the pre-activation, which it computes again,

    dx[t - halo] = sum_j weight[j] g[t - j],     halo = width - 1,

needs the last rows of g only, and what falls before a sequence's start is the gradient of its initial state. The
gradients of weight and bias add up in registers over the segment, and over the segments in a second kernel, in a fixed
order.

A packed row is cut into the same segments; a program goes over the sequences in its own.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher, row_alignment
from dualscan.ops.triton_common import sigmoid, silu_slope, sum_partials

# Channels of a program, warps and rows loaded at once: (forward, backward).
TILES = ((256, 4, 8), (128, 1, 8))
# Programs of a multiprocessor: at least so many forward, at most so many backward, where all of them run at once. What
# is left over for a second wave would take as long as a whole one. Twelve fit with 168 registers a thread; inputs of
# 16 bits need no more unpacked, and packed or with states are held to it without spilling. Those of 32 bits take 252.
OCCUPANCY = (32, 12)
REGISTERS = 168
# The fewest tokens worth a segment: each reads `halo` rows twice.
SHORTEST_SEGMENT = 32
STEP_BLOCK = 256
_SIZES = ["x_b", "x_l", "x_c", "w_c", "w_j", "s_n", "s_c", "s_k", "seqlen", "channels", "nseq", "segment", "segments"]


@triton.jit
def starts_before(cu_seqlens, nseq, token):
    """How many of the nseq sequences start before `token`."""
    low, high = 0, nseq
    while low < high:
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) < token
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def sequences_of(cu_seqlens, nseq, low, high, seqlen):
    """The sequences `[first, last)` that a segment `[low, high)` works on; empty ones belong to where they stand."""
    first = starts_before(cu_seqlens, nseq, low)
    first -= (first > 0) & (tl.load(cu_seqlens + first) > low)
    last = starts_before(cu_seqlens, nseq, high)
    return first, tl.where(high == seqlen, nseq, last)


@triton.jit
def past(x, initial, token, begin, x_l, s_k, inside, HALO: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """The input of `token`, float32, from the initial state where that is before the sequence's begin."""
    row = tl.load(x + token * x_l, mask=inside & (token >= begin), other=0.0).to(tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + (HALO + token - begin) * s_k, mask=inside & (token < begin), other=0.0)
        row = tl.where(token < begin, state.to(tl.float32), row)
    return row


@triton.jit
def filter_of(weight, bias, c, w_c, w_j, inside, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The taps, oldest first, and the bias of a program's channels."""
    taps = ()
    for j in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + c * w_c + j * w_j, mask=inside, other=0.0).to(tl.float32),)
    shift = tl.zeros(c.shape, tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    return taps, shift


@triton.jit
def preactivate(taps, shift, window, row, WIDTH: tl.constexpr):
    """`bias + sum_j weight[j] x[t - halo + j]`, and the window one token on."""
    pre = shift
    for j in tl.static_range(WIDTH - 1):
        pre += taps[j] * window[j]
    pre += taps[WIDTH - 1] * row
    if WIDTH > 1:
        window = window[1:] + (row,)
    return pre, window


@triton.jit
def load_rows(x, first, limit, x_l, inside, ROWS: tl.constexpr):
    """The rows of ROWS tokens, as they are; zeros from `limit` on."""
    x += first * x_l
    rows = ()
    for u in tl.static_range(ROWS):
        rows = rows + (tl.load(x + u * x_l, mask=inside & (first + u < limit), other=0.0),)
    return rows


@triton.jit
def convolve_rows(
    rows, y, window, taps, shift, inside, first, high, y_l,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """The results of ROWS tokens from `first` on; CUT: those from `high` on are none. Returns the window after them."""
    y += first * y_l
    for u in tl.static_range(ROWS):
        out, window = preactivate(taps, shift, window, rows[u].to(tl.float32), WIDTH)
        if SILU:
            out *= sigmoid(out)
        live = inside & (first + u < high) if CUT else inside
        tl.store(y + u * y_l, out.to(y.dtype.element_ty), mask=live)
    return window


@triton.jit
def convolve(
    x, y, initial, final, taps, shift, inside, low, high, begin, end, x_l, y_l, s_k, f_k,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Tokens `[low, high)` of the sequence `[begin, end)`; its final state too, if they are its last."""
    HALO: tl.constexpr = WIDTH - 1
    rows = load_rows(x, low, high, x_l, inside, ROWS)
    window = ()
    for k in tl.static_range(HALO):
        window = window + (past(x, initial, low - HALO + k, begin, x_l, s_k, inside, HALO, HAS_INITIAL),)
    whole = low + (high - low) // ROWS * ROWS
    for first in range(low, whole, ROWS):
        # The next rows are on their way while these are computed.
        following = load_rows(x, first + ROWS, high, x_l, inside, ROWS)
        window = convolve_rows(rows, y, window, taps, shift, inside, first, high, y_l, WIDTH, ROWS, SILU, False)
        rows = following
    if whole < high:
        convolve_rows(rows, y, window, taps, shift, inside, whole, high, y_l, WIDTH, ROWS, SILU, True)
    if high == end:
        for k in tl.static_range(HALO):
            row = past(x, initial, end - HALO + k, begin, x_l, s_k, inside, HALO, HAS_INITIAL)
            tl.store(final + k * f_k, row.to(final.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    x, weight, bias, initial, cu_seqlens, y, final,
    x_b: tl.int64, x_l: tl.int64, x_c: tl.int64, w_c: tl.int64, w_j: tl.int64,
    s_n: tl.int64, s_c: tl.int64, s_k: tl.int64,
    seqlen: tl.int32, channels: tl.int32, nseq: tl.int32, segment: tl.int32, segments: tl.int32,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, ADJACENT: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid `blocks of channels x segments x batch`, in this order. Channels and strides of x count in ALIGN."""
    channels, x_b, x_l = channels * ALIGN, x_b * ALIGN, x_l * ALIGN
    wide = channels.to(tl.int64)  # as a stride
    blocks = tl.cdiv(channels, BLOCK)
    piece = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    batch, low = (piece // segments).to(tl.int64), (piece % segments) * segment
    high = tl.minimum(low + segment, seqlen)
    x += batch * x_b + (c if ADJACENT else c * x_c)
    y += batch * seqlen * wide + c
    taps, shift = filter_of(weight, bias, c, w_c, w_j, inside, WIDTH, HAS_BIAS)
    HALO: tl.constexpr = WIDTH - 1
    if PACKED:
        first, last = sequences_of(cu_seqlens, nseq, low, high, seqlen)
        for sequence in range(first, last):
            begin, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
            convolve(
                x, y, initial + sequence * s_n + c * s_c if HAS_INITIAL else initial,
                final + sequence * wide * HALO + c, taps, shift, inside,
                tl.maximum(low, begin), tl.minimum(high, end), begin, end, x_l, wide, s_k, wide,
                WIDTH, ROWS, SILU, HAS_INITIAL,
            )  # fmt: skip
    else:
        convolve(
            x, y, initial + batch * s_n + c * s_c if HAS_INITIAL else initial,
            final + batch * wide * HALO + c, taps, shift, inside, low, high, 0, seqlen, x_l, wide, s_k, wide,
            WIDTH, ROWS, SILU, HAS_INITIAL,
        )  # fmt: skip


@triton.jit
def differentiate_rows(
    rows, outer, dx, dinitial, dfinal, window, grads, dtaps, dshift, taps, shift, inside, first, low, high, begin, end,
    dx_l, di_k, df_k,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Takes x and dy of tokens from `first` on, and gives dx of those `HALO` before; CUT: some are outside the run."""
    HALO: tl.constexpr = WIDTH - 1
    dx += (first - HALO) * dx_l
    limit = tl.minimum(high + HALO, end)
    for u in tl.static_range(ROWS):
        token = first + u
        row, g = rows[u].to(tl.float32), outer[u].to(tl.float32)
        before = window
        pre, window = preactivate(taps, shift, window, row, WIDTH)
        if SILU:
            g *= silu_slope(pre, sigmoid(pre))
        own = g
        if CUT:
            g = tl.where(token < limit, g, 0.0)
            own = tl.where(token < high, g, 0.0)
        dshift += own
        sums = ()
        for j in tl.static_range(HALO):
            sums = sums + (dtaps[j] + own * before[j],)
        dtaps = sums + (dtaps[HALO] + own * row,)
        result = taps[0] * g
        for j in tl.static_range(HALO):
            result += taps[HALO - j] * grads[j]
        if WIDTH > 1:
            grads = grads[1:] + (g,)
        if CUT:
            place = token - HALO
            if HAS_DFINAL:
                share = place - (end - HALO)
                live = inside & (share >= 0) & (share < HALO)
                result += tl.load(dfinal + share * df_k, mask=live, other=0.0).to(tl.float32)
            out = result.to(dx.dtype.element_ty)
            tl.store(dx + u * dx_l, out, mask=inside & (place >= low) & (place < high))
            if HAS_INITIAL:
                live = inside & (place < begin) & (low == begin)
                tl.store(dinitial + (place - begin + HALO) * di_k, out, mask=live)
        else:
            tl.store(dx + u * dx_l, result.to(dx.dtype.element_ty), mask=inside)
    return window, grads, dtaps, dshift


@triton.jit
def differentiate(
    dy, x, dx, initial, dinitial, dfinal, taps, shift, dtaps, dshift, inside, low, high, begin, end,
    dy_l, x_l, dx_l, s_k, di_k, df_k,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr,
):  # fmt: skip
    """The counterpart of `convolve`: dx of tokens `[low, high)`, their shares of dtaps and dshift, and dinitial."""
    HALO: tl.constexpr = WIDTH - 1
    # dx of the last tokens needs g of the next HALO, which may belong to the next segment.
    limit = tl.minimum(high + HALO, end)
    if WIDTH > 1:
        head_rows = load_rows(x, low, limit, x_l, inside, HALO)
        head_outer = load_rows(dy, low, limit, dy_l, inside, HALO)
    start = low + HALO
    rows = load_rows(x, start, limit, x_l, inside, ROWS)
    outer = load_rows(dy, start, limit, dy_l, inside, ROWS)
    window, grads = (), ()
    for k in tl.static_range(HALO):
        window = window + (past(x, initial, low - HALO + k, begin, x_l, s_k, inside, HALO, HAS_INITIAL),)
        grads = grads + (tl.zeros(shift.shape, tl.float32),)
    # Tokens whose dx is another segment's or the initial state's, then those with nothing to mind, then the last.
    if WIDTH > 1:
        window, grads, dtaps, dshift = differentiate_rows(
            head_rows, head_outer, dx, dinitial, dfinal, window, grads, dtaps, dshift, taps, shift, inside,
            low, low, high, begin, end, dx_l, di_k, df_k, WIDTH, HALO, SILU, HAS_INITIAL, HAS_DFINAL, True,
        )  # fmt: skip
    whole = start + tl.maximum(high - start, 0) // ROWS * ROWS
    for first in range(start, whole, ROWS):
        # The next rows are on their way while these are computed.
        next_rows = load_rows(x, first + ROWS, limit, x_l, inside, ROWS)
        next_outer = load_rows(dy, first + ROWS, limit, dy_l, inside, ROWS)
        window, grads, dtaps, dshift = differentiate_rows(
            rows, outer, dx, dinitial, dfinal, window, grads, dtaps, dshift, taps, shift, inside,
            first, low, high, begin, end, dx_l, di_k, df_k, WIDTH, ROWS, SILU, HAS_INITIAL, HAS_DFINAL, False,
        )  # fmt: skip
        rows, outer = next_rows, next_outer
    for first in range(whole, high + HALO, ROWS):
        window, grads, dtaps, dshift = differentiate_rows(
            rows, outer, dx, dinitial, dfinal, window, grads, dtaps, dshift, taps, shift, inside,
            first, low, high, begin, end, dx_l, di_k, df_k, WIDTH, ROWS, SILU, HAS_INITIAL, HAS_DFINAL, True,
        )  # fmt: skip
        rows = load_rows(x, first + ROWS, limit, x_l, inside, ROWS)
        outer = load_rows(dy, first + ROWS, limit, dy_l, inside, ROWS)
    return dtaps, dshift


@triton.jit(do_not_specialize=[*_SIZES, "dy_b", "dy_l", "dy_c", "df_n", "df_c", "df_k"])
def backward_kernel(
    dy, x, weight, bias, initial, cu_seqlens, dfinal, dx, dinitial, partial,
    x_b: tl.int64, x_l: tl.int64, x_c: tl.int64, w_c: tl.int64, w_j: tl.int64,
    s_n: tl.int64, s_c: tl.int64, s_k: tl.int64,
    dy_b: tl.int64, dy_l: tl.int64, dy_c: tl.int64, df_n: tl.int64, df_c: tl.int64, df_k: tl.int64,
    seqlen: tl.int32, channels: tl.int32, nseq: tl.int32, segment: tl.int32, segments: tl.int32,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, ADJACENT: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr,
    PACKED: tl.constexpr, LIKE_X: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`. `partial` is (segments * batch, WIDTH + HAS_BIAS, channels) float32; `dx` lies in plain
    order, or with LIKE_X as x does."""
    channels, x_b, x_l, dy_b, dy_l = channels * ALIGN, x_b * ALIGN, x_l * ALIGN, dy_b * ALIGN, dy_l * ALIGN
    wide = channels.to(tl.int64)  # as a stride
    blocks = tl.cdiv(channels, BLOCK)
    piece = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    batch, low = (piece // segments).to(tl.int64), (piece % segments) * segment
    high = tl.minimum(low + segment, seqlen)
    x += batch * x_b + (c if ADJACENT else c * x_c)
    dy += batch * dy_b + (c if ADJACENT else c * dy_c)
    dx_l = x_l if LIKE_X else wide
    dx += (batch * x_b if LIKE_X else batch * seqlen * wide) + c
    taps, dshift = filter_of(weight, bias, c, w_c, w_j, inside, WIDTH, HAS_BIAS)
    shift = dshift
    dshift = tl.zeros([BLOCK], tl.float32)
    dtaps = ()
    for _ in tl.static_range(WIDTH):
        dtaps = dtaps + (tl.zeros([BLOCK], tl.float32),)
    HALO: tl.constexpr = WIDTH - 1
    if PACKED:
        first, last = sequences_of(cu_seqlens, nseq, low, high, seqlen)
        for sequence in range(first, last):
            begin, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
            dtaps, dshift = differentiate(
                dy, x, dx, initial + sequence * s_n + c * s_c if HAS_INITIAL else initial,
                dinitial + sequence * wide * HALO + c if HAS_INITIAL else dinitial,
                dfinal + sequence * df_n + c * df_c if HAS_DFINAL else dfinal, taps, shift, dtaps, dshift, inside,
                tl.maximum(low, begin), tl.minimum(high, end), begin, end, dy_l, x_l, dx_l, s_k, wide, df_k,
                WIDTH, ROWS, SILU, HAS_INITIAL, HAS_DFINAL,
            )  # fmt: skip
    else:
        dtaps, dshift = differentiate(
            dy, x, dx, initial + batch * s_n + c * s_c if HAS_INITIAL else initial,
            dinitial + batch * wide * HALO + c if HAS_INITIAL else dinitial,
            dfinal + batch * df_n + c * df_c if HAS_DFINAL else dfinal, taps, shift, dtaps, dshift, inside,
            low, high, 0, seqlen, dy_l, x_l, dx_l, s_k, wide, df_k,
            WIDTH, ROWS, SILU, HAS_INITIAL, HAS_DFINAL,
        )  # fmt: skip
    partial += piece * (WIDTH + HAS_BIAS) * wide + c
    for j in tl.static_range(WIDTH):
        tl.store(partial + j * channels, dtaps[j], mask=inside)
    if HAS_BIAS:
        tl.store(partial + WIDTH * channels, dshift, mask=inside)


@triton.jit(do_not_specialize=["x_b", "x_c", "w_c", "w_j", "s_n", "s_c", "s_k", "channels"])
def step_kernel(
    x, weight, bias, initial, y, final,
    x_b: tl.int64, x_c: tl.int64, w_c: tl.int64, w_j: tl.int64, s_n: tl.int64, s_c: tl.int64, s_k: tl.int64,
    channels: tl.int32,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """One token a sequence. Grid `blocks of channels x batch`, in this order. `final` may be `initial`."""
    HALO: tl.constexpr = WIDTH - 1
    blocks = tl.cdiv(channels, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    row = tl.load(x + batch * x_b + c * x_c, mask=inside, other=0.0)
    taps, out = filter_of(weight, bias, c, w_c, w_j, inside, WIDTH, HAS_BIAS)
    for k in tl.static_range(HALO):
        state = tl.zeros([BLOCK], x.dtype.element_ty)
        if HAS_INITIAL:
            state = tl.load(initial + batch * s_n + c * s_c + k * s_k, mask=inside, other=0.0)
        out += taps[k] * state.to(tl.float32)
        if k > 0:
            tl.store(final + (batch * HALO + k - 1) * channels + c, state, mask=inside)
    if WIDTH > 1:
        tl.store(final + (batch * HALO + HALO - 1) * channels + c, row, mask=inside)
    out += taps[HALO] * row.to(tl.float32)
    if SILU:
        out *= sigmoid(out)
    tl.store(y + batch * channels + c, out.to(y.dtype.element_ty), mask=inside)


_forward, _backward, _step = Launcher(forward_kernel), Launcher(backward_kernel), Launcher(step_kernel)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """`y` and the final states; arguments as in `reference.causal_conv1d_reference`."""
    batch, seqlen, channels = x.shape
    width = weight.shape[1]
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty((nseq, width - 1, channels), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y, _unchanged(final, initial_states)
    states = (0, 0, 0) if initial_states is None else initial_states.stride()
    bias, cu_seqlens = _dense(bias), _dense(cu_seqlens)
    present = (silu, bias is not None, initial_states is not None)
    with _triton.on_device(x):
        if seqlen == 1 and cu_seqlens is None:
            x_b, _, x_c = x.stride()
            _step(
                (batch * -(-channels // STEP_BLOCK), 1, 1), (x, weight, bias, initial_states, y, final),
                (x_b, x_c, *weight.stride(), *states, channels), (width, STEP_BLOCK, *present), 4,
            )  # fmt: skip
        else:
            strides = x.stride()
            wanted = OCCUPANCY[0] * _triton.multiprocessors(x.device)
            cut = _cut(x.shape, strides, strides, nseq, TILES[0], wanted)
            _forward(
                cut.grid, (x, weight, bias, initial_states, cu_seqlens, y, final),
                (*cut.x, *weight.stride(), *states, *cut.sizes),
                (width, *cut.constants, *present, cu_seqlens is not None), cut.warps,
            )  # fmt: skip
    return y, final.transpose(1, 2)


def step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """SiLU of the convolution of one token x `(batch, channels)`; the state takes it in, in place.

    `state` is (batch, channels, width - 1), time-major in memory.
    """
    (batch, channels), width = x.shape, weight.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with _triton.on_device(x):
        _step(
            (batch * -(-channels // STEP_BLOCK), 1, 1), (x, weight, _dense(bias), state, y, state),
            (*x.stride(), *weight.stride(), *state.stride(), channels),
            (width, STEP_BLOCK, True, bias is not None, True), 4,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, dfinal_states: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None,
    cu_seqlens: Tensor | None, silu: bool, *, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`dx, dweight, dbias, dinitial_states`, as `chunked.backward` has them.

    With a `dx` of x's strides, whose channels are adjacent, the gradient goes there.
    """
    batch, _, channels = x.shape
    width = weight.shape[1]
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    like_x = dx is not None
    if dx is None:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
    dinitial = None
    if initial_states is not None:
        dinitial = torch.empty((nseq, width - 1, channels), dtype=x.dtype, device=x.device)
    dfinal = dfinal_states if dfinal_states.numel() else None
    absent = x.new_empty(0)
    if x.numel() == 0:
        dstates = absent if dinitial is None else _unchanged(dinitial, dfinal)
        return dx, dweight.zero_(), absent if dbias is None else dbias.zero_(), dstates
    states = (0, 0, 0) if initial_states is None else initial_states.stride()
    dstates = (0, 0, 0) if dfinal is None else dfinal.stride()
    bias, cu_seqlens = _dense(bias), _dense(cu_seqlens)
    present = (silu, bias is not None, initial_states is not None, dfinal is not None)
    with _triton.on_device(x):
        wanted = OCCUPANCY[1] * _triton.multiprocessors(x.device)
        cut = _cut(x.shape, x.stride(), dy.stride(), nseq, TILES[1], wanted, at_most=True)
        lanes = width + (bias is not None)
        partial = torch.empty((batch * cut.segments, lanes, channels), dtype=torch.float32, device=x.device)
        _backward(
            cut.grid, (dy, x, weight, bias, initial_states, cu_seqlens, dfinal, dx, dinitial, partial),
            (*cut.x, *weight.stride(), *states, *cut.other, *dstates, *cut.sizes),
            (width, *cut.constants, *present, cu_seqlens is not None, like_x), cut.warps,
            REGISTERS if x.element_size() == 2 else None,
        )  # fmt: skip
        sum_partials(partial, dweight, dbias)
    dstates = absent if dinitial is None else dinitial.transpose(1, 2)
    return dx, dweight, absent if dbias is None else dbias, dstates


def _dense(t: Tensor | None) -> Tensor | None:
    """A vector that the kernels may walk."""
    return None if t is None else t.contiguous()


def _unchanged(states: Tensor, before: Tensor | None) -> Tensor:
    """Fills `states`, time-major, with what is handed on where there is no token."""
    if before is None:
        return states.zero_().transpose(1, 2)
    return states.transpose(1, 2).copy_(before)


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a call is cut into programs.

    Attributes:
        grid, warps: of the launch.
        segments: a row has.
        x, other: strides of batch, time and channels; the first two count in what all strides are multiples of.
        sizes: tokens, channels (counted likewise), sequences, tokens a segment, segments a row.
        constants: channels and rows of a program, what all strides are multiples of, and whether channels are adjacent
            in memory.
    """

    grid: tuple[int, int, int]
    warps: int
    segments: int
    x: tuple[int, int, int]
    other: tuple[int, int, int]
    sizes: tuple[int, int, int, int, int]
    constants: tuple[int, int, int, bool]


@lru_cache(maxsize=1024)
def _cut(
    shape: tuple[int, ...], x: tuple[int, ...], other: tuple[int, ...], nseq: int, tile: tuple[int, int, int],
    wanted: int, at_most: bool = False,
) -> _Cut:  # fmt: skip
    """For tensors of one shape and of the strides `x` and `other`, into about `wanted` programs, or at most as many."""
    (batch, seqlen, channels), (block, warps, rows) = shape, tile
    adjacent = x[2] == 1 and other[2] == 1
    align = row_alignment(channels, *x[:2], *other[:2]) if adjacent else 1
    blocks = -(-channels // block)
    segments = max(wanted // (blocks * batch), 1) if at_most else -(-wanted // (blocks * batch))
    segments = min(segments, -(-seqlen // SHORTEST_SEGMENT))
    segment = -(-seqlen // (segments * rows)) * rows
    segments = -(-seqlen // segment)
    return _Cut(
        grid=(blocks * segments * batch, 1, 1),
        warps=warps,
        segments=segments,
        x=(x[0] // align, x[1] // align, x[2]),
        other=(other[0] // align, other[1] // align, other[2]),
        sizes=(seqlen, channels // align, nseq, segment, segments),
        constants=(block, rows, align, adjacent),
    )
