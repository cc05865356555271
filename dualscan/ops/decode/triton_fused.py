"""Decoding on a GPU: one token through a Mamba-2 layer in four launches, for the layers that most models are made of.

What `triton_step` does in six, with as few passes over memory as the sums between rows of a matrix allow:

1. `add_kernel` adds the layer before to the residual stream and normalises;
2. `product_kernel` multiplies with the input matrix; x, B and C go through the convolution before they are stored;
3. `state_kernel` updates the state and gates what it reads from it;
4. `product_kernel` multiplies with the output matrix.

The gated norm needs a sum over all heads, which is known after the third. Its division by the root mean square is the
same factor for a whole row, so that it passes through the product, W (w g / rms) = (W (w g)) / rms, to the first launch
of the layer after. So does the sum of the output matrix's products with parts of the row: as one, they are too few
programs to read the matrix fast. What waits for both is a `Pieces`. Sums have a fixed order: results repeat bitwise.
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
# Numbers of a head's state that a program has, and warps, by the state's dtype (likewise).
STATE_TILES = {torch.bfloat16: (2048, 1), torch.float32: (8192, 8)}
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


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x, weight, out, conv, taps, bias, rows: tl.int32,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, BEGIN: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
    M: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`out` (PARTS, rows, WIDTH) = x (rows, DEPTH) weight^T, one part for every DEPTH / PARTS columns of the weight.

    Columns BEGIN to BEGIN + CHANNELS of out are those of the convolution: its state `conv` (rows, TAPS - 1, CHANNELS)
    takes the product in, and SiLU of the convolved value is stored. Grid `(cdiv(WIDTH, WIDE), PARTS)`.
    """
    n = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    m, k = tl.arange(0, M), tl.arange(0, DEEP)
    SHARE: tl.constexpr = DEPTH // PARTS
    start = tl.program_id(1) * SHARE
    # Rows beyond the last repeat it: nothing of them is stored, and no load needs a mask.
    weights = weight + tl.minimum(n, WIDTH - 1).to(tl.int64)[:, None] * DEPTH + start + k[None, :]
    values = x + tl.minimum(m, rows - 1)[:, None] * DEPTH + start + k[None, :]
    result = tl.zeros([WIDE, M], tl.float32)
    for first in tl.range(0, SHARE, DEEP, num_stages=STAGES):
        result = tl.dot(tl.load(weights + first), tl.trans(tl.load(values + first)), result)
    live = (m < rows)[None, :] & (n < WIDTH)[:, None]
    if CHANNELS > 0:
        c = n - BEGIN
        mixed = (c >= 0) & (c < CHANNELS)
        inside = live & mixed[:, None]
        new = result.to(conv.dtype.element_ty)
        factor = tl.load(taps + c * TAPS + TAPS - 1, mask=mixed, other=0.0).to(tl.float32)
        total = tl.load(bias + c, mask=mixed, other=0.0).to(tl.float32)[:, None] + factor[:, None] * new.to(tl.float32)
        place = conv + m[None, :] * ((TAPS - 1) * CHANNELS) + c[:, None]
        # An element of the state is read and overwritten by one thread: the tile has no fewer elements than threads
        # can load at once.
        for i in tl.static_range(TAPS - 1):
            old = tl.load(place + i * CHANNELS, mask=inside, other=0.0)
            factor = tl.load(taps + c * TAPS + i, mask=mixed, other=0.0).to(tl.float32)
            total += factor[:, None] * old.to(tl.float32)
            if i > 0:
                tl.store(place + (i - 1) * CHANNELS, old, mask=inside)
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
    channel = tl.program_id(0) * P + tl.arange(0, P)
    place = state + (b * INNER + channel[:, None]) * N + n[None, :]
    previous = tl.load(place).to(tl.float32)
    row = projected + b * (2 * INNER + 2 * GROUPS * N + NHEADS)
    scale, _ = step_size(
        tl.load(row + 2 * INNER + 2 * GROUPS * N + h).to(tl.float32), tl.load(dt_bias + h), 0.0, 0.0, True, False
    )
    decay = tl.exp2(tl.maximum(-scale * tl.exp(tl.load(A_log + h)), LOWEST) * LOG2E)
    value = tl.load(row + INNER + channel).to(tl.float32)
    key_place = row + 2 * INNER + h // (NHEADS // GROUPS) * N + n
    key, query = tl.load(key_place).to(tl.float32), tl.load(key_place + GROUPS * N).to(tl.float32)
    current = previous * decay + (value * scale)[:, None] * key[None, :]
    tl.store(place, current.to(state.dtype.element_ty))
    z = tl.load(row + channel).to(tl.float32)
    g = (tl.sum(current * query[None, :], 1) + tl.load(D + h) * value) * (z * sigmoid(z))
    tl.store(squares + b * (NHEADS * BLOCKS) + tl.program_id(0), tl.sum(g * g, 0))
    tl.store(gated + b * INNER + channel, (g * tl.load(weight + channel)).to(gated.dtype.element_ty))


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


_product, _state, _add = Launcher(product_kernel), Launcher(state_kernel), Launcher(add_kernel)


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


def mix(u: Tensor, layer: Parameters, sizes: Sizes, conv: Tensor, ssm: Tensor) -> Pieces:
    """One token through a mixer; arguments as in `triton_step.mix`, its result is still to be added up."""
    (batch, nheads, headdim, d_state), channels = ssm.shape, conv.shape[1]
    d_inner, columns = nheads * headdim, len(layer.in_weight)
    numbers, warps = STATE_TILES[ssm.dtype]
    rows = math.gcd(numbers // d_state, headdim)
    projected, gated = u.new_empty(batch, columns), u.new_empty(batch, d_inner)
    pieces = u.new_empty(PARTS, batch, u.shape[1], dtype=torch.float32)
    squares = u.new_empty(batch, d_inner // rows, dtype=torch.float32)
    with _triton.on_device(u):
        _multiply(u, layer.in_weight, projected, (conv, layer.conv_weight, layer.conv_bias), d_inner, channels)
        _state(
            (d_inner // rows, batch, 1),
            (ssm, projected, layer.A_log, layer.dt_bias, layer.D, layer.norm_weight, gated, squares), (),
            (nheads, sizes.ngroups, headdim, d_state, rows), warps,
        )  # fmt: skip
        _multiply(gated, layer.out_weight, pieces)
    return Pieces(pieces, squares, d_inner, sizes.norm_eps)


def _multiply(
    x: Tensor, weight: Tensor, out: Tensor, convolution: tuple[Tensor | None, ...] = (None, None, None),
    begin: int = 0, channels: int = 0,
) -> None:  # fmt: skip
    (width, depth), batch, parts = weight.shape, len(x), 1 if out.ndim == 2 else len(out)
    taps = 0 if convolution[0] is None else convolution[0].shape[2] + 1
    tile = max(16, triton.next_power_of_2(batch)), WIDE, DEEP, parts, STAGES
    _product(
        (-(-width // WIDE), parts, 1), (x, weight, out, *convolution), (batch,),
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
