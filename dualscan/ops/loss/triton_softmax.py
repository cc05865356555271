"""The softmax, its losses and its gradient on a GPU: a program goes over one token's logits twice.

The first time for the log-sum-exp, the second, from the L2 cache, for the gradient. PyTorch's operators would go over
memory eight times.
"""

import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher, row_alignment
from dualscan.ops.triton_common import LOG2E

# Logits that a program takes at once.
BLOCK = 4096
WARPS = 8


@triton.jit(do_not_specialize=["vocab"])
def softmax_kernel(
    logits, target, scale, losses, dlogits, vocab: tl.int32, z_loss: tl.float32, label_smoothing: tl.float32,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr, SMOOTH: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Grid `(tokens,)`. The vocabulary counts in ALIGN."""
    vocab = vocab * ALIGN
    token = tl.program_id(0).to(tl.int64)
    logits += token * vocab
    v = tl.arange(0, BLOCK)
    top, total, plain = float("-inf"), 0.0, 0.0
    for first in range(0, vocab, BLOCK):
        inside = first + v < vocab
        s = tl.load(logits + first + v, mask=inside, other=float("-inf"), eviction_policy="evict_last")
        highest = tl.maximum(top, tl.max(s, 0))
        # While all is -inf, differences are taken from 0 rather than from itself.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((s - base) * LOG2E), 0)
        top = highest
        if SMOOTH:
            plain += tl.sum(tl.where(inside, s, 0.0), 0)
    log_sum = top + tl.log(total)
    t = tl.load(target + token)
    # A target outside the vocabulary shows as NaN; looking at it before would mean to wait for the GPU.
    chosen = tl.load(logits + t, mask=(t >= 0) & (t < vocab), other=float("nan"))
    loss = log_sum - (1.0 - label_smoothing) * chosen + z_loss * log_sum * log_sum
    if SMOOTH:
        loss -= label_smoothing * plain / vocab
    tl.store(losses + token, tl.where(t < 0, 0.0, loss))
    if GRADIENT:
        dlogits += token * vocab
        weight = tl.where(t < 0, 0.0, tl.load(scale + token))
        slope = weight * (1.0 + 2.0 * z_loss * log_sum)
        hit = weight * (1.0 - label_smoothing)
        spread = weight * label_smoothing / vocab
        for first in range(0, vocab, BLOCK):
            inside = first + v < vocab
            s = tl.load(logits + first + v, mask=inside, other=float("-inf"), eviction_policy="evict_first")
            ds = tl.exp2((s - log_sum) * LOG2E) * slope - tl.where(first + v == t, hit, 0.0)
            if SMOOTH:
                ds -= spread
            tl.store(dlogits + first + v, ds.to(dlogits.dtype.element_ty), mask=inside)


_softmax = Launcher(softmax_kernel)


def softmax(
    logits: Tensor, target: Tensor, scale: Tensor | None, losses: Tensor, dlogits: Tensor | None, z_loss: float,
    label_smoothing: float,
) -> None:  # fmt: skip
    """As `chunked.softmax`; the logits stay as they are."""
    tokens, vocab = logits.shape
    if tokens == 0:
        return
    align = row_alignment(vocab)
    with _triton.on_device(logits):
        _softmax(
            (tokens, 1, 1), (logits, target, scale, losses, dlogits), (vocab // align, z_loss, label_smoothing),
            (min(BLOCK, triton.next_power_of_2(vocab)), align, label_smoothing != 0, scale is not None), WARPS,
        )  # fmt: skip
