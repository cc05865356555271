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
# `(batch, nheads, headdim, d_state)` float32 of SSD.
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
    return x.shape[0] <= MOST_ROWS and x.is_contiguous() and _takes(x.device, x.dtype, weights)


def _takes(device: torch.device, dtype: torch.dtype, weights: tuple[Tensor | None, ...]) -> bool:
    return (
        _numba.obstacle(device) is None
        and _numba.unsupported(dtype) is None
        and all(t.dtype == dtype and t.is_contiguous() for t in weights if t is not None)
    )


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` of tensors that `runs` accepts, with float32 sums: every row of the weight is read once.

    Args:
        x: `(rows, in)`.
        weight: `(out, in)`.
        bias: `(out,)`.

    Returns:
        `(rows, out)` like x.
    """
    from dualscan.ops.decode import numba_step

    return numba_step.project(x, weight, bias)


def plan(layers: Sequence[Parameters], sizes: Sizes) -> "Plan | None":
    """What the kernel needs to know of layers of one shape; good for as long as their parameters stay where they are.

    Returns:
        None where the kernel does not run: it takes CPU tensors, one dtype for the matrices, all in plain order.
    """
    shapes = [None if t is None else t.shape for t in layers[0]]
    for layer in layers:
        low = layer.in_weight, layer.in_bias, layer.conv_weight, layer.conv_bias, layer.out_weight, layer.out_bias
        exact = layer.A_log, layer.dt_bias, layer.D, layer.norm_weight, layer.before
        if [None if t is None else t.shape for t in layer] != shapes:
            return None
        if not all(t.dtype == torch.float32 and t.is_contiguous() for t in exact if t is not None):
            return None
        if not _takes(layer.A_log.device, layers[0].in_weight.dtype, low):
            return None
    from dualscan.ops.decode import numba_step

    return numba_step.Plan(layers, sizes)


def step(
    plan: "Plan", u: Tensor, states: Sequence[State], *, reuse_state: bool = False
) -> tuple[Tensor, list[State]] | None:
    """One token through the layers of a plan, all in one launch.

    Args:
        plan: of the layers.
        u: `(batch, d_model)`.
        states: one a layer.
        reuse_state: writes the next states over the given ones, which saves a third of the state's traffic.

    Returns:
        The last layer's output, float32 like u's shape, and the next states; the given ones are not modified, unless
        `reuse_state`. None for more rows than the kernel is good for, or for states of another shape or dtype.
    """
    if u.shape[0] > MOST_ROWS or not plan.takes(u.shape[0], states):
        return None
    return plan.step(u.float().contiguous(), states, reuse_state)
