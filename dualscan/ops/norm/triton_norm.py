# ruff: noqa: RUF005 (Triton's tuples can be added, not unpacked)
"""The norms on a GPU: a row's group stays in registers between its statistics and its result, so memory is passed once.

With u what is normalised, r = 1 / sqrt(mean(u²) + eps), n = u r and h the gradient of n, the backward needs mean(u²)
and mean(h u); it computes gate and statistics again and sums both in one go. Programs of the backward take every so
many-th row, add up the weight's gradient in registers and leave it to `triton_sums`.

A group is held as CHUNKS tiles of (ROWS, CHUNK), powers of two that cover it closely: 5 x 1024 channels for 5120 rather
than 8192.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher, row_alignment
from dualscan.ops.triton_common import sigmoid, silu_slope, sum_partials

# Elements of a tile and of a thread: (forward, backward); and the backward's warps on a multiprocessor.
TILE = (2048, 1024)
THREAD = (40, 20)
RESIDENT_WARPS = 24
MOST_CHUNKS = 8
# A gate: none, before the norm, after it.
PLAIN, GATE_FIRST, GATE_LAST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_group(
    source, place, inside, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr, POLICY: tl.constexpr
):
    """The tiles of a group of `GROUP` channels; `place` points at (ROWS, CHUNK) elements of the first."""
    tiles = ()
    for i in tl.static_range(CHUNKS):
        c = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        tile = tl.load(source + place + i * CHUNK, mask=inside & (c < GROUP), other=0.0, eviction_policy=POLICY)
        tiles = tiles + (tile,)
    return tiles


@triton.jit(do_not_specialize=["x_row", "z_row", "rows", "width"])
def forward_kernel(
    x, z, weight, y, x_row: tl.int64, z_row: tl.int64, rows: tl.int32, width: tl.int32, eps: tl.float32,
    GATE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid `(cdiv(rows, ROWS), groups)`. Strides and width count in ALIGN."""
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    c = tl.arange(0, CHUNK)[None, :]
    column, inside = tl.program_id(1) * GROUP + c, r < rows
    us = load_group(x, r * (x_row * ALIGN) + column, inside, CHUNK, CHUNKS, GROUP, "")
    if GATE != PLAIN:
        zs = load_group(z, r * (z_row * ALIGN) + column, inside, CHUNK, CHUNKS, GROUP, "")
    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    normed = ()
    for i in tl.static_range(CHUNKS):
        u = us[i].to(tl.float32)
        if GATE == GATE_FIRST:
            gate = zs[i].to(tl.float32)
            u *= gate * sigmoid(gate)
        normed = normed + (u,)
        squares += u * u
    inverse = tl.rsqrt(tl.sum(squares, 1) / GROUP + eps)[:, None]
    for i in tl.static_range(CHUNKS):
        live = i * CHUNK + c < GROUP
        out = normed[i] * inverse * tl.load(weight + column + i * CHUNK, mask=live, other=0.0).to(tl.float32)
        if GATE == GATE_LAST:
            gate = zs[i].to(tl.float32)
            out *= gate * sigmoid(gate)
        place = y + r.to(tl.int64) * (width * ALIGN) + column + i * CHUNK
        tl.store(place, out.to(y.dtype.element_ty), mask=inside & live)


@triton.jit(do_not_specialize=["dy_row", "x_row", "z_row", "rows", "width"])
def backward_kernel(
    dy, x, z, weight, dx, dz, partial,
    dy_row: tl.int64, x_row: tl.int64, z_row: tl.int64, rows: tl.int32, width: tl.int32, eps: tl.float32,
    GATE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    ALIGN: tl.constexpr, LIKE_Z: tl.constexpr,
):  # fmt: skip
    """Grid `(programs, groups)`; `partial` is (programs, 1, width) float32. Strides and width count in ALIGN.

    dx and dz lie in plain order, dz with LIKE_Z as z does."""
    c = tl.arange(0, CHUNK)[None, :]
    column = tl.program_id(1) * GROUP + c
    dweight = ()
    for _ in tl.static_range(CHUNKS):
        dweight = dweight + (tl.zeros([ROWS, CHUNK], tl.float32),)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        r = (first + tl.arange(0, ROWS))[:, None]
        inside = r < rows
        x_place, dy_place, z_place = r * (x_row * ALIGN), r * (dy_row * ALIGN), r * (z_row * ALIGN)
        xs = load_group(x, x_place + column, inside, CHUNK, CHUNKS, GROUP, "evict_last")
        dys = load_group(dy, dy_place + column, inside, CHUNK, CHUNKS, GROUP, "evict_last")
        if GATE != PLAIN:
            zs = load_group(z, z_place + column, inside, CHUNK, CHUNKS, GROUP, "evict_last")
        squares, products = tl.zeros([ROWS, CHUNK], tl.float32), tl.zeros([ROWS, CHUNK], tl.float32)
        for i in tl.static_range(CHUNKS):
            u, h = xs[i].to(tl.float32), dys[i].to(tl.float32)
            h *= tl.load(weight + column + i * CHUNK, mask=i * CHUNK + c < GROUP, other=0.0).to(tl.float32)
            if GATE != PLAIN:
                gate = zs[i].to(tl.float32)
                gate *= sigmoid(gate)
                if GATE == GATE_FIRST:
                    u *= gate
                else:
                    h *= gate
            squares += u * u
            products += h * u
        inverse = tl.rsqrt(tl.sum(squares, 1) / GROUP + eps)
        share = (tl.sum(products, 1) / GROUP * inverse * inverse * inverse)[:, None]
        inverse = inverse[:, None]
        # Loaded again, from the nearest cache: what the registers do not hold lets more rows be under way. The other
        # policy keeps the compiler from taking the first loads' values after all.
        xs = load_group(x, x_place + column, inside, CHUNK, CHUNKS, GROUP, "evict_first")
        dys = load_group(dy, dy_place + column, inside, CHUNK, CHUNKS, GROUP, "evict_first")
        if GATE != PLAIN:
            zs = load_group(z, z_place + column, inside, CHUNK, CHUNKS, GROUP, "evict_first")
        sums = ()
        for i in tl.static_range(CHUNKS):
            live = inside & (i * CHUNK + c < GROUP)
            place = r.to(tl.int64) * (width * ALIGN) + column + i * CHUNK
            factor = tl.load(weight + column + i * CHUNK, mask=i * CHUNK + c < GROUP, other=0.0).to(tl.float32)
            u, outer = xs[i].to(tl.float32), dys[i].to(tl.float32)
            if GATE == PLAIN:
                normed = u * inverse
                dx_out = outer * factor * inverse - u * share
            else:
                value = zs[i].to(tl.float32)
                opened = sigmoid(value)
                gate, slope = value * opened, silu_slope(value, opened)
                if GATE == GATE_FIRST:
                    gated = u * gate
                    normed = gated * inverse
                    du = outer * factor * inverse - gated * share
                    dz_out, dx_out = du * u * slope, du * gate
                else:
                    normed = u * inverse
                    h = outer * factor
                    dz_out, dx_out = h * normed * slope, h * gate * inverse - u * share
                    outer *= gate
                dz_place = r.to(tl.int64) * (z_row * ALIGN) + column + i * CHUNK if LIKE_Z else place
                tl.store(dz + dz_place, dz_out.to(dz.dtype.element_ty), mask=live)
            tl.store(dx + place, dx_out.to(dx.dtype.element_ty), mask=live)
            sums = sums + (dweight[i] + outer * normed,)
        dweight = sums
    for i in tl.static_range(CHUNKS):
        place = tl.program_id(0).to(tl.int64) * (width * ALIGN) + column + i * CHUNK
        tl.store(partial + place, tl.sum(dweight[i], 0)[None, :], mask=i * CHUNK + c < GROUP)


_forward, _backward = Launcher(forward_kernel), Launcher(backward_kernel)


@lru_cache(maxsize=256)
def tiles(group: int, backward: bool) -> tuple[int, int, int, int]:
    """Rows at once, channels a chunk, chunks and warps: the widest chunks that waste at most an eighth."""
    widest = triton.next_power_of_2(group)
    sizes = [widest >> k for k in range(MOST_CHUNKS.bit_length()) if widest >> k >= 16] or [widest]
    close = [size for size in sizes if triton.cdiv(group, size) * size <= group * 9 // 8]
    chunk = max(close) if close else min(sizes, key=lambda size: triton.cdiv(group, size) * size)
    chunks = triton.cdiv(group, chunk)
    rows = max(triton.next_power_of_2(TILE[backward] // (chunk * chunks) + 1) // 2, 1)
    warps = triton.next_power_of_2(triton.cdiv(rows * chunk * chunks, 32 * THREAD[backward]))
    return rows, chunk, chunks, min(warps, 16)


def forward(x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, norm_before_gate: bool, eps: float) -> Tensor:
    """Arguments and result as in `reference.rms_norm_reference`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    (x, x_row), (z, z_row), width = rows_of(x), (z, 0) if z is None else rows_of(z), x.shape[-1]
    rows = x.numel() // width
    align = row_alignment(x_row, z_row, width, group_size)
    gate = 0 if z is None else 1 + norm_before_gate
    height, chunk, chunks, warps = tiles(group_size, False)
    with _triton.on_device(x):
        _forward(
            (-(-rows // height), width // group_size, 1), (x, z, weight.contiguous(), y),
            (x_row // align, z_row // align, rows, width // align, eps),
            (gate, group_size, height, chunk, chunks, align), warps,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, norm_before_gate: bool, eps: float,
    *, dz: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`dx, dz, dweight` in their tensors' dtypes; `dz` has no elements without a gate.

    With a `dz` of z's strides, whose rows are evenly spaced, the gate's gradient goes there.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    like_z = dz is not None
    if dz is None and z is not None:
        dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if x.numel() == 0:
        return dx, x.new_empty(0) if dz is None else dz, dweight.zero_()
    (dy, dy_row), (x, x_row), (z, z_row) = rows_of(dy), rows_of(x), (z, 0) if z is None else rows_of(z)
    width = x.shape[-1]
    rows = x.numel() // width
    align = row_alignment(dy_row, x_row, z_row, width, group_size)
    gate = 0 if z is None else 1 + norm_before_gate
    height, chunk, chunks, warps = tiles(group_size, True)
    groups = width // group_size
    wanted = -(-_triton.multiprocessors(x.device) * RESIDENT_WARPS // (warps * groups))
    programs = min(-(-rows // height), wanted)
    with _triton.on_device(x):
        partial = torch.empty((programs, 1, width), dtype=torch.float32, device=x.device)
        _backward(
            (programs, groups, 1), (dy, x, z, weight.contiguous(), dx, dz, partial),
            (dy_row // align, x_row // align, z_row // align, rows, width // align, eps),
            (gate, group_size, height, chunk, chunks, align, like_z), warps,
        )  # fmt: skip
        sum_partials(partial, None, dweight)
    return dx, x.new_empty(0) if dz is None else dz, dweight


def rows_of(t: Tensor) -> tuple[Tensor, int]:
    """`(..., d)` whose rows are evenly spaced, with a contiguous last dimension, and the step from row to row.

    The tensor itself wherever it is so; views, which the kernels do without, take longer to make than to look at it.
    """
    *outer, width = t.shape
    *steps, last = t.stride()
    if last == 1 and outer:
        step = steps[-1]
        if all(steps[i] == steps[i + 1] * outer[i + 1] for i in range(len(outer) - 1)):
            return t, step
    t = _triton.rows_last(t.reshape(-1, width))
    return t, t.stride(0)
