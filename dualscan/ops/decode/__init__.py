"""Decoding on a CPU: a product with few vectors, and one token through Mamba-2 layers as one kernel.

`dualscan.nn.step` is the specification of the latter. The kernels read the weights and the state once; beside that,
nothing of a decoding step takes time.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dualscan.ops import _numba

if TYPE_CHECKING:
    from dualscan.ops.decode.numba_step import Plan

# Beyond this many rows a general matrix product reads the weights as often and computes faster.
MOST_ROWS = 4

# Of one layer: the convolution's `(batch, channels, d_conv - 1)` in any strides, best time-major, and the
# `(batch, nheads, headdim, d_state)` of SSD, float32 or, kept in half the bytes, bfloat16.
State = tuple[Tensor, Tensor]


class Parameters(NamedTuple):
    """A layer's parameters: the matrices and the convolution in one dtype, the others float32."""

    in_weight: Tensor  # (2 d_inner + 2 ngroups d_state + nheads, d_model)
    in_bias: Tensor | None
    conv_weight: Tensor  # (channels, 1, d_conv)
    conv_bias: Tensor | None
    A_log: Tensor  # (nheads,)
    dt_bias: Tensor
    D: Tensor
    norm_weight: Tensor  # (d_inner,)
    out_weight: Tensor  # (d_model, d_inner)
    out_bias: Tensor | None
    # (d_model,): of the RMSNorm before the mixer, whose output is then added to the residual stream; or the mixer alone
    before: Tensor | None


class Sizes(NamedTuple):
    """What the tensors do not tell."""

    ngroups: int
    norm_groups: int
    norm_before_gate: bool
    norm_eps: float
    dt_limit: tuple[float, float]
    before_eps: float = 0.0


def runs(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the kernels take few rows `x` (rows, size) and weights of its dtype: on a CPU, in plain order."""
    return x.shape[0] <= MOST_ROWS and takes(x, *weights)


def takes(first: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take tensors of one dtype: on a CPU, in plain order."""
    dtype = first.dtype
    return (
        _numba.obstacle(first.device) is None
        and _numba.unsupported(dtype) is None
        and first.is_contiguous()
        and all(t.dtype == dtype and t.is_contiguous() for t in others if t is not None)
    )


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """`x weight^T + bias` of tensors that `runs` accepts, with float32 sums: every row of the weight is read once.

    Args:
        x: `(rows, in)`, of the weight's dtype; float32 with a norm.
        weight: `(out, in)`.
        bias: `(out,)`.
        norm: `(in,)` float32, the weight of an RMSNorm that x goes through first.
        eps: the norm's.

    Returns:
        `(rows, out)` like weight.
    """
    from dualscan.ops.decode import numba_step

    return numba_step.project(x, weight, bias, norm, eps)


def plan(layers: Sequence[Parameters], sizes: Sizes) -> "Plan | None":
    """What the kernel needs to know of layers of one shape; good for as long as their parameters stay where they are.

    Returns:
        A plan, whose `step` takes a token through the layers in one launch. None where the kernel does not run: it
        takes CPU tensors, one dtype for the matrices, all in plain order.
    """
    shapes = [None if t is None else t.shape for t in layers[0]]
    for layer in layers:
        low = layer.in_weight, layer.in_bias, layer.conv_weight, layer.conv_bias, layer.out_weight, layer.out_bias
        exact = layer.A_log, layer.dt_bias, layer.D, layer.norm_weight, layer.before
        if [None if t is None else t.shape for t in layer] != shapes or layer.A_log.dtype != torch.float32:
            return None
        if layer.in_weight.dtype != layers[0].in_weight.dtype or not takes(*low) or not takes(*exact):
            return None
    from dualscan.ops.decode import numba_step

    return numba_step.Plan(layers, sizes)
