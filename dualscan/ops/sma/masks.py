"""Masks of structured masked attention: the decaying ones of this library, and what multiplying by any of them costs.

Every `StructuredMatrix` is a mask. Those here are 1-semiseparable and keep the logarithm of their factors, so that a
decay close to 1 loses nothing: linear attention, RetNet, and SSD itself (section 4.3 of arXiv 2405.21060).
"""

import math

import torch
from torch import Tensor

from dualscan.ops.ssd.reference import segment_sum
from dualscan.semiseparable import (
    Cauchy,
    Cosine,
    Dense,
    Diagonal,
    Fourier,
    LowRank,
    OneSemiseparable,
    SemiseparableMatrix,
    StructuredMatrix,
    Vandermonde,
)
from dualscan.semiseparable.matrix import Block, Product, Sum, Transposed
from dualscan.semiseparable.structured import check_dimensions

# In the time of one FLOP of a matrix product on a CPU (benchmark `sma`): a column x token x log2(tokens) of a
# multiplication by Fourier transforms, and an entry of a mask and of the scores, written and multiplied.
FOURIER_COST = 30.0
ENTRY_COST = 400.0


class DecayMask(OneSemiseparable):
    """L_ts = exp(Σ_{s < r ≤ t} log_decay_r) on and below the diagonal.

    Args:
        log_decay: `(..., T)`, <= 0; the first entry is not read. -inf forgets everything before the token.

    Example:
        >>> DecayMask(torch.tensor([0.0, 0.5, 0.25]).log()).to_dense().tolist()
        [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.125, 0.25, 1.0]]
    """

    log_decay: Tensor

    def __init__(self, log_decay: Tensor):
        check_dimensions("log_decay", log_decay, "(..., T)")
        object.__setattr__(self, "log_decay", log_decay)

    @property
    def a(self) -> Tensor:  # pyrefly: ignore[bad-override]
        """The factors."""
        return self.log_decay.exp()

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.log_decay.shape, self.log_decay.shape[-1]))

    def to_dense(self) -> Tensor:
        return segment_sum(self.log_decay).exp()


def causal(length: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> DecayMask:
    """Ones on and below the diagonal: linear attention.

    Args:
        length: T.
        dtype: of the entries; None is PyTorch's default.
        device: None is PyTorch's default.

    Returns:
        A mask of shape `(T, T)`.
    """
    return DecayMask(torch.zeros(length, dtype=dtype, device=device))


def decay(log_decay: Tensor, length: int) -> DecayMask:
    """γ^(t - s): the mask of RetNet.

    Args:
        log_decay: log γ <= 0, `(nheads,)` or a scalar.
        length: T.

    Returns:
        A mask of shape `(nheads, T, T)` or `(T, T)`.
    """
    return DecayMask(log_decay.unsqueeze(-1).expand(*log_decay.shape, length))


def selective(log_decay: Tensor) -> DecayMask:
    """Decays from the data: the mask of SSD.

    Args:
        log_decay: `(batch, T, nheads)` as in `linear_attention`, <= 0; the Δ A of `ssd`.

    Returns:
        A mask of shape `(batch, nheads, T, T)`.
    """
    return DecayMask(log_decay.transpose(-1, -2))


def signed_log_decay(mask: OneSemiseparable) -> tuple[Tensor, Tensor | None]:
    """The logarithms of the factors' sizes `(..., T)`, and the signs of the first column if there are negative ones."""
    if isinstance(mask, DecayMask):
        return mask.log_decay, None
    a = torch.cat([torch.ones_like(mask.a[..., :1]), mask.a[..., 1:]], dim=-1)
    return a.abs().log(), a.sign().cumprod(-1) if (a < 0).any() else None


def obstacle(mask: StructuredMatrix) -> str | None:
    """Why the operator of `ssd` cannot multiply by this mask, or None."""
    if not isinstance(mask, OneSemiseparable):
        return f"{mask!r} is not 1-semiseparable by its type"
    if isinstance(mask, DecayMask):
        return None
    if mask.dtype.is_complex:
        return f"{mask!r} is complex"
    size = mask.a[..., 1:].abs()
    if (size > 1).any():
        return f"{mask!r} has a factor of size {size.max().item():g}, over 1"
    # Its logarithm stands for a factor of 0 exactly, but has no derivative there.
    if mask.a.requires_grad and (size == 0).any():
        return f"{mask!r} has a factor of 0 that wants a gradient"
    return None


def column_flops(mask: StructuredMatrix) -> float:
    """What multiplying one column costs, in FLOPs of a matrix product; infinite where it is no better than dense.

    Of a class that is unknown here its own multiplication is taken to cost what Fourier transforms do.
    """
    rows, columns = mask.shape[-2:]
    match mask:
        case Dense() | Vandermonde() | Cauchy():
            return math.inf
        case Sum() | Product():
            return column_flops(mask.left) + column_flops(mask.right)
        case Transposed() | Block():
            return column_flops(mask.matrix)
        case Diagonal():
            return rows
        case LowRank():
            return 2 * (rows + columns) * mask.left.shape[-1]
        case SemiseparableMatrix():
            return 2 * rows * (64 + 4 * mask.order)
        case Fourier() | Cosine():  # one transform, without padding
            return FOURIER_COST * rows * math.log2(rows + 1)
    if type(mask).matmul is StructuredMatrix.matmul:
        return math.inf
    return FOURIER_COST * (rows + columns) * math.log2(rows + columns + 1)
