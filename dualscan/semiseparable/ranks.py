"""Ranks of the blocks below the diagonal, and the recurrence that they determine (section 3 of arXiv 2405.21060).

The blocks that matter are M[t:, :t+1], the Hankel blocks: what happens from token t on, as far as it depends on the
tokens up to t. Every other block on or below the diagonal is part of one of them. Their ranks are the state sizes that
a recurrence needs at each token, and their factors are the recurrence.
"""

import torch
from torch import Tensor

from dualscan.semiseparable.matrix import StructuredMatrix


def block_ranks(matrix: Tensor | StructuredMatrix, *, tol: float | None = None, diagonal: bool = True) -> Tensor:
    """Numerical ranks of the blocks M[t:, :t+1] for every t, above the diagonal nothing is read.

    Args:
        matrix: `(..., T, T)`.
        tol: singular values below `tol` times the matrix's Frobenius norm count as zero; None: T times the resolution
            of its dtype.
        diagonal: whether the blocks touch the diagonal (definition 3.1), or begin one row lower, M[t+1:, :t+1], where
            a matrix and its inverse have the same ranks; the last block is then empty.

    Returns:
        `(..., T)`, int64.

    Example:
        >>> block_ranks(torch.ones(4, 4)).tolist(), block_ranks(torch.eye(4), diagonal=False).tolist()
        ([1, 1, 1, 1], [0, 0, 0, 0])

    Note:
        T singular value decompositions, O(T⁴): for looking at matrices of some hundred tokens.
    """
    dense = matrix.to_dense() if isinstance(matrix, StructuredMatrix) else matrix
    _check_square(dense)
    length, dense = dense.shape[-1], dense.detach().tril()
    threshold = _threshold(dense, tol)
    ranks = []
    for t in range(length):
        values = torch.linalg.svdvals(dense[..., t + (not diagonal) :, : t + 1])
        ranks.append((values > threshold.unsqueeze(-1)).sum(-1))
    return torch.stack(ranks, dim=-1)


@torch.no_grad()
def hankel_factors(
    matrix: Tensor, *, order: int | None, tol: float | None, truncate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The A, B, C of `SemiseparableMatrix.from_dense`.

    Each block is kept as M[t:, :t+1] = O R with orthonormal rows in R. The next one is the old one without its first
    row, beside a new column m: [O', m] times the orthonormal [[R, 0], [0, 1]]. So its singular value decomposition
    U S Vᵀ is that of the narrow [O', m], the factors go on as O = U S and R = Vᵀ [[R, 0], [0, 1]], and that Vᵀ, which
    turns the state before and the new input into the state after, is [A_t, B_t]. C_t is the first row of O.
    """
    _check_square(matrix)
    length = matrix.shape[-1]
    if (above := matrix.triu(1) != 0).any():
        *index, row, column = above.nonzero()[0].tolist()
        value = matrix[(*index, row, column)].item()
        raise ValueError(f"entry ({row}, {column}) = {value:g} is above the diagonal; pass matrix.tril()")
    if order is not None and order < 1:
        raise ValueError(f"order={order} must be at least 1")
    if truncate and order is None:
        raise ValueError("truncate=True needs the order to keep; pass order=1 or more")
    threshold = _threshold(matrix, tol)
    observed = matrix[..., :0]
    steps, largest = [], (0, 0)
    for t in range(length):
        narrow = torch.cat([observed, matrix[..., t:, t : t + 1]], dim=-1)
        U, values, Vh = torch.linalg.svd(narrow, full_matrices=False)
        rank = max(1, int((values > threshold.unsqueeze(-1)).sum(-1).max()))
        largest = max(largest, (rank, -t))  # the first of the largest
        if truncate:
            rank = min(rank, order or rank)
        observed = U[..., :rank] * values[..., None, :rank]
        steps.append((Vh[..., :rank, :-1], Vh[..., :rank, -1], observed[..., 0, :]))
        observed = observed[..., 1:, :]
    rank, t = largest[0], -largest[1]
    if order is not None and rank > order and not truncate:
        raise ValueError(
            f"rows {t} to {length - 1} of columns 0 to {t} have the numerical rank {rank}, more than order={order}; "
            f"use order={rank}, a larger tol, or truncate=True"
        )
    size = max(B.shape[-1] for _, B, _ in steps)

    def stack(tensors: list[Tensor], trailing: int) -> Tensor:
        grown = [_grow(tensor, size, trailing) for tensor in tensors]
        return torch.stack(grown, dim=-1 - trailing)

    A, B, C = (list(parts) for parts in zip(*steps, strict=True))
    return stack(A, 2), stack(B, 1), stack(C, 1)


def _grow(tensor: Tensor, size: int, trailing: int) -> Tensor:
    """Zeros after the last `trailing` dimensions, up to `size` each."""
    missing = [amount for n in reversed(tensor.shape[-trailing:]) for amount in (0, size - n)]
    return torch.nn.functional.pad(tensor, missing)


def _threshold(matrix: Tensor, tol: float | None) -> Tensor:
    if tol is None:
        tol = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    return tol * torch.linalg.matrix_norm(matrix)


def _check_square(matrix: Tensor) -> None:
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or not matrix.shape[-1]:
        raise ValueError(f"a matrix of the shape {tuple(matrix.shape)} is not square; pass (..., T, T)")
