# ruff: noqa: RUF005 (Triton's tuples can be added, not unpacked)
"""Decoding on a GPU: one token through a Mamba-2 layer in four launches, for the layers that most models are made of.

What `triton_step` does in six, with as few passes over memory as the sums between rows of a matrix allow:

1. `add_kernel` adds the layer before to the residual stream and normalises;
2. `product_kernel` multiplies with the input matrix; x, B and C go through the convolution before they are stored;
3. `state_kernel` updates the state, or `deferred_kernel` defers that, and gates what it reads from it;
4. `product_kernel` multiplies with the output matrix.

The gated norm needs a sum over all heads, which is known after the third. Its division by the root mean square is the
same factor for a whole row, so that it passes through the product, W (w g / rms) = (W (w g)) / rms, to the first launch
of the layer after. So does the sum of the output matrix's products with parts of the row: as one, they are too few
programs to read the matrix fast. What waits for both is a `Pieces`. Sums have a fixed order: results repeat bitwise.

What a token costs with many rows is the state, read and written. The duality of the paper (arXiv 2405.21060, section 6)
takes most of the writing out of it. Of a state S that was last written before token 0, token j reads

    y_j = exp(a_0 + ... + a_j) S C_j + sum_{i <= j} exp(a_{i+1} + ... + a_j) dt_i (C_j . B_i) x_i + D x_j

with a the log-decays: the chunked form, at decoding time. So a `Deferred` state is written once every `KEPT` tokens,
whose x, B, dt and a are `Kept` until then, and a bfloat16 state is rounded as seldom.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher
from dualscan.ops.decode import Parameters, Sizes
from dualscan.ops.ssd.triton_scan import LOG2E, LOWEST, step_size
from dualscan.ops.triton_common import sigmoid

# Of the matrices. g is not normalised where it is rounded: float16 might not hold it. float32 has cuBLAS.
DTYPES = (torch.bfloat16,)
# Rows of a batch that a product's tile holds.
MOST_ROWS = 32
# The products: rows of the matrix and columns at once, loads in flight, warps, and parts of the output matrix's row
# (H100, 2.7B, 2026-11-28; batch 1 and 32 have the same optimum).
WIDE, DEEP, STAGES, WARPS, PARTS = 64, 128, 4, 4, 4
# Numbers of a head's state that a program has, warps, and the most registers, by the state's dtype (likewise).
STATE_TILES = {torch.bfloat16: (2048, 1, None), torch.float32: (8192, 8, None)}
# The same where it is deferred: of one warp, to which `deferred_kernel` is laid out.
DEFERRED_TILES = {torch.bfloat16: (2048, 1, 96), torch.float32: (2048, 1, 112)}
# Columns of a row that 4 threads load at once, 16 bytes of bfloat16 each.
LANES = 32
# Rows from which on states are deferred: fewer wait for launches and not for memory.
DEFERRED_ROWS = 4
# Tokens from one write of a state to the next, a power of two. Beside reading S, a token reads what is kept, for a head
# of 64 channels and 128 columns 0.8% of a bfloat16 state for each of K / 2 tokens on average, and writes S / K. By the
# bytes 16 is best, by the H100's clock 8, because what is kept is also computed with. All of it takes 7% of the memory
# of bfloat16 states, 3.5% of float32 ones.
KEPT = 8
STATES = (16, 32, 64, 128, 256)
ADD_WARPS = 8


class Pieces(NamedTuple):
    """A layer's output that is still to be added up and normalised: `pieces.sum(0) / rms`.

    Attributes:
        pieces: `(PARTS, batch, d_model)` float32.
        squares: `(batch, blocks)` float32, of parts of the row; rms^2 = squares.sum(1) / d_inner + eps.
        d_inner: width of the row.
        eps: the gated norm's.
    """

    pieces: Tensor
    squares: Tensor
    d_inner: int
    eps: float


class Kept(NamedTuple):
    """The tokens since a state was last written; slots from the first that is free on are never read.

    Attributes:
        x: `(batch, KEPT, d_inner)` in the matrices' dtype, behind the convolution as the next.
        B: `(batch, KEPT, ngroups * d_state)` likewise.
        dt: `(batch, nheads, KEPT)` float32, step sizes.
        sums: `(batch, nheads, KEPT)` float64, log2 of the decay from S up to each token: what later tokens take the
            difference to, which is exact enough whatever was forgotten before.
        count: `(1,)` int32, tokens so far, one for all layers: `count % KEPT` of them are kept. It lies on the device,
            so that a graph of a step serves every token.
    """

    x: Tensor
    B: Tensor
    dt: Tensor
    sums: Tensor
    count: Tensor


class Deferred(NamedTuple):
    """A layer's states, that of SSD as it was before the tokens in `kept`."""

    conv: Tensor
    ssm: Tensor
    kept: Kept


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x, weight, out, conv, taps, bias, rows: tl.int32, share: tl.int32,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, BEGIN: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
    M: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`out` (PARTS, rows, WIDTH) = x (rows, DEPTH) weight^T, one part for every `share` columns of the weight.

    Columns BEGIN to BEGIN + CHANNELS of out are those of the convolution: its state `conv` (rows, TAPS - 1, CHANNELS)
    takes the product in, and SiLU of the convolved value is stored. Grid `(cdiv(WIDTH, WIDE), PARTS)`.
    """
    block = tl.program_id(0)
    if CHANNELS > 0:
        # Those with the convolution begin first: they have more to do.
        block = (block + BEGIN // WIDE) % tl.num_programs(0)
    n = block * WIDE + tl.arange(0, WIDE)
    m, k = tl.arange(0, M), tl.arange(0, DEEP)
    live = (m < rows)[None, :] & (n < WIDTH)[:, None]
    start = tl.program_id(1) * (DEPTH // PARTS)
    # Rows beyond the last repeat it: nothing of them is stored, and no load needs a mask.
    weights = weight + tl.minimum(n, WIDTH - 1).to(tl.int64)[:, None] * DEPTH + start + k[None, :]
    values = x + tl.minimum(m, rows - 1)[:, None] * DEPTH + start + k[None, :]
    if CHANNELS > 0:
        # What the convolution needs comes while the matrix does.
        c = n - BEGIN
        mixed = (c >= 0) & (c < CHANNELS)
        inside = live & mixed[:, None]
        place = conv + m[None, :] * ((TAPS - 1) * CHANNELS) + c[:, None]
        past, factors = (), ()
        for i in tl.static_range(TAPS):
            factors = factors + (tl.load(taps + c * TAPS + i, mask=mixed, other=0.0).to(tl.float32)[:, None],)
            if i < TAPS - 1:
                past = past + (tl.load(place + i * CHANNELS, mask=inside, other=0.0),)
        shift = tl.load(bias + c, mask=mixed, other=0.0).to(tl.float32)[:, None]
    result = tl.zeros([WIDE, M], tl.float32)
    for first in tl.range(0, share, DEEP, num_stages=STAGES):
        result = tl.dot(tl.load(weights + first), tl.trans(tl.load(values + first)), result)
    if CHANNELS > 0:
        new = result.to(conv.dtype.element_ty)
        total = shift + factors[TAPS - 1] * new.to(tl.float32)
        # An element of the state is read and overwritten by one thread: the tile has no fewer elements than threads
        # can load at once.
        for i in tl.static_range(TAPS - 1):
            total += factors[i] * past[i].to(tl.float32)
            if i > 0:
                tl.store(place + (i - 1) * CHANNELS, past[i], mask=inside)
        tl.store(place + (TAPS - 2) * CHANNELS, new, mask=inside)
        result = tl.where(mixed[:, None], total * sigmoid(total), result)
    target = out + (tl.program_id(1) * rows + m[None, :]) * WIDTH + n[:, None]
    tl.store(target, result.to(out.dtype.element_ty), mask=live)


@triton.jit
def state_kernel(
    state, projected, A_log, dt_bias, D, weight, gated, squares,
    NHEADS: tl.constexpr, GROUPS: tl.constexpr, HEADDIM: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One token: P rows of one head's state (HEADDIM, N), changed where it is. Grid `(NHEADS * HEADDIM / P, batch)`.

    `projected` (batch, columns) holds z, x, B, C and dt, after the convolution. With y the output of SSD:
    g = y SiLU(z), `gated` (batch, NHEADS * HEADDIM) = weight g, and `squares` (batch, programs) are sums of g^2.
    """
    INNER: tl.constexpr = NHEADS * HEADDIM
    BLOCKS: tl.constexpr = HEADDIM // P
    b, h, n = tl.program_id(1).to(tl.int64), tl.program_id(0) // BLOCKS, tl.arange(0, N)
    p, first, group = tl.arange(0, P), tl.program_id(0) * P, h // (NHEADS // GROUPS)
    place = state + (b * INNER + first) * N + (p[:, None] * N + n[None, :])
    previous = tl.load(place)
    row = projected + b * (2 * INNER + 2 * GROUPS * N + NHEADS)
    here, key_place = row + first, row + 2 * INNER + group * N + n
    raw, bias = tl.load(row + 2 * INNER + 2 * GROUPS * N + h).to(tl.float32), tl.load(dt_bias + h)
    rate = tl.load(A_log + h)
    value = tl.load(here + INNER + p).to(tl.float32)
    key, query = tl.load(key_place).to(tl.float32), tl.load(key_place + GROUPS * N).to(tl.float32)
    scale, _ = step_size(raw, bias, 0.0, 0.0, True, False)
    log_decay = tl.maximum(-scale * tl.exp(rate), LOWEST) * LOG2E
    current = previous.to(tl.float32) * tl.exp2(log_decay) + (value * scale)[:, None] * key[None, :]
    tl.store(place, current.to(state.dtype.element_ty))
    z = tl.load(here + p).to(tl.float32)
    g = (tl.sum(current * query[None, :], 1) + tl.load(D + h) * value) * (z * sigmoid(z))
    tl.store(squares + b * (NHEADS * BLOCKS) + tl.program_id(0), tl.sum(g * g, 0))
    tl.store(gated + b * INNER + first + p, (g * tl.load(weight + first + p)).to(gated.dtype.element_ty))


@triton.jit
def load_parts(place, PARTS: tl.constexpr, EVICTION: tl.constexpr):
    """Rows whose first columns are at `place` (rows, LANES), as PARTS tiles like that."""
    parts = ()
    for j in tl.static_range(PARTS):
        parts = parts + (tl.load(place + j * place.shape[1], eviction_policy=EVICTION),)
    return parts


@triton.jit
def inner(rows, others):
    """Inner products of rows, both as parts: (rows,)."""
    products = rows[0].to(tl.float32) * others[0].to(tl.float32)
    for j in tl.static_range(1, len(rows)):
        products += rows[j].to(tl.float32) * others[j].to(tl.float32)
    return tl.sum(products, 1)


@triton.jit
def deferred_kernel(
    state, projected, A_log, dt_bias, D, weight, gated, squares, kept_x, kept_B, kept_dt, kept_sums, count,
    NHEADS: tl.constexpr, GROUPS: tl.constexpr, HEADDIM: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    KEPT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """As `state_kernel`, with what a `Kept` holds; the last of KEPT tokens alone changes the state.

    Rows of the state are read KEPT at a time and LANES columns, in tiles as large as those of the B of KEPT tokens: in
    one warp every thread then has the same columns of all of them and of C, sums over columns take two exchanges
    between threads, and nothing goes through shared memory. P is a multiple of KEPT, N of LANES, 4 threads' loads.
    """
    INNER: tl.constexpr = NHEADS * HEADDIM
    BLOCKS: tl.constexpr = HEADDIM // P
    SHARING: tl.constexpr = NHEADS // GROUPS
    TILES: tl.constexpr = P // KEPT
    PARTS: tl.constexpr = N // LANES
    b, h = tl.program_id(1).to(tl.int64), tl.program_id(0) // BLOCKS
    first, group = tl.program_id(0) * P, h // SHARING
    # A token or a row of a tile, and the tile: it has every TILES-th row, so that a thread has a row of the program's.
    i, tile = tl.arange(0, KEPT), tl.arange(0, TILES)
    p = i[:, None] * TILES + tile[None, :]
    n = tl.arange(0, LANES)[None, :]
    row = projected + b * (2 * INNER + 2 * GROUPS * N + NHEADS)
    here, newest = row + first, row + 2 * INNER + group * N
    position = tl.load(count) & (KEPT - 1)
    place = state + (b * INNER + first) * N
    previous = ()
    for k in tl.static_range(TILES):
        previous = previous + (load_parts(place + (i[:, None] * TILES + k) * N + n, PARTS, "evict_first"),)
    # Copies for all rows: tiles of one row would be spread over the threads in another way.
    query = load_parts(newest + GROUPS * N + i[:, None] * 0 + n, PARTS, "")
    value, z, gain = tl.load(here + INNER + p), tl.load(here + p).to(tl.float32), tl.load(weight + first + p)
    tl.debug_barrier()  # Else the compiler has the state wait for the position.
    kept_x += b * (KEPT * INNER) + first
    kept_B += b * (KEPT * GROUPS * N) + group * N
    kept_dt += (b * NHEADS + h) * KEPT
    kept_sums += (b * NHEADS + h) * KEPT
    # The newest token stands behind the others, and in all places that are free, whose factors are 0.
    before = i < position
    keys = load_parts(tl.where(before, kept_B + i * (GROUPS * N), newest)[:, None] + n, PARTS, "")
    values = tl.load(tl.where(before, kept_x + i * INNER, here + INNER)[None, None, :] + p[:, :, None])
    scales = tl.load(kept_dt + i, mask=before, other=0.0)
    sums = tl.load(kept_sums + i, mask=before, other=0.0)
    total = tl.load(kept_sums + position - 1, mask=position > 0, other=0.0)
    tl.debug_barrier()  # Else what is kept waits for the step size, which is long in computing.
    raw, bias = tl.load(row + 2 * INNER + 2 * GROUPS * N + h).to(tl.float32), tl.load(dt_bias + h)
    rate, skip = tl.load(A_log + h), tl.load(D + h)
    scale, _ = step_size(raw, bias, 0.0, 0.0, True, False)
    log_decay = tl.maximum(-scale * tl.exp(rate), LOWEST) * LOG2E
    total += log_decay.to(tl.float64)
    decay = tl.exp2(total.to(tl.float32))
    factors = tl.exp2((total - sums).to(tl.float32)) * scales + tl.where(i == position, scale, 0.0)
    y = tl.zeros([KEPT, TILES], tl.float32)
    for k in tl.static_range(TILES):
        y = tl.where(tile[None, :] == k, inner(previous[k], query)[:, None], y)
    attention = factors * inner(keys, query)
    y = y * decay + tl.sum(values.to(tl.float32) * attention[None, None, :], 2) + skip * value.to(tl.float32)
    g = y * (z * sigmoid(z))
    tl.store(squares + b * (NHEADS * BLOCKS) + tl.program_id(0), tl.sum(tl.sum(g * g, 1), 0))
    tl.store(gated + b * INNER + first + p, (g * gain).to(gated.dtype.element_ty))
    columns = tl.arange(0, N)
    if position < KEPT - 1:
        # What nobody reads in this launch.
        tl.store(kept_x + position * INNER + p, value)
        if tl.program_id(0) % BLOCKS == 0:
            tl.store(kept_dt + position, scale)
            tl.store(kept_sums + position, total)
        if tl.program_id(0) % (BLOCKS * SHARING) == 0:
            tl.store(kept_B + position * (GROUPS * N) + columns, tl.load(newest + columns))
    else:
        # Once more, from a cache, and with few columns a thread, whose B is then multiplied with many rows.
        for begin in range(0, P, KEPT):
            lines = begin + i
            wide = place + lines[:, None] * N + columns[None, :]
            current = tl.load(wide).to(tl.float32) * decay
            for token in range(KEPT):
                last = token == KEPT - 1
                factor = tl.sum(tl.where(i == token, factors, 0.0), 0)
                key = tl.load(tl.where(last, newest, kept_B + token * (GROUPS * N)) + columns).to(tl.float32)
                x = tl.load(tl.where(last, here + INNER, kept_x + token * INNER) + lines).to(tl.float32)
                current += (x * factor)[:, None] * key[None, :]
            tl.store(wide, current.to(state.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def add_kernel(
    stream, pieces, squares, weight, total, normed, rows: tl.int32, gated_eps: tl.float32, eps: tl.float32,
    NORM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, INNER: tl.constexpr,
    COUNT: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """`total` = stream + pieces.sum(0) / rms, all (rows, WIDTH), and with NORM its RMSNorm `normed`. Grid `rows`.

    `squares` is (rows, COUNT); BLOCK and COUNTS are powers of two that hold WIDTH and COUNT.
    """
    r, c, i = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, COUNTS)
    live = c < WIDTH
    added = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        added += tl.load(pieces + (part * rows + r) * WIDTH + c, mask=live, other=0.0)
    mean = tl.sum(tl.load(squares + r * COUNT + i, mask=i < COUNT, other=0.0), 0) / INNER
    value = tl.load(stream + r * WIDTH + c, mask=live, other=0.0) + added * tl.rsqrt(mean + gated_eps)
    tl.store(total + r * WIDTH + c, value, mask=live)
    if NORM:
        value *= tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps) * tl.load(weight + c, mask=live, other=0.0)
        tl.store(normed + r * WIDTH + c, value.to(normed.dtype.element_ty), mask=live)


_product, _state, _deferred = Launcher(product_kernel), Launcher(state_kernel), Launcher(deferred_kernel)
_add = Launcher(add_kernel)


def takes(layer: Parameters, sizes: Sizes, conv: Tensor, ssm: Tensor) -> bool:
    """Whether these kernels take a layer and its states; arguments as in `mix`."""
    batch, _, headdim, d_state = ssm.shape
    d_model, d_inner = layer.out_weight.shape
    matrices = layer.in_weight, layer.out_weight
    biases = layer.in_bias is None and layer.out_bias is None and layer.conv_bias is not None
    exact = layer.A_log, layer.dt_bias, layer.D, layer.norm_weight, layer.before
    vectors = layer.conv_weight, layer.conv_bias, *exact
    return (
        1 <= batch <= MOST_ROWS
        and biases
        and layer.in_weight.dtype in DTYPES
        and all(t.dtype == conv.dtype for t in matrices)
        and all(t is not None and t.is_contiguous() for t in (*matrices, *vectors))
        and all(t is not None and t.dtype == torch.float32 for t in exact)
        and ssm.dtype in STATE_TILES
        and (sizes.norm_groups, sizes.norm_before_gate, sizes.dt_limit) == (1, False, (0.0, math.inf))
        and conv.shape[2] >= 1
        and d_model % DEEP == 0
        and d_inner % (PARTS * DEEP) == 0
        and headdim % 16 == 0
        and d_state in STATES
    )


def defer(layer: Parameters, sizes: Sizes, conv: Tensor, ssm: Tensor, count: Tensor) -> Deferred:
    """States that are written once every `KEPT` tokens from now on.

    Args:
        layer: as in `mix`, with all else that `takes` takes.
        sizes: likewise.
        conv: likewise; taken over.
        ssm: likewise.
        count: `(1,)` int32 zero, which whoever steps adds one to when all layers have taken a token.
    """
    (batch, nheads, headdim, d_state), like = ssm.shape, layer.in_weight
    x, B = (like.new_empty(batch, KEPT, width) for width in (nheads * headdim, sizes.ngroups * d_state))
    dt, sums = (ssm.new_empty(batch, nheads, KEPT, dtype=dtype) for dtype in (torch.float32, torch.float64))
    kept = Kept(x, B, dt, sums, count)
    with _triton.on_device(ssm):
        # For no row, and so no program: a kernel must not be loaded as late as while a graph is recorded.
        _step_state(0, ssm, x, layer, sizes, x, dt, kept)
    return Deferred(conv, ssm, kept)


def mix(u: Tensor, layer: Parameters, sizes: Sizes, conv: Tensor, ssm: Tensor, kept: Kept | None = None) -> Pieces:
    """One token through a mixer; arguments as in `triton_step.step`, its result is still to be added up."""
    (d_model, d_inner), batch, channels = layer.out_weight.shape, len(u), conv.shape[1]
    projected, gated = u.new_empty(batch, len(layer.in_weight)), u.new_empty(batch, d_inner)
    pieces = u.new_empty(PARTS, batch, d_model, dtype=torch.float32)
    squares = u.new_empty(batch, d_inner // _state_tile(ssm, kept)[0], dtype=torch.float32)
    with _triton.on_device(u):
        _multiply(u, layer.in_weight, projected, (conv, layer.conv_weight, layer.conv_bias), d_inner, channels)
        _step_state(batch, ssm, projected, layer, sizes, gated, squares, kept)
        _multiply(gated, layer.out_weight, pieces)
    return Pieces(pieces, squares, d_inner, sizes.norm_eps)


def _state_tile(ssm: Tensor, kept: Kept | None) -> tuple[int, int, int | None]:
    """Rows of a head's state that a program has, its warps, and a thread's registers."""
    numbers, *limits = (STATE_TILES if kept is None else DEFERRED_TILES)[ssm.dtype]
    least = 1 if kept is None else kept.dt.shape[2]
    return math.gcd(max(numbers // ssm.shape[3], least), ssm.shape[2]), *limits


def _step_state(
    batch: int, ssm: Tensor, projected: Tensor, layer: Parameters, sizes: Sizes, gated: Tensor, squares: Tensor,
    kept: Kept | None,
) -> None:  # fmt: skip
    _, nheads, headdim, d_state = ssm.shape
    rows, *limits = _state_tile(ssm, kept)
    grid, shape = (nheads * headdim // rows, batch, 1), (nheads, sizes.ngroups, headdim, d_state, rows)
    tensors = ssm, projected, layer.A_log, layer.dt_bias, layer.D, layer.norm_weight, gated, squares
    if kept is None:
        _state(grid, tensors, (), shape, *limits)
    else:
        _deferred(grid, (*tensors, *kept), (), (*shape, kept.dt.shape[2], min(d_state, LANES)), *limits)


def _multiply(
    x: Tensor, weight: Tensor, out: Tensor, convolution: tuple[Tensor | None, ...] = (None, None, None),
    begin: int = 0, channels: int = 0,
) -> None:  # fmt: skip
    (width, depth), batch, parts = weight.shape, len(x), 1 if out.ndim == 2 else len(out)
    taps = 0 if convolution[0] is None else convolution[0].shape[2] + 1
    tile = max(16, triton.next_power_of_2(batch)), WIDE, DEEP, parts, STAGES
    _product(
        (-(-width // WIDE), parts, 1), (x, weight, out, *convolution), (batch, depth // parts),
        (width, depth, begin, channels, taps, *tile), WARPS,
    )  # fmt: skip


def add(
    stream: Tensor, waiting: Pieces, norm: Tensor | None = None, eps: float = 0.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """The residual stream `(batch, d_model)` float32 with what waited, and its norm in `dtype`, if there is one."""
    total = torch.empty_like(stream, memory_format=torch.contiguous_format)
    normed = None if norm is None else torch.empty_like(total, dtype=dtype)
    (batch, width), count = stream.shape, waiting.squares.shape[1]
    blocks = triton.next_power_of_2(width), len(waiting.pieces), waiting.d_inner, count, triton.next_power_of_2(count)
    with _triton.on_device(stream):
        _add(
            (batch, 1, 1), (stream.contiguous(), waiting.pieces, waiting.squares, norm, total, normed),
            (batch, waiting.eps, eps), (norm is not None, width, *blocks), ADD_WARPS,
        )  # fmt: skip
    return total, normed
