"""One token through a Mamba-2 mixer as one kernel: projections, convolution, state update, gate and norm.

`dualscan.nn.step` is the specification. The kernel reads the weights and the state once; beside them nothing of a
decoding step takes time.
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


def supports(u: Tensor, conv: Tensor, ssm: Tensor, parameters: Parameters) -> bool:
    """Whether the kernel takes these tensors: on a CPU, few rows, one dtype for the weights, in plain order."""
    if u.shape[0] > MOST_ROWS or _numba.obstacle(u.device) is not None or _numba.unsupported(u.dtype) is not None:
        return False
    exact = ssm, parameters.A_log, parameters.dt_bias, parameters.D, parameters.norm_weight
    low = u, conv, *(t for t in parameters if t is not None and not any(t is other for other in exact))
    return (
        all(t.dtype == torch.float32 for t in exact)
        and all(t.dtype == u.dtype for t in low)
        and all(t.is_contiguous() for t in (u, ssm, *(t for t in parameters if t is not None)))
    )


def mamba2_step(
    u: Tensor, conv: Tensor, ssm: Tensor, parameters: Parameters, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixes one token of tensors that `supports` accepts.

    Args:
        u: `(batch, d_model)`.
        conv: `(batch, channels, d_conv - 1)`, any strides.
        ssm: `(batch, nheads, headdim, d_state)` float32.
        parameters: of the layer.
        sizes: of the layer.

    Returns:
        y like u, and the next conv and ssm states; the given ones are not modified.
    """
    from dualscan.ops.decode import numba_step

    return numba_step.step(u, conv, ssm, parameters, sizes)
