"""The mixer's kernels one after the other: those of its three operators, over views of the joint projection.

Forward: the convolution reads its columns of the projection; SSD reads views of what comes out, and dt from the
projection; the norm reads the gate from there. Backward, in reverse: the norm writes the gate's gradient, SSD that of
dt, and the convolution that of its input into their columns of one tensor; SSD's gradients of x, B and C are columns of
one tensor as well, which is what the convolution takes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dualscan.ops.conv1d import triton_conv1d
from dualscan.ops.norm import triton_norm
from dualscan.ops.ssd import triton_gradients, triton_scan


class Columns(NamedTuple):
    """Views of a joint projection and of the convolved channels, or of their gradients."""

    z: Tensor
    xBC: Tensor
    dt: Tensor
    x: Tensor
    B: Tensor
    C: Tensor


def columns(projected: Tensor, convolved: Tensor, nheads: int, headdim: int, ngroups: int) -> Columns:
    """z, xBC, dt `(batch, seqlen, width)`, and x, B, C with their heads and groups."""
    d_inner, channels = nheads * headdim, convolved.shape[2]
    z, xBC, dt = projected.split([d_inner, channels, nheads], dim=-1)
    width = (channels - d_inner) // 2
    x, B, C = convolved.split([d_inner, width, width], dim=-1)
    B, C = (t.unflatten(-1, (ngroups, width // ngroups)) for t in (B, C))
    return Columns(z, xBC, dt, x.unflatten(-1, (nheads, headdim)), B, C)


def forward(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, A_log: Tensor, dt_bias: Tensor, D: Tensor,
    norm_weight: Tensor, conv_states: Tensor | None, ssm_states: Tensor | None, cu_seqlens: Tensor | None,
    ngroups: int, norm_group: int, norm_before_gate: bool, eps: float, dt_min: float, dt_max: float, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`y`, the final states of the convolution and of SSD, and what came out of both; of the first only to `keep`."""
    (channels, _), nheads = conv_weight.shape, A_log.shape[0]
    d_inner = norm_weight.shape[0]
    xBC = projected[..., d_inner : d_inner + channels]
    convolved, conv = triton_conv1d.forward(xBC, conv_weight, conv_bias, conv_states, cu_seqlens, True)
    z, _, dt, x, B, C = columns(projected, convolved, nheads, d_inner // nheads, ngroups)
    scanned, ssm = triton_scan.forward(
        x, dt, A_log.exp().neg_(), B, C, D, dt_bias, ssm_states, cu_seqlens, True, dt_min, dt_max
    )
    y = triton_norm.forward(scanned.flatten(2), z, norm_weight, norm_group, norm_before_gate, eps)
    return y.view(z.shape), conv, ssm, convolved if keep else projected.new_empty(0), scanned


def backward(
    dy: Tensor | None, dconv: Tensor | None, dssm: Tensor | None, convolved: Tensor, scanned: Tensor,
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, A_log: Tensor, dt_bias: Tensor, D: Tensor,
    norm_weight: Tensor, conv_states: Tensor | None, ssm_states: Tensor | None, cu_seqlens: Tensor | None,
    ngroups: int, norm_group: int, norm_before_gate: bool, eps: float, dt_min: float, dt_max: float, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the forward's first nine arguments; an empty tensor for one that was None."""
    nheads, headdim = scanned.shape[2:]
    absent = projected.new_empty(0)
    if not keep:
        xBC = projected[..., scanned[0, 0].numel() :][..., : conv_weight.shape[0]]
        convolved, _ = triton_conv1d.forward(xBC, conv_weight, conv_bias, conv_states, cu_seqlens, True)
    inputs = columns(projected, convolved, nheads, headdim, ngroups)
    dprojected, dconvolved = torch.empty_like(projected), torch.empty_like(convolved)
    grads = columns(dprojected, dconvolved, nheads, headdim, ngroups)
    dy = projected.new_zeros(inputs.z.shape) if dy is None else dy
    dscanned, _, dnorm_weight = triton_norm.backward(
        dy, scanned.flatten(2), inputs.z, norm_weight, norm_group, norm_before_gate, eps, dz=grads.z
    )
    A = A_log.exp().neg_()
    into = {"x": grads.x, "dt": grads.dt, "B": grads.B, "C": grads.C}
    _, _, dA, _, _, dD, ddt_bias, dssm_states = triton_gradients.backward(
        dscanned.view(scanned.shape), dssm, inputs.x, inputs.dt, A, inputs.B, inputs.C, D, dt_bias, ssm_states,
        cu_seqlens, True, dt_min, dt_max, into=into,
    )  # fmt: skip
    _, dconv_weight, dconv_bias, dconv_states = triton_conv1d.backward(
        dconvolved, absent if dconv is None else dconv, inputs.xBC, conv_weight, conv_bias, conv_states, cu_seqlens,
        True, dx=grads.xBC,
    )  # fmt: skip
    return dprojected, dconv_weight, dconv_bias, dA.mul_(A), ddt_bias, dD, dnorm_weight, dconv_states, dssm_states
