"""The softmax, its losses and its gradient in plain PyTorch, for any dtype and device."""

import torch
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype

# Elements of logits in 16 bits that are widened at once.
PART = 2**23


def softmax(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    losses: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
) -> None:
    """Writes the losses; uses up the logits, or with `scale` turns them into the gradient of `sum(scale * losses)`.

    Args:
        logits: `(tokens, vocab)`, overwritten.
        target: `(tokens,)`, contiguous.
        scale: `(tokens,)`, any stride, or None.
        losses: `(tokens,)`, written, in the accumulation dtype.
        ignore_index: the target of tokens that do not count.
        z_loss: weight of the square of the log-sum-exp.
        label_smoothing: probability that is spread over the vocabulary.
    """
    if logits.element_size() == 2:
        rows = max(PART // logits.shape[1], 1)
        for first in range(0, len(logits), rows):
            part = slice(first, first + rows)
            wide, own = logits[part].to(accumulation_dtype(logits.dtype)), None if scale is None else scale[part]
            softmax(wide, target[part], own, losses[part], ignore_index, z_loss, label_smoothing)
            if scale is not None:
                logits[part].copy_(wide)
        return
    log_sum, ignored = torch.logsumexp(logits, 1), target == ignore_index
    index = target.masked_fill(ignored, 0).unsqueeze(1)
    values = log_sum - (1 - label_smoothing) * logits.gather(1, index).squeeze(1) + z_loss * log_sum.square()
    if label_smoothing:
        values -= label_smoothing * logits.mean(1)
    losses.copy_(values.masked_fill_(ignored, 0))
    if scale is None:
        return
    scale = scale.masked_fill(ignored, 0).unsqueeze(1)
    slope = scale * (1 + 2 * z_loss * log_sum.unsqueeze(1))
    logits.sub_(log_sum.unsqueeze(1)).exp_().mul_(slope)
    if label_smoothing:
        logits.sub_(scale * (label_smoothing / logits.shape[1]))
    logits.scatter_add_(1, index, -(1 - label_smoothing) * scale)


def scale_(t: Tensor, factor: Tensor) -> None:
    """`t *= factor`, a tensor of one element; a factor of 1 is not looked for where that would mean to wait."""
    if factor.is_cuda or factor.item() != 1:
        t.mul_(factor)
