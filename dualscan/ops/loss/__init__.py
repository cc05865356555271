"""Cross-entropy of a linear map, without the logits of all tokens in memory at once.

A vocabulary is larger than the model is wide: the logits of 16384 tokens over 50288 entries take 3.3 GB in float32, and
a loss that goes over them keeps several copies. Here they exist for a block of tokens at a time.
"""

from typing import Literal

import torch
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._dispatch import Impl, Operator, announce_slow_path, anywhere, choose, register
from dualscan.ops._launch import unsupported
from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.loss.library import linear_cross_entropy_fwd
from dualscan.ops.loss.reference import linear_cross_entropy_reference
from dualscan.ops.loss.validate import validate

_OPERATOR = register(
    Operator(
        name="linear_cross_entropy",
        impls={"triton": _triton.obstacle, "chunked": anywhere, "reference": anywhere},
        preference=("triton", "chunked", "reference"),
    )
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Cross-entropy in nats between targets and the softmax of `x weightᵀ + bias`.

    With s the logits of a token, L = log sum_v exp(s_v), V the size of the vocabulary and t the target,
    `loss = L - (1 - label_smoothing) s_t - label_smoothing / V sum_v s_v + z_loss L²`. (Label smoothing: arXiv
    1512.00567, section 7. z-loss, which keeps L near 0: arXiv 2204.02311, section 5.)

    Args:
        x: `(..., d)` float.
        weight: `(vocab, d)` float; one row an entry of the vocabulary, padding included, all of which take part in the
            softmax. May be wider than `x` (float32 weights under bfloat16 inputs).
        target: `(...)` int64, 0 to vocab - 1 or `ignore_index`.
        bias: `(vocab,)` float; -inf leaves an entry out of the softmax (not together with label smoothing).
        ignore_index: the target of tokens that do not count.
        z_loss: weight of L², at least 0.
        label_smoothing: share of the target's probability that is spread over the vocabulary, 0 to 1.
        reduction: "mean" over the tokens that count (NaN if none does), "sum", or "none": a loss a token, 0 for those
            that do not count.
        impl: "auto", "triton" (the softmax as a kernel for NVIDIA GPUs), "chunked" (blocks of tokens in PyTorch) or
            "reference" (plain differentiable PyTorch, all logits at once).

    Returns:
        A scalar, or `(...)` for "none", float32 (float64 for float64). Differentiable once in `x`, `weight`, `bias`.

    Raises:
        ValueError: a shape, a device, an option or, on a CPU, a target does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> import torch
        >>> x, weight = torch.zeros(2, 3, 8), torch.randn(4, 8)
        >>> linear_cross_entropy(x, weight, torch.tensor([[0, 1, 2], [3, -100, 0]]))  # log 4
        tensor(1.3863)

    Note:
        `2 tokens d vocab` FLOPs, and 6 with gradients: "mean" and "sum" compute them in the forward, where the logits
        are; "none", and a second backward of one graph, computes the logits again, 8 in all.

        A loss that takes no gradients with it, as that of "none", comes from float32 logits. Otherwise logits and their
        gradients have the dtype of `x`. In bfloat16 that costs a mean 6e-6 of its value and leaves dx and dweight an
        error of 5.7e-3, as PyTorch's cross-entropy of bfloat16 logits has. The gradient of bfloat16 weights adds up in
        itself, in at most 32 sums (16 give 7.5e-3; no float32 copy of the weight's size), any other in float32.
    """
    validate(x, weight, target, bias, ignore_index, z_loss, label_smoothing, reduction)
    form = _form(impl, x)
    scale = None
    if reduction != "none":
        one = torch.ones((), dtype=accumulation_dtype(x.dtype), device=x.device)
        scale = one / (target != ignore_index).sum() if reduction == "mean" else one
    # Targets go on as they are and their weight is one number: what there is by token would add to the peak.
    tokens = target.flatten().contiguous()
    inputs = (x.reshape(-1, x.shape[-1]), weight, bias, tokens, scale, ignore_index, z_loss, label_smoothing)
    if form == "reference":
        loss = linear_cross_entropy_reference(*inputs)
    else:
        loss = linear_cross_entropy_fwd(*inputs, form == "triton")
    return loss if scale is not None else loss.view(target.shape)


def _form(impl: str, x: Tensor) -> str:
    """The implementation that runs; `auto` says once why it leaves the kernel on a GPU."""
    form = impl if impl == "triton" and _triton.interpreted() else choose(_OPERATOR, impl, x.device)
    reason = unsupported(x.dtype) if form == "triton" else _triton.obstacle(x.device) if x.is_cuda else None
    if reason is None or impl not in ("auto", "triton"):
        return form
    if impl == "triton":
        raise ValueError(f"linear_cross_entropy: impl='triton' cannot run on these inputs: {reason}; use impl='auto'.")
    if not torch.compiler.is_compiling():
        announce_slow_path("linear_cross_entropy", "cuda", reason)
    return "chunked"
