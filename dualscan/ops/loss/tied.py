"""An embedding whose matrix is the loss's too: their gradients add up where the loss has left its own.

A gradient of the embedding alone is as large as its matrix, though it has a row a token: it would be filled with zeros,
scattered into and added to the loss's, which goes over memory six times. Here its rows are added to what the loss
returned.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualscan.ops import _triton
from dualscan.ops._launch import unsupported


def tied_embedding(tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`F.embedding(tokens, weight)`, and the weight for `linear_cross_entropy`.

    Args:
        tokens: `(...)` int64 or int32.
        weight: `(vocab, d)`.

    Returns:
        `(..., d)`, and the weight's values under another node of the graph. What that gets as its gradient is changed
        in place: it is for one call, which makes a new tensor for it, as that of `linear_cross_entropy` does.
        Differentiable once.
    """
    return _Tied.apply(tokens, weight)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tokens)
        ctx.vocab = len(weight)
        return F.embedding(tokens, weight), weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: Any) -> tuple[None, Tensor | None]:  # pyrefly: ignore[bad-override]
        (drows, dweight), (tokens,) = grads_out, ctx.saved_tensors
        if drows is None:
            return None, dweight
        if dweight is None:
            return None, _dense(drows, tokens, ctx.vocab)
        return None, add_rows_(dweight, tokens, drows)


def add_rows_(total: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """`total[tokens[i]] += rows[i]` for all i, in a fixed order.

    Args:
        total: `(vocab, d)`, changed in place.
        tokens: `(...)` int64 or int32.
        rows: `(..., d)`.

    Returns:
        `total`.
    """
    reasons = (_triton.obstacle(total.device), unsupported(total.dtype), unsupported(rows.dtype))
    if total.is_contiguous() and not any(reasons):
        from dualscan.ops.loss import triton_rows

        triton_rows.add_rows_(total, tokens.flatten(), rows.reshape(-1, total.shape[1]))
        return total
    return total.add_(_dense(rows, tokens, len(total)))


def _dense(rows: Tensor, tokens: Tensor, vocab: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(rows, tokens, vocab, -1, False)
