"""The loss in slices of tokens: what is in memory at once, and in which order the products run.

One buffer holds the logits of a slice, in the dtype of `x`, and the softmax leaves their gradient in their place: in
16 bits it passes half the memory that float32 would, and the buffer is the only one as wide as the vocabulary. Every
product that adds to the weight's gradient reads and writes all of it, so a slice has as many tokens as the memory of
the buffer allows. Alone, the forward has no gradient to hold and takes float32 logits, from which a token's loss is
exact to float32.

With p the softmax and L its log-sum, the gradient of a token's loss with respect to its logits is
`(1 + 2 z_loss L) p - label_smoothing / V - (1 - label_smoothing) onehot(target)`. In float16, where the weights of a
mean over many tokens would underflow, they enter relative to the largest of them, and that one afterwards.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.loss import torch_softmax

# Tokens of a slice, and the elements of its logits up to which it may have more: where the weight's gradient adds up in
# 16 bits, where it does in float32 and costs twice the memory traffic a slice, and where nothing is left behind.
SLICE_LOW, SLICE, SLICE_FORWARD = (1024, 2**25), (4096, 2**26), (512, 2**24)
# Sums in 16 bits are rounded once a slice, so of many tokens a slice has more.
MOST_ROUNDINGS = 32
# Rows of the tiles that products are cut into.
TILE = 128
LOW_PRECISION = (torch.bfloat16, torch.float16)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    kernel: bool,
) -> Tensor:
    """Arguments and result as in `reference.linear_cross_entropy_reference`; `kernel`: the softmax in Triton."""
    losses = torch.empty(len(x), dtype=accumulation_dtype(x.dtype), device=x.device)
    options = (ignore_index, z_loss, label_smoothing)
    with torch.autocast(x.device.type, enabled=False):
        weight = weight.to(x.dtype)
        for part in pieces(len(x), most(SLICE_FORWARD, len(weight))):
            _implementation(kernel).softmax(_logits(x[part], weight, bias), target[part], None, losses[part], *options)
    return losses if scale is None else losses.sum() * scale


def gradients(
    scale: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses `(tokens,)`, and the gradients of `sum(scale * losses)` in their tensors' dtypes.

    `scale` is one weight `()`, or a weight a token. The last result, of an absent bias, has no elements.
    """
    tokens, vocab, dtype = len(x), len(weight), accumulation_dtype(x.dtype)
    losses = torch.empty(tokens, dtype=dtype, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # The sums of float16 are relative to a weight and may be large: not in float16 itself.
    low_sums = x.dtype == weight.dtype == torch.bfloat16
    total = torch.empty(weight.shape, dtype=weight.dtype if low_sums else dtype, device=x.device)
    dbias = None if bias is None else torch.zeros(vocab, dtype=dtype, device=x.device)
    own, largest = _implementation(kernel), None
    if x.dtype == torch.float16 and tokens:
        largest = scale.abs().max().clamp(min=torch.finfo(dtype).tiny)
        scale = scale / largest
    scale = scale.expand(tokens)
    rows = max(most(SLICE_LOW, vocab), -(-tokens // MOST_ROUNDINGS)) if low_sums else most(SLICE, vocab)
    with torch.autocast(x.device.type, enabled=False):
        low = weight.to(x.dtype)
        buffer = torch.empty(min(rows, tokens), vocab, dtype=x.dtype, device=x.device)
        for part in pieces(tokens, rows):
            logits = torch.mm(x[part], low.t(), out=buffer[: part.stop - part.start])
            if bias is not None:
                logits.add_(bias)
            own.softmax(logits, target[part], scale[part], losses[part], ignore_index, z_loss, label_smoothing)
            torch.mm(logits, low, out=dx[part])
            _add_product(total, logits, x[part], first=part.start == 0)
            if dbias is not None:
                dbias += logits.sum(0, dtype=dtype)
            del logits
        del buffer  # before a rounded copy of the sums
    if tokens == 0:
        total.zero_()
    if largest is not None:
        for t in (dx, total, dbias):
            if t is not None:
                own.scale_(t, largest)
    absent = x.new_empty(0)
    return losses, dx, total.to(weight.dtype), absent if bias is None or dbias is None else dbias.to(bias.dtype)


def scale_(t: Tensor, factor: Tensor, kernel: bool) -> None:
    """`t *= factor`, which has one element."""
    _implementation(kernel).scale_(t, factor)


def most(size: tuple[int, int], vocab: int) -> int:
    """Tokens of a slice at most."""
    tokens, elements = size
    return max(tokens, elements // vocab)


def pieces(tokens: int, most: int) -> Iterator[slice]:
    """Pieces of at most `most` tokens, all but the last of one length: about equal, in whole tiles where that fits."""
    count = max(-(-tokens // most), 1)
    length = min(-(-tokens // (count * TILE)) * TILE, most)
    for first in range(0, tokens, max(length, 1)):
        yield slice(first, min(first + length, tokens))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the accumulation dtype: on a GPU straight from the product's sums, elsewhere rounded to that of `x` first."""
    if x.is_cuda and x.dtype in LOW_PRECISION:
        logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:
        logits = torch.mm(x, weight.t()).to(accumulation_dtype(x.dtype))
    return logits if bias is None else logits.add_(bias)


def _add_product(total: Tensor, dlogits: Tensor, x: Tensor, first: bool) -> None:
    """`total += dlogitsᵀ x`, or `=` for the first; rounded to the dtype of `total` once."""
    keep = 0 if first else 1
    if total.dtype == x.dtype:
        total.addmm_(dlogits.t(), x, beta=keep)
    elif x.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, dlogits.t(), x, total.dtype, beta=keep, out=total)
    elif first:
        total.copy_(torch.mm(dlogits.t(), x))
    else:
        total += torch.mm(dlogits.t(), x)


def _implementation(kernel: bool) -> Any:
    """The module that has `softmax` and `scale_`."""
    if kernel:
        from dualscan.ops.loss import triton_softmax

        return triton_softmax
    return torch_softmax
