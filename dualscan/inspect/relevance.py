"""Which tokens a prediction rests on: attention rollout, Mamba-attribution, and input times gradient.

Rollout (arXiv 2005.00928) multiplies what the layers mix, the residual stream included. Mamba-attribution (arXiv
2403.01590, section 4) weights each layer's tokens by the gradient of a logit before it does. Input times gradient looks
at no matrix; it is the baseline that the other two have to beat.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def mean_mixing(matrices: Tensor) -> Tensor:
    """One non-negative matrix a layer, its rows summing to 1: the mean of |matrix| over the heads, rows normalised.

    Heads that write little count little. A row of zeros becomes the token itself.

    Args:
        matrices: `(..., heads, seqlen, seqlen)`.

    Returns:
        `(..., seqlen, seqlen)`.
    """
    return _normalise_rows(matrices.abs().mean(-3))


def weighted_mixing(matrices: Tensor, gradient: Tensor) -> Tensor:
    """One non-negative matrix a layer, token j weighted by how much the logit grows with the layer's output there.

    The positive part of the matrices over their largest entry, averaged over the heads, times s_j: the largest positive
    component of the gradient at token j, scaled to [0, 1] over the tokens (arXiv 2403.01590, section 4).

    Args:
        matrices: `(..., heads, seqlen, seqlen)`.
        gradient: `(..., seqlen, d_model)`, of a logit with respect to the layer's output.

    Returns:
        `(..., seqlen, seqlen)`.
    """
    positive = matrices.clamp(min=0)
    return fuse(positive.mean(-3), positive.amax((-3, -2, -1)), gradient)


def fuse(mean: Tensor, largest: Tensor, gradient: Tensor) -> Tensor:
    """The last step of `weighted_mixing`, from the mean `(..., seqlen, seqlen)` and the largest entry `(...)`."""
    strength = gradient.clamp(min=0).amax(-1)
    low, high = strength.amin(-1, keepdim=True), strength.amax(-1, keepdim=True)
    strength = (strength - low) / (high - low).clamp(min=torch.finfo(strength.dtype).tiny)
    scale = largest.clamp(min=torch.finfo(mean.dtype).tiny)[..., None, None]
    return mean / scale * strength.unsqueeze(-2).to(mean.dtype)


def rollout(layers: Iterable[Tensor]) -> Tensor:
    """Relevance of every token (column) for every token of the last layer (row): Π_l rows(M_l + 1), the last on the
    left (arXiv 2005.00928, equation 1).

    Args:
        layers: matrices `(..., seqlen, seqlen)` with non-negative entries, from the first layer to the last, as from
            `mean_mixing` or `weighted_mixing`.

    Returns:
        `(..., seqlen, seqlen)`; rows sum to 1.

    Raises:
        ValueError: no layers.

    Example:
        >>> rollout([torch.tensor([[1.0, 0.0], [1.0, 0.0]])])
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]])
    """
    joint = None
    for matrix in layers:
        joint = add_layer(joint, matrix)
    if joint is None:
        raise ValueError("rollout got no layers; give at least one matrix.")
    return joint


def add_layer(joint: Tensor | None, matrix: Tensor) -> Tensor:
    """One more layer of `rollout`: rows(matrix + 1) @ joint, or the first factor itself where there is no `joint`."""
    step = matrix.clone()
    step.diagonal(dim1=-2, dim2=-1).add_(1)
    step /= step.sum(-1, keepdim=True)
    return step if joint is None else step @ joint


def _normalise_rows(matrix: Tensor) -> Tensor:
    total = matrix.sum(-1, keepdim=True)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.where(total > 0, matrix / total.clamp(min=torch.finfo(matrix.dtype).tiny), eye)
