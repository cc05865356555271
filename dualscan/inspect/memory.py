"""How far back a layer looks: effective context of a matrix, and half-lives of a state's decay."""

import math

import numpy as np
import torch
from torch import Tensor


def effective_context(matrix: Tensor, *, mass: float = 0.9) -> Tensor:
    """For every token, how many of the last tokens (itself included) hold a share `mass` of its row of |matrix|.

    Args:
        matrix: `(..., seqlen, seqlen)`, causal.
        mass: the share, in (0, 1].

    Returns:
        `(..., seqlen)` int64, between 1 and the number of tokens so far; 1 for a row of zeros.

    Raises:
        ValueError: `mass` out of its range.

    Example:
        >>> effective_context(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]))
        tensor([1, 1, 3])
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass={mass} must lie in (0, 1]; 0.9 is usual.")
    # older[i, j] is what tokens 0 to j hold; a window that begins after j leaves that out.
    older = matrix.abs().cumsum(-1)
    total = older[..., -1:]
    left_out = (older <= (1 - mass) * total) & (total > 0)
    seqlen = matrix.shape[-1]
    sofar = torch.arange(1, seqlen + 1, device=matrix.device)
    return torch.where(total[..., 0] > 0, sofar - left_out.sum(-1).clamp(max=seqlen - 1), 1).clamp(min=1)


def half_lives(log_decay: Tensor) -> Tensor:
    """Tokens after which a decay that stays as it is has halved a state: ln 2 / -log_decay.

    Args:
        log_decay: any shape, <= 0 (natural logarithm of the factor a step).

    Returns:
        Like `log_decay`; infinite where nothing decays.
    """
    return math.log(2) / log_decay.abs()


def spectrum(log_decay: Tensor, quantiles: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> Tensor:
    """Quantiles of the half-life of every head, over tokens and rates: a head's decay spectrum.

    Args:
        log_decay: `(batch, seqlen, heads, rates)`.
        quantiles: ascending, in [0, 1].

    Returns:
        `(heads, len(quantiles))`, ascending along the last dimension; infinite where nothing decays.
    """
    rates = log_decay.movedim(2, 0).flatten(1).abs()
    # Of the rates, which are finite where half-lives may not be; a low rate is a long half-life.
    # NumPy selects. PyTorch sorts, which takes four times as long, and refuses more than 16 million numbers.
    found = np.quantile(rates.cpu().numpy(), [1 - q for q in quantiles], axis=1)
    return half_lives(torch.from_numpy(found).to(rates).T)
