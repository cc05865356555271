"""Decoding on a GPU: one token through a Mamba-2 layer in six launches, with the states changed where they are.

Two matrix products, the convolution, the state's update and the gated norm are the operators' own kernels; what is new
is the norm in front, which adds the layer before to the residual stream on the way. Nothing here looks at the values
or at the host's clock, so that the steps of a whole model can be captured in one CUDA graph.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher
from dualscan.ops.conv1d import triton_conv1d
from dualscan.ops.decode import Parameters, Sizes
from dualscan.ops.norm import triton_norm
from dualscan.ops.ssd import triton_scan

WARPS = 8


@triton.jit(do_not_specialize=["width", "y_row"])
def add_norm_kernel(
    h, y, weight, normed, width: tl.int32, y_row: tl.int64, eps: tl.float32, BLOCK: tl.constexpr, HAS_Y: tl.constexpr
):
    """`h += y`, and its RMSNorm in `normed`; h is float32 (rows, width), in plain order as `normed` is. Grid `rows`."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = c < width
    value = tl.load(h + row * width + c, mask=inside, other=0.0)
    if HAS_Y:
        value += tl.load(y + row * y_row + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(h + row * width + c, value, mask=inside)
    inverse = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    out = value * inverse * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + c, out.to(normed.dtype.element_ty), mask=inside)


_add_norm = Launcher(add_norm_kernel)


def add_norm(h: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm of `h + y`, which takes the place of h.

    Args:
        h: `(rows, width)` float32, contiguous; modified, unless y is None.
        y: like h, of any dtype.
        weight: `(width,)`.
        eps: the norm's.
        dtype: of the result.
    """
    rows, width = h.shape
    normed = torch.empty(h.shape, dtype=dtype, device=h.device)
    y = y if y is None or y.stride(1) == 1 else y.contiguous()
    with _triton.on_device(h):
        _add_norm(
            (rows, 1, 1), (h, y, weight, normed), (width, 0 if y is None else y.stride(0), eps),
            (triton.next_power_of_2(width), y is not None), WARPS,
        )  # fmt: skip
    return normed


def mix(u: Tensor, layer: Parameters, sizes: Sizes, conv: Tensor, ssm: Tensor) -> Tensor:
    """One token through a mixer; `dualscan.nn.step` is the specification.

    Args:
        u: `(batch, d_model)` in the matrices' dtype.
        layer: its parameters.
        sizes: what these do not tell.
        conv: `(batch, channels, d_conv - 1)` in u's dtype, time-major in memory; modified.
        ssm: `(batch, nheads, headdim, d_state)`, contiguous; modified.

    Returns:
        `(batch, d_model)` like u.
    """
    _, nheads, headdim, d_state = ssm.shape
    channels, d_inner = conv.shape[1], nheads * headdim
    z, xBC, dt = F.linear(u, layer.in_weight, layer.in_bias).split([d_inner, channels, nheads], dim=-1)
    xBC = triton_conv1d.step(xBC, layer.conv_weight.squeeze(1), layer.conv_bias, conv)
    x, B, C = xBC.split([d_inner, *[sizes.ngroups * d_state] * 2], dim=-1)
    x, B, C = x.unflatten(1, (nheads, headdim)), *(t.unflatten(1, (sizes.ngroups, d_state)) for t in (B, C))
    y, _ = triton_scan.step(
        ssm, x, dt, layer.A_log, B, C, layer.D, None, layer.dt_bias, True, *sizes.dt_limit,
        in_place=True, logarithm=True,
    )  # fmt: skip
    group = d_inner // sizes.norm_groups
    y = triton_norm.forward(y.view(-1, d_inner), z, layer.norm_weight, group, sizes.norm_before_gate, sizes.norm_eps)
    return F.linear(y, layer.out_weight, layer.out_bias)
