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
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
) -> Tensor:
    """`L - (1 - label_smoothing) s_t - label_smoothing mean(s) + z_loss L²` with `s = x weightᵀ + bias`, `L` its
    log-sum-exp.

    Args:
        x: `(tokens, d)`.
        weight: `(vocab, d)`.
        bias: `(vocab,)` or None.
        target: `(tokens,)`.
        scale: `()`, what the sum is multiplied by, without gradient; None: no sum.
        ignore_index: the target of tokens that do not count.
        z_loss: weight of L².
        label_smoothing: probability that is spread over the vocabulary.

    Returns:
        A scalar, or `(tokens,)` without `scale`.
    """
    dtype = accumulation_dtype(x.dtype)
    logits = x.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    log_sum, ignored = torch.logsumexp(logits, 1), target == ignore_index
    chosen = logits.gather(1, target.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    losses = log_sum - (1 - label_smoothing) * chosen
    if label_smoothing:
        losses = losses - label_smoothing * logits.mean(1)
    losses = torch.where(ignored, 0, losses + z_loss * log_sum.square())
    return losses if scale is None else losses.sum() * scale
