"""The specification of the linear cross-entropy, in plain differentiable PyTorch."""

import torch
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor | None,
    z_loss: float,
    label_smoothing: float,
) -> Tensor:
    """`L - (1 - label_smoothing) s_t - label_smoothing mean(s) + z_loss L²` with `s = x weightᵀ + bias`, `L` its
    log-sum-exp.

    Args:
        x: `(tokens, d)`.
        weight: `(vocab, d)`.
        bias: `(vocab,)` or None.
        target: `(tokens,)`; negative: the token does not count.
        scale: `(tokens,)` weights of a sum, without gradient; None: no sum.
        z_loss: weight of L².
        label_smoothing: probability that is spread over the vocabulary.

    Returns:
        A scalar, or `(tokens,)` without `scale`.
    """
    dtype = accumulation_dtype(x.dtype)
    logits = x.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    log_sum = torch.logsumexp(logits, 1)
    losses = log_sum - (1 - label_smoothing) * logits.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    if label_smoothing:
        losses = losses - label_smoothing * logits.mean(1)
    losses = torch.where(target < 0, 0, losses + z_loss * log_sum.square())
    return losses if scale is None else (losses * scale).sum()
