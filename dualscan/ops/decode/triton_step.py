"""Decoding on a GPU: one token through the blocks of a model, with the states changed where they are.

A Mamba-2 block is four launches where `triton_fused` takes it, and else six, of the operators' own kernels: the norm,
which adds the layer before to the residual stream on the way, the projections, and between them convolution, state and
gated norm. Nothing here looks at the values or at the host's clock, so that the steps of a whole model can be captured
in one CUDA graph.
"""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dualscan.ops.conv1d import triton_conv1d
from dualscan.ops.decode import Parameters, Sizes, triton_fused
from dualscan.ops.norm import triton_add_norm, triton_norm
from dualscan.ops.ssd import triton_scan

# A block's output until the next norm adds it to the residual stream.
Waiting = Tensor | triton_fused.Pieces | None


def step(
    stream: Tensor, waiting: Waiting, layer: Parameters, sizes: Sizes, conv: Tensor, ssm: Tensor,
    kept: triton_fused.Kept | None = None,
) -> tuple[Tensor, Waiting]:  # fmt: skip
    """One token through a block, h + mixer(norm(h)) with h = stream + waiting.

    Args:
        stream: `(batch, d_model)` float32.
        waiting: what is still to be added to it; None: nothing.
        layer: the parameters of the mixer and of the norm before it.
        sizes: what these do not tell.
        conv: `(batch, channels, d_conv - 1)` in the matrices' dtype, time-major in memory; modified.
        ssm: `(batch, nheads, headdim, d_state)`, contiguous; modified.
        kept: the tokens that `ssm` lacks, of a deferred state; modified.

    Returns:
        h, and what is to be added to it.
    """
    norm, eps, dtype = layer.before, sizes.before_eps, layer.in_weight.dtype
    assert norm is not None
    if isinstance(waiting, triton_fused.Pieces):
        stream, u = triton_fused.add(stream, waiting, norm, eps, dtype)
        assert u is not None
    else:
        total, u = triton_add_norm.forward(stream, waiting, norm, eps, dtype)
        stream = stream if waiting is None else total
    if kept is not None or triton_fused.takes(layer, sizes, conv, ssm):
        return stream, triton_fused.mix(u, layer, sizes, conv, ssm, kept)
    return stream, mix(u, layer, sizes, conv, ssm)


def settle(stream: Tensor, waiting: Waiting) -> Tensor:
    """`stream + waiting`."""
    if isinstance(waiting, triton_fused.Pieces):
        return triton_fused.add(stream, waiting)[0]
    return stream if waiting is None else stream + waiting


def count(states: Iterable[Any]) -> None:
    """Takes note that all layers have taken a token, where some of their states are deferred."""
    deferred = next((state for state in states if isinstance(state, triton_fused.Deferred)), None)
    if deferred is not None:
        deferred.kept.count.add_(1)


def mix(u: Tensor, layer: Parameters, sizes: Sizes, conv: Tensor, ssm: Tensor) -> Tensor:
    """One token through a mixer; `dualscan.nn.step` is the specification.

    Args:
        u: `(batch, d_model)` in the matrices' dtype.
        layer: its parameters.
        sizes: what these do not tell.
        conv: as in `step`.
        ssm: as in `step`.

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
