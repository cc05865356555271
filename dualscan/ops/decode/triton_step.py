"""Decoding on a GPU: one token through a Mamba-2 layer in six launches, with the states changed where they are.

All are the operators' own kernels; the sixth is the norm in front, which adds the layer before to the residual stream
on the way (`ops/norm/triton_add_norm.py`, called by `nn/block.py`). Nothing here looks at the values or at the host's
clock, so that the steps of a whole model can be captured in one CUDA graph.
"""

import torch.nn.functional as F
from torch import Tensor

from dualscan.ops.conv1d import triton_conv1d
from dualscan.ops.decode import Parameters, Sizes
from dualscan.ops.norm import triton_norm
from dualscan.ops.ssd import triton_scan


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
