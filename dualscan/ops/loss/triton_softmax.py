"""The softmax, its losses and its gradient on a GPU: a program goes over one token's logits twice.

The first time for the log-sum-exp, the second, from the L2 cache, for the gradient, which takes the logits' place.
PyTorch's operators would go over memory eight times. Every thread keeps the largest and the sum of what it has seen
itself, and they meet once a token: a program that met for every block would wait there and fetch nothing meanwhile.
"""

import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher, row_alignment
from dualscan.ops.triton_common import LOG2E

# Logits that a program takes at once, so many that two programs fill a multiprocessor: what all of them have seen once
# has to stay in the L2 cache.
BLOCK = 16384
MOST_WARPS = 16
# Neighbours that have one maximum and sum: 16 bytes of 16-bit logits, which one thread loads.
GROUP = 8
# Elements that a program of `scale_kernel` takes at once, its warps, and programs a multiprocessor.
SCALE_BLOCK, SCALE_WARPS, SCALE_PROGRAMS = 4096, 8, 8


@triton.jit
def _finite(highest):
    """What differences are taken from: while all is -inf, 0 rather than itself."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit(do_not_specialize=["vocab", "scale_step", "ignore_index"])
def softmax_kernel(
    logits, target, scale, losses,
    vocab: tl.int32, scale_step: tl.int32, ignore_index: tl.int64, z_loss: tl.float32, label_smoothing: tl.float32,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr, SMOOTH: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Grid `(tokens,)`. The vocabulary counts in ALIGN."""
    vocab = vocab * ALIGN
    token = tl.program_id(0).to(tl.int64)
    logits += token * vocab
    t = tl.load(target + token)
    counts = t != ignore_index
    valid = (t >= 0) & (t < vocab)
    # A target outside the vocabulary shows as NaN; looking at it before would mean to wait for the GPU. Read here,
    # because the gradient takes its place.
    chosen = tl.load(logits + t, mask=valid, other=float("nan")).to(tl.float32)
    v = tl.arange(0, BLOCK)
    top = tl.full([BLOCK // GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK // GROUP], tl.float32)
    plain = tl.zeros([BLOCK // GROUP], tl.float32)
    for first in range(0, vocab, BLOCK):
        inside = first + v < vocab
        s = tl.load(logits + first + v, mask=inside, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        if SMOOTH:
            plain += tl.sum(tl.reshape(tl.where(inside, s, 0.0), [BLOCK // GROUP, GROUP]), 1)
        s = tl.reshape(s, [BLOCK // GROUP, GROUP])
        highest = tl.maximum(top, tl.max(s, 1))
        base = _finite(highest)
        total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((s - base[:, None]) * LOG2E), 1)
        top = highest
    most = tl.max(top, 0)
    log_sum = most + tl.log(tl.sum(total * tl.exp2((top - _finite(most)) * LOG2E), 0))
    loss = log_sum - (1.0 - label_smoothing) * chosen + z_loss * log_sum * log_sum
    if SMOOTH:
        loss -= label_smoothing * tl.sum(plain, 0) / vocab
    tl.store(losses + token, tl.where(counts, loss, 0.0))
    if GRADIENT:
        weight = tl.where(counts, tl.load(scale + token * scale_step), 0.0)
        slope = weight * (1.0 + 2.0 * z_loss * log_sum)
        hit = weight * (1.0 - label_smoothing)
        spread = weight * label_smoothing / vocab
        place = tl.where(valid, t, -1).to(tl.int32)
        for first in range(0, vocab, BLOCK):
            inside = first + v < vocab
            s = tl.load(logits + first + v, mask=inside, other=float("-inf"), eviction_policy="evict_first")
            ds = tl.exp2((s.to(tl.float32) - log_sum) * LOG2E) * slope - tl.where(first + v == place, hit, 0.0)
            if SMOOTH:
                ds -= spread
            tl.store(logits + first + v, ds.to(logits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def scale_kernel(t, factor, count: tl.int64, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """`t *= factor`, or nothing for a factor of 1. Any grid `(programs,)`. The elements count in ALIGN."""
    count = count * ALIGN
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, count, tl.num_programs(0).to(tl.int64) * BLOCK):
            i = start + tl.arange(0, BLOCK)
            scaled = tl.load(t + i, mask=i < count).to(tl.float32) * by
            tl.store(t + i, scaled.to(t.dtype.element_ty), mask=i < count)


_softmax, _scale = Launcher(softmax_kernel), Launcher(scale_kernel)


def softmax(
    logits: Tensor, target: Tensor, scale: Tensor | None, losses: Tensor, ignore_index: int, z_loss: float,
    label_smoothing: float,
) -> None:  # fmt: skip
    """As `torch_softmax.softmax`; without `scale` the logits stay as they are."""
    tokens, vocab = logits.shape
    if tokens == 0:
        return
    align, block = row_alignment(vocab), min(BLOCK, triton.next_power_of_2(vocab))
    warps = min(max(block // 512, 4), MOST_WARPS)
    with _triton.on_device(logits):
        _softmax(
            (tokens, 1, 1), (logits, target, scale, losses),
            (vocab // align, 0 if scale is None else scale.stride(0), ignore_index, z_loss, label_smoothing),
            (block, min(GROUP, block), align, label_smoothing != 0, scale is not None), warps,
        )  # fmt: skip


def scale_(t: Tensor, factor: Tensor) -> None:
    """`t *= factor`, a float32 tensor of one element; a factor of 1 costs a launch and no pass over memory."""
    count = t.numel()
    if count == 0:
        return
    align = row_alignment(count)
    programs = min(-(-count // SCALE_BLOCK), SCALE_PROGRAMS * _triton.multiprocessors(t.device))
    with _triton.on_device(t):
        _scale((programs, 1, 1), (t, factor), (count // align,), (SCALE_BLOCK, align), SCALE_WARPS)
