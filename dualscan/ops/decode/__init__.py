"""Decoding on a CPU: a product with few vectors, and one token through a Mamba-2 mixer as one kernel.

`dualscan.nn.step` is the specification of the latter. The kernels read the weights and the state once; beside that,
nothing of a decoding step takes time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dualscan.ops import _numba

# Beyond this many rows a general matrix product reads the weights as often and computes faster.
MOST_ROWS = 4


class Parameters(NamedTuple):
    """A mixer's parameters: the matrices and the convolution in one dtype, the others float32."""

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


class Sizes(NamedTuple):
    """What the tensors do not tell."""

    ngroups: int
    norm_groups: int
    norm_before_gate: bool
    norm_eps: float
    dt_limit: tuple[float, float]


def runs(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the kernels take few rows `x` (rows, size) and weights of its dtype: on a CPU, in plain order."""
    return x.is_contiguous() and _takes(x.shape[0], x.device, x.dtype, weights)


def _takes(rows: int, device: torch.device, dtype: torch.dtype, weights: tuple[Tensor | None, ...]) -> bool:
    return (
        rows <= MOST_ROWS
        and _numba.obstacle(device) is None
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


def supports(rows: int, conv: Tensor, ssm: Tensor, parameters: Parameters) -> bool:
    """Whether the step's kernel takes these tensors: on a CPU, few rows, one dtype for the weights, in plain order."""
    low = (
        *(parameters.in_weight, parameters.in_bias, parameters.conv_weight, parameters.conv_bias),
        *(parameters.out_weight, parameters.out_bias),
    )
    exact = ssm, parameters.A_log, parameters.dt_bias, parameters.D, parameters.norm_weight
    in_order = all(t.dtype == torch.float32 and t.is_contiguous() for t in exact)
    return in_order and _takes(rows, ssm.device, conv.dtype, low)


def mamba2_step(
    u: Tensor,
    conv: Tensor,
    ssm: Tensor,
    parameters: Parameters,
    sizes: Sizes,
    norm: tuple[Tensor, float] | None = None,
    *,
    reuse_state: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixes one token of tensors that `supports` accepts.

    Args:
        u: `(batch, d_model)` float32, contiguous.
        conv: `(batch, channels, d_conv - 1)`, any strides.
        ssm: `(batch, nheads, headdim, d_state)` float32.
        parameters: of the layer.
        sizes: of the layer.
        norm: the float32 weight and the epsilon of the RMSNorm before the mixer. Then u is the residual stream: it is
            normalised, mixed, and added to the result.
        reuse_state: writes the next ssm state over the given one, which saves a third of the state's traffic.

    Returns:
        y like u, and the next conv and ssm states; the given ones are not modified, unless `reuse_state`.
    """
    from dualscan.ops.decode import numba_step

    return numba_step.step(u, conv, ssm, parameters, sizes, norm, reuse_state)
