"""The loss in blocks of tokens: what is in memory at once, and in which order the products run.

Two sizes of block. The logits of a *part* exist in the accumulation dtype, until the softmax has turned them into
losses and, in the dtype of `x`, into their gradient. These gradients are kept for a *block* of several parts, because
every product that adds to the weight's gradient reads and writes all of it: with blocks as small as the parts that
traffic would cost as much as the arithmetic.

With p the softmax and L its log-sum, the gradient of a token's loss with respect to its logits is
`(1 + 2 z_loss L) p - label_smoothing / V - (1 - label_smoothing) onehot(target)`. The weights of the tokens enter
relative to the largest of them, and that one afterwards: a mean over many tokens would underflow in float16.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype

# Tokens of a block and of a part, and the elements up to which both may have more tokens than that. At 50288 entries
# and a width of 2560, both together take the memory that the weight's gradient takes when it is rounded at the end.
BLOCK, PART = (2048, 2**26), (256, 2**23)
LOW_PRECISION = (torch.bfloat16, torch.float16)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor | None,
    z_loss: float,
    label_smoothing: float,
    kernel: bool,
) -> Tensor:
    """Arguments and result as in `reference.linear_cross_entropy_reference`; `kernel`: the softmax in Triton."""
    losses = torch.empty(len(x), dtype=accumulation_dtype(x.dtype), device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        weight = weight.to(x.dtype)
        for part in pieces(0, len(x), most(PART, len(weight))):
            logits = _logits(x[part], weight, bias)
            _softmax(kernel)(logits, target[part], None, losses[part], None, z_loss, label_smoothing)
    return losses if scale is None else (losses * scale).sum()


def gradients(
    scale: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    z_loss: float,
    label_smoothing: float,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses `(tokens,)`, and the gradients of `sum(scale * losses)` in their tensors' dtypes.

    The last, of an absent bias, has no elements.
    """
    tokens, vocab, dtype = len(x), len(weight), accumulation_dtype(x.dtype)
    losses = torch.empty(tokens, dtype=dtype, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(weight.shape, dtype=dtype, device=x.device)
    dbias = None if bias is None else torch.zeros(vocab, dtype=dtype, device=x.device)
    largest = scale.abs().max().clamp(min=torch.finfo(dtype).tiny) if tokens else scale.new_ones(())
    relative = (scale / largest).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        low = weight.to(x.dtype)
        for block in pieces(0, tokens, most(BLOCK, vocab)):
            dlogits = torch.empty(block.stop - block.start, vocab, dtype=x.dtype, device=x.device)
            own = (x[block], target[block], relative[block], losses[block])
            _block_gradient(dlogits, *own, low, bias, z_loss, label_smoothing, kernel)
            torch.mm(dlogits, low, out=dx[block])
            _add_product(total, dlogits, x[block], first=block.start == 0)
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=dtype)
            del dlogits  # before the next block's
    if tokens == 0:
        total.zero_()
    dx.mul_(largest)
    if total.dtype == weight.dtype:
        dweight = total.mul_(largest)
    else:
        dweight = torch.mul(total, largest, out=torch.empty_like(weight, memory_format=torch.contiguous_format))
    if bias is None or dbias is None:
        return losses, dx, dweight, x.new_empty(0)
    return losses, dx, dweight, dbias.mul_(largest).to(bias.dtype)


def _block_gradient(
    dlogits: Tensor,
    x: Tensor,
    target: Tensor,
    scale: Tensor,
    losses: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z_loss: float,
    label_smoothing: float,
    kernel: bool,
) -> None:
    """Fills a block's `dlogits` and `losses` part by part."""
    for part in pieces(0, len(x), most(PART, len(weight))):
        logits = _logits(x[part], weight, bias)
        _softmax(kernel)(logits, target[part], scale[part], losses[part], dlogits[part], z_loss, label_smoothing)
        del logits  # before the next part's


def most(size: tuple[int, int], vocab: int) -> int:
    """Tokens of a block or part."""
    tokens, elements = size
    return max(tokens, elements // vocab)


def pieces(start: int, stop: int, most: int) -> Iterator[slice]:
    """Equal pieces of at most `most` rows."""
    count = max(-(-(stop - start) // most), 1)
    length = max(-(-(stop - start) // count), 1)
    for first in range(start, stop, length):
        yield slice(first, min(first + length, stop))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the accumulation dtype: on a GPU straight from the product's sums, elsewhere rounded to that of `x` first."""
    if x.is_cuda and x.dtype in LOW_PRECISION:
        logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:
        logits = torch.mm(x, weight.t()).to(accumulation_dtype(x.dtype))
    return logits if bias is None else logits.add_(bias)


def _add_product(total: Tensor, dlogits: Tensor, x: Tensor, first: bool) -> None:
    """`total += dlogitsᵀ x`, or `=` for the first, with the sum in the accumulation dtype."""
    keep = 0 if first else 1
    if total.dtype == x.dtype:
        total.addmm_(dlogits.t(), x, beta=keep)
    elif x.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, dlogits.t(), x, total.dtype, beta=keep, out=total)
    elif first:
        total.copy_(torch.mm(dlogits.t(), x))
    else:
        total += torch.mm(dlogits.t(), x)


def _softmax(kernel: bool) -> Any:
    if not kernel:
        return softmax
    from dualscan.ops.loss import triton_softmax

    return triton_softmax.softmax


def softmax(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    losses: Tensor,
    dlogits: Tensor | None,
    z_loss: float,
    label_smoothing: float,
) -> None:
    """Writes the losses and, with `scale`, the gradient of `sum(scale * losses)`; uses up the logits.

    Args:
        logits: `(tokens, vocab)`, overwritten.
        target: `(tokens,)`, negative where a token does not count.
        scale: `(tokens,)` or None.
        losses: `(tokens,)`, written.
        dlogits: `(tokens, vocab)`, written; None without `scale`.
        z_loss: weight of the square of the log-sum-exp.
        label_smoothing: probability that is spread over the vocabulary.
    """
    log_sum = torch.logsumexp(logits, 1)
    index, ignored = target.clamp(min=0).unsqueeze(1), target < 0
    values = log_sum - (1 - label_smoothing) * logits.gather(1, index).squeeze(1) + z_loss * log_sum.square()
    if label_smoothing:
        values -= label_smoothing * logits.mean(1)
    losses.copy_(values.masked_fill_(ignored, 0))
    if scale is None or dlogits is None:
        return
    scale = scale.masked_fill(ignored, 0).unsqueeze(1)
    slope = scale * (1 + 2 * z_loss * log_sum.unsqueeze(1))
    logits.sub_(log_sum.unsqueeze(1)).exp_().mul_(slope)
    if label_smoothing:
        logits.sub_(scale * (label_smoothing / logits.shape[1]))
    logits.scatter_add_(1, index, -(1 - label_smoothing) * scale)
    dlogits.copy_(logits)
