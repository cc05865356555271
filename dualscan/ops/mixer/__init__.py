"""What a Mamba-2 layer does between its two projections, as one operator on a GPU: convolution, SSD, gated norm.

The operators are those of `ops/conv1d`, `ops/ssd` and `ops/norm`, and so are the results. One operator instead of three
saves what lies between them: the backward writes every gradient into its columns of the projection's gradient, which
would otherwise be put together from parts in two more passes, and the host goes through a third of the calls.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._autograd import asks_for_gradient
from dualscan.ops._launch import unsupported
from dualscan.ops.mixer import library
from dualscan.ops.norm.library import LARGEST_GROUP
from dualscan.ops.ssd import configs
from dualscan.ops.varlen import validate_cu_seqlens

__all__ = ["MixOutput", "Sizes", "mix", "runs"]


class Sizes(NamedTuple):
    """What the tensors do not tell."""

    ngroups: int
    norm_groups: int
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, math.inf)


class MixOutput(NamedTuple):
    """What `mix` returns.

    Attributes:
        y: `(batch, seqlen, d_inner)`, gated and normalised.
        conv: `(batch or nseq, channels, width - 1)`, the convolution's final states.
        ssm: `(batch or nseq, nheads, headdim, d_state)` float32, SSD's.
        scanned: `(batch, seqlen, nheads, headdim)`, what y is the gated norm of; without a gradient of its own.
    """

    y: Tensor
    conv: Tensor
    ssm: Tensor
    scanned: Tensor


def runs(projected: Tensor, conv_weight: Tensor, d_inner: int, sizes: Sizes) -> bool:
    """Whether the kernels take these tensors; where they do not, the three operators are to be called."""
    if not projected.is_cuda or projected.numel() == 0 or not (projected.is_contiguous() or _spaced(projected)):
        return False
    d_state = (conv_weight.shape[0] - d_inner) // (2 * sizes.ngroups)
    group = d_inner // sizes.norm_groups
    return _fits(projected.device, projected.dtype, conv_weight.dtype, d_state, group)


def _spaced(t: Tensor) -> bool:
    """Whether `(batch, seqlen, width)` may be the first columns of a wider contiguous tensor."""
    (_, seqlen, width), (batch_step, step, last) = t.shape, t.stride()
    return last == 1 and step > width and batch_step == seqlen * step


@cache
def _fits(device: torch.device, dtype: torch.dtype, weight: torch.dtype, d_state: int, group: int) -> bool:
    reasons = (_triton.obstacle(device), unsupported(weight), configs.unsupported(dtype, d_state))
    return group <= LARGEST_GROUP and not any(reasons)


def mix(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    sizes: Sizes,
    *,
    conv_states: Tensor | None = None,
    ssm_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    keep: bool = True,
) -> MixOutput:
    """RMSNorm(SSD(SiLU(conv(x, B, C)), softplus(dt + dt_bias)) · SiLU(z)) of a joint projection [z, x, B, C, dt].

    (arXiv 2405.21060, section 7 and figure 6.) Call it where `runs` says that it can; the sizes of parameters are not
    checked.

    Args:
        projected: `(batch, seqlen, 2 d_inner + 2 ngroups d_state + nheads)`, contiguous or the first columns of what
            is; its gradient is laid out likewise.
        conv_weight: `(channels, 1, width)` with channels = d_inner + 2 ngroups d_state, as `nn.Conv1d` has it.
        conv_bias: `(channels,)`.
        A_log: `(nheads,)` float32, logarithm of -A.
        dt_bias: `(nheads,)`.
        D: `(nheads,)`.
        norm_weight: `(d_inner,)`.
        sizes: groups, the order of norm and gate, and limits.
        conv_states: `(batch or nseq, channels, width - 1)` in the dtype of `projected`; None is zero.
        ssm_states: `(batch or nseq, nheads, headdim, d_state)` float32; None is zero.
        cu_seqlens: `(nseq + 1,)` int32 boundaries of packed sequences; batch must be 1.
        keep: keeps the convolved channels and SSD's states on the way for the backward, which else computes them again.

    Returns:
        `MixOutput(y, conv, ssm, scanned)`; the first three are differentiable.

    Raises:
        ValueError: the number of sequences in a state, or `cu_seqlens`, does not fit.
        TypeError: `cu_seqlens` is not int32.
    """
    batch, seqlen = projected.shape[:2]
    if cu_seqlens is not None:
        validate_cu_seqlens(cu_seqlens, batch=batch, seqlen=seqlen, device=projected.device, name="Mamba2")
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for name, states in (("conv", conv_states), ("ssm", ssm_states)):
        if states is not None and states.shape[0] != nseq:
            raise ValueError(f"Mamba2: the state's {name} has batch {states.shape[0]}; expected {nseq} sequences.")
    ngroups, norm_groups, norm_before_gate, eps, limit = sizes
    low, high = limit
    tensors = projected, conv_weight, conv_bias, A_log, dt_bias, D, norm_weight, conv_states, ssm_states
    keep = keep and asks_for_gradient(tensors)
    y, conv, ssm, scanned, *_ = library.mix(
        *tensors, cu_seqlens, ngroups, norm_weight.shape[0] // norm_groups, norm_before_gate, eps,
        float(low), float(high), keep,
    )  # fmt: skip
    return MixOutput(y, conv, ssm, scanned)
