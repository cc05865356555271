"""Initialisation of state space parameters and residual scaling (arXiv 2312.00752 and 2405.21060, their training
recipes)."""

import math

import torch
from torch import Tensor, nn


def decay_rates(nheads: int, low: float = 1.0, high: float = 16.0) -> Tensor:
    """`A_log` `(nheads,)` float32 with A = -exp(A_log) uniform in [-high, -low]."""
    return torch.empty(nheads, dtype=torch.float32).uniform_(low, high).log_()


def step_size_bias(nheads: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """`dt_bias` `(nheads,)` float32 whose softplus is log-uniform in [low, high] and at least `floor`.

    Uses the inverse of softplus, dt + log(1 - exp(-dt)).
    """
    log_dt = torch.empty(nheads, dtype=torch.float32).uniform_(math.log(low), math.log(high))
    dt = log_dt.exp_().clamp_(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


@torch.no_grad()
def scale_residual_projection(weight: Tensor, residuals: int) -> None:
    """Kaiming-uniform (a = √5) divided by √residuals, so that the residual stream keeps its variance with depth
    (GPT-2).

    Args:
        weight: of the last linear map of a branch, `(out, in)`, or of several experts, `(n_experts, out, in)`.
        residuals: how many branches are added to the stream in the whole model.
    """
    for matrix in weight.view(-1, *weight.shape[-2:]):
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    weight.div_(math.sqrt(residuals))
