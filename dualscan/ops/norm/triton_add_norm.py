# ruff: noqa: RUF005 (Triton's tuples can be added, not unpacked)
"""Adding to the residual stream and normalising the sum, on a GPU: one pass over memory each way.

A row of the sum stays in registers until its norm is written, and the backward adds the gradient of the sum to that of
the norm where it has both. Tiles and sums over programs are much as in `triton_norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher, row_alignment
from dualscan.ops.norm import triton_norm
from dualscan.ops.norm.triton_norm import load_group, rows_of
from dualscan.ops.triton_common import sum_partials


@triton.jit(do_not_specialize=["residual_row", "y_row", "rows"])
def forward_kernel(
    residual, y, weight, out, normed, residual_row: tl.int64, y_row: tl.int64, rows: tl.int32, eps: tl.float32,
    HAS_Y: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid `cdiv(rows, ROWS)`; `out` and `normed` lie in plain order. Strides count in ALIGN."""
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    c = tl.arange(0, CHUNK)[None, :]
    inside, first = r < rows, r.to(tl.int64) * WIDTH + c
    us = load_group(residual, r * (residual_row * ALIGN) + c, inside, CHUNK, CHUNKS, WIDTH, "")
    if HAS_Y:
        ys = load_group(y, r * (y_row * ALIGN) + c, inside, CHUNK, CHUNKS, WIDTH, "")
    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    sums = ()
    for i in tl.static_range(CHUNKS):
        u = us[i].to(tl.float32)
        if HAS_Y:
            # As it is stored: the backward takes the statistics of that.
            stored = (u + ys[i].to(tl.float32)).to(out.dtype.element_ty)
            tl.store(out + first + i * CHUNK, stored, mask=inside & (i * CHUNK + c < WIDTH))
            u = stored.to(tl.float32)
        sums = sums + (u,)
        squares += u * u
    inverse = tl.rsqrt(tl.sum(squares, 1) / WIDTH + eps)[:, None]
    for i in tl.static_range(CHUNKS):
        live = i * CHUNK + c < WIDTH
        result = sums[i] * inverse * tl.load(weight + c + i * CHUNK, mask=live, other=0.0).to(tl.float32)
        tl.store(normed + first + i * CHUNK, result.to(normed.dtype.element_ty), mask=inside & live)


@triton.jit(do_not_specialize=["dnormed_row", "x_row", "dout_row", "rows"])
def backward_kernel(
    dnormed, x, dout, weight, dresidual, dy, partial,
    dnormed_row: tl.int64, x_row: tl.int64, dout_row: tl.int64, rows: tl.int32, eps: tl.float32,
    HAS_DOUT: tl.constexpr, HAS_DY: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid `programs`; x is what was normalised, `partial` is (programs, 1, WIDTH) float32. Strides count in ALIGN.

    dresidual = dout + the norm's gradient; dy is the same in its own dtype.
    """
    c = tl.arange(0, CHUNK)[None, :]
    dweight = ()
    for _ in tl.static_range(CHUNKS):
        dweight = dweight + (tl.zeros([ROWS, CHUNK], tl.float32),)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        r = (first + tl.arange(0, ROWS))[:, None]
        inside = r < rows
        x_place, dnormed_place = r * (x_row * ALIGN) + c, r * (dnormed_row * ALIGN) + c
        xs = load_group(x, x_place, inside, CHUNK, CHUNKS, WIDTH, "evict_last")
        hs = load_group(dnormed, dnormed_place, inside, CHUNK, CHUNKS, WIDTH, "evict_last")
        squares, products = tl.zeros([ROWS, CHUNK], tl.float32), tl.zeros([ROWS, CHUNK], tl.float32)
        for i in tl.static_range(CHUNKS):
            u, h = xs[i].to(tl.float32), hs[i].to(tl.float32)
            h *= tl.load(weight + c + i * CHUNK, mask=i * CHUNK + c < WIDTH, other=0.0).to(tl.float32)
            squares += u * u
            products += h * u
        inverse = tl.rsqrt(tl.sum(squares, 1) / WIDTH + eps)
        share = (tl.sum(products, 1) / WIDTH * inverse * inverse * inverse)[:, None]
        inverse = inverse[:, None]
        # Loaded again from the nearest cache, as in `triton_norm.backward_kernel`, for the sake of registers.
        xs = load_group(x, x_place, inside, CHUNK, CHUNKS, WIDTH, "evict_first")
        hs = load_group(dnormed, dnormed_place, inside, CHUNK, CHUNKS, WIDTH, "evict_first")
        if HAS_DOUT:
            passed = load_group(dout, r * (dout_row * ALIGN) + c, inside, CHUNK, CHUNKS, WIDTH, "evict_first")
        sums = ()
        for i in tl.static_range(CHUNKS):
            live = inside & (i * CHUNK + c < WIDTH)
            place = r.to(tl.int64) * WIDTH + c + i * CHUNK
            factor = tl.load(weight + c + i * CHUNK, mask=i * CHUNK + c < WIDTH, other=0.0).to(tl.float32)
            u, h = xs[i].to(tl.float32), hs[i].to(tl.float32)
            gradient = h * factor * inverse - u * share
            if HAS_DOUT:
                gradient += passed[i].to(tl.float32)
            tl.store(dresidual + place, gradient.to(dresidual.dtype.element_ty), mask=live)
            if HAS_DY:
                tl.store(dy + place, gradient.to(dy.dtype.element_ty), mask=live)
            sums = sums + (dweight[i] + h * (u * inverse),)
        dweight = sums
    for i in tl.static_range(CHUNKS):
        place = partial + tl.program_id(0).to(tl.int64) * WIDTH + c + i * CHUNK
        tl.store(place, tl.sum(dweight[i], 0)[None, :], mask=i * CHUNK + c < WIDTH)


_forward, _backward = Launcher(forward_kernel), Launcher(backward_kernel)

# A thread has this many elements of every tile: 16 bytes of float32. More would load 16 bits in another layout than
# float32, and every tile of theirs would change layouts by way of shared memory.
THREAD = 4
MOST_WARPS = 8


def tiles(width: int, backward: bool) -> tuple[int, int, int, int]:
    """Rows at once, channels a chunk, chunks and warps, from those of the norm alone."""
    rows, chunk, _, _ = triton_norm.tiles(width, backward)
    chunk = min(chunk, MOST_WARPS * 32 * THREAD)
    rows = min(rows, max(32 * THREAD // chunk, 1))
    return rows, chunk, triton.cdiv(width, chunk), max(rows * chunk // (32 * THREAD), 1)


def forward(
    residual: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`residual + y` (no elements without y) and its norm in `dtype`."""
    normed = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    out = residual.new_empty(0) if y is None else torch.empty_like(normed, dtype=residual.dtype)
    if residual.numel() == 0:
        return out, normed
    (residual, row), (y, y_row) = rows_of(residual), (y, 0) if y is None else rows_of(y)
    width = residual.shape[-1]
    rows = residual.numel() // width
    align = row_alignment(row, y_row, width)
    height, chunk, chunks, warps = tiles(width, False)
    with _triton.on_device(residual):
        _forward(
            (-(-rows // height), 1, 1), (residual, y, weight.contiguous(), out, normed),
            (row // align, y_row // align, rows, eps),
            (y is not None, width, height, chunk, chunks, align), warps,
        )  # fmt: skip
    return out, normed


def backward(
    dout: Tensor | None, dnormed: Tensor, out: Tensor, weight: Tensor, eps: float, y_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`dresidual, dy, dweight`; `dy` has no elements without a dtype."""
    dresidual = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    dy = out.new_empty(0) if y_dtype is None else torch.empty_like(dresidual, dtype=y_dtype)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return dresidual, dy, dweight.zero_()
    (dnormed, dnormed_row), (x, x_row) = rows_of(dnormed), rows_of(out)
    dout, dout_row = (dout, 0) if dout is None else rows_of(dout)
    width = x.shape[-1]
    rows, strides = x.numel() // width, (dnormed_row, x_row, dout_row)
    align = row_alignment(*strides, width)
    height, chunk, chunks, warps = tiles(width, True)
    wanted = -(-_triton.multiprocessors(x.device) * triton_norm.RESIDENT_WARPS // warps)
    programs = min(-(-rows // height), wanted)
    with _triton.on_device(x):
        partial = torch.empty((programs, 1, width), dtype=torch.float32, device=x.device)
        _backward(
            (programs, 1, 1), (dnormed, x, dout, weight.contiguous(), dresidual, dy, partial),
            (*(stride // align for stride in strides), rows, eps),
            (dout is not None, y_dtype is not None, width, height, chunk, chunks, align), warps,
        )  # fmt: skip
        sum_partials(partial, None, dweight)
    return dresidual, dy, dweight
