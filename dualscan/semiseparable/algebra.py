"""Closed forms: sums, products and elementwise products of structures that have a structure again.

The module registers them, so that `+`, `@` and `*` find them; other pairs are multiplied one after the other. Those of
recurrences are proposition C.1 of arXiv 2405.21060.
"""

import itertools
import operator

import torch
from torch import Tensor

from dualscan.semiseparable import modes
from dualscan.semiseparable.matrix import Diagonal, Product, StructuredMatrix, closed
from dualscan.semiseparable.sss import OneSemiseparable, SemiseparableMatrix, as_semiseparable
from dualscan.semiseparable.structured import LowRank, Toeplitz


@closed(operator.add, Toeplitz, Toeplitz)
def _(left: Toeplitz, right: Toeplitz) -> Toeplitz:
    if left.row is None or right.row is None:
        row = left.row if right.row is None else right.row
        return Toeplitz(left.column + right.column, row)
    return Toeplitz(left.column + right.column, left.row + right.row)


@closed(operator.mul, Toeplitz, Toeplitz)
def _(left: Toeplitz, right: Toeplitz) -> Toeplitz:
    row = None if left.row is None or right.row is None else left.row * right.row
    return Toeplitz(left.column * right.column, row)


@closed(operator.matmul, Toeplitz, Toeplitz)
def _(left: Toeplitz, right: Toeplitz) -> StructuredMatrix:
    if left.row is None and right.row is None:
        product = left @ right.column.unsqueeze(-1)
        return Toeplitz(product.squeeze(-1))
    return Product(left, right)


@closed(operator.matmul, Diagonal, Diagonal)
@closed(operator.mul, Diagonal, Diagonal)
def _(left: Diagonal, right: Diagonal) -> Diagonal:
    return Diagonal(left.values * right.values)


@closed(operator.add, Diagonal, Diagonal)
def _(left: Diagonal, right: Diagonal) -> Diagonal:
    return Diagonal(left.values + right.values)


@closed(operator.matmul, LowRank, StructuredMatrix)
def _(left: LowRank, right: StructuredMatrix) -> LowRank:
    return LowRank(left.left, right.mT @ left.right)


@closed(operator.matmul, StructuredMatrix, LowRank)
def _(left: StructuredMatrix, right: LowRank) -> LowRank:
    return LowRank(left @ right.left, right.right)


@closed(operator.add, LowRank, LowRank)
def _(left: LowRank, right: LowRank) -> LowRank:
    """Ranks add."""
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])

    def beside(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([part.expand(*batch, *part.shape[-2:]) for part in (one, other)], dim=-1)

    return LowRank(beside(left.left, right.left), beside(left.right, right.right))


@closed(operator.mul, LowRank, LowRank)
def _(left: LowRank, right: LowRank) -> LowRank:
    """Ranks multiply: the products of all pairs of columns."""
    pairs = ((left.left, right.left), (left.right, right.right))
    return LowRank(*((one.unsqueeze(-1) * other.unsqueeze(-2)).flatten(-2) for one, other in pairs))


def _add(left: StructuredMatrix, right: StructuredMatrix) -> SemiseparableMatrix:
    """Two recurrences side by side: orders add."""
    one, other = _same_batch(as_semiseparable(left), as_semiseparable(right))
    B, C = torch.cat([one.B, other.B], dim=-1), torch.cat([one.C, other.C], dim=-1)
    if modes.is_dense(one.A, one.B) or modes.is_dense(other.A, other.B):
        return SemiseparableMatrix(_block_triangular(one.dense_A(), None, other.dense_A()), B, C)
    diagonals = [part.A.expand(*part.A.shape[:-1], part.order) for part in (one, other)]
    return SemiseparableMatrix(torch.cat(diagonals, dim=-1), B, C)


def _multiply(left: StructuredMatrix, right: StructuredMatrix) -> SemiseparableMatrix:
    """The left recurrence reads the output of the right one: orders add."""
    outer, inner = _same_batch(as_semiseparable(left), as_semiseparable(right))
    match left, right:
        case Diagonal(), _:  # scales the rows, and adds no state
            return SemiseparableMatrix(inner.A, inner.B, outer.C * inner.C)
        case _, Diagonal():
            return SemiseparableMatrix(outer.A, outer.B * inner.C, outer.C)
    A_inner = inner.dense_A()
    passed = outer.B.unsqueeze(-1) * (inner.C.unsqueeze(-2) @ A_inner)
    through = outer.B * (inner.C * inner.B).sum(-1, keepdim=True)
    return SemiseparableMatrix(
        _block_triangular(outer.dense_A(), passed, A_inner),
        torch.cat([through, inner.B], dim=-1),
        torch.cat([outer.C, torch.zeros_like(inner.C)], dim=-1),
    )


def _multiply_elementwise(left: StructuredMatrix, right: StructuredMatrix) -> SemiseparableMatrix:
    """States are the products of all pairs of states: orders multiply, and scalars stay scalars.

    With a 1-semiseparable matrix and one of low rank, C Bᵀ, this is the duality of SSD: (L ∘ C Bᵀ) is the recurrence
    with the scalar A of L, and B and C (section 5). Above the diagonal, where one is zero, the other is not read.
    """
    one, other = _same_batch(*(_causal_part(m) for m in (left, right)))
    B, C = (_pairs(getattr(one, name), getattr(other, name)) for name in ("B", "C"))
    if modes.is_dense(one.A, one.B) or modes.is_dense(other.A, other.B):
        A, A_other = one.dense_A(), other.dense_A()
        pairs = A[..., :, None, :, None] * A_other[..., None, :, None, :]
        return SemiseparableMatrix(pairs.flatten(-2).flatten(-3, -2), B, C)
    if one.A.shape[-1] == other.A.shape[-1] == 1:
        return SemiseparableMatrix(one.A * other.A, B, C)
    diagonals = (part.A.expand(*part.A.shape[:-1], part.order) for part in (one, other))
    return SemiseparableMatrix(_pairs(*diagonals), B, C)


_RECURRENCES = (SemiseparableMatrix, OneSemiseparable, Diagonal)
for _left, _right in itertools.product(_RECURRENCES, repeat=2):
    if (_left, _right) != (Diagonal, Diagonal):
        closed(operator.add, _left, _right)(_add)
        closed(operator.matmul, _left, _right)(_multiply)
        closed(operator.mul, _left, _right)(_multiply_elementwise)
for _kind in (SemiseparableMatrix, OneSemiseparable):
    closed(operator.mul, _kind, LowRank)(_multiply_elementwise)
    closed(operator.mul, LowRank, _kind)(_multiply_elementwise)


@closed(operator.mul, OneSemiseparable, OneSemiseparable)
def _(left: OneSemiseparable, right: OneSemiseparable) -> OneSemiseparable:
    return OneSemiseparable(left.a * right.a)


def _causal_part(matrix: StructuredMatrix) -> SemiseparableMatrix:
    """The lower triangle of a low-rank matrix is a recurrence that never forgets."""
    if not isinstance(matrix, LowRank):
        return as_semiseparable(matrix)
    B, C = (part.expand(*matrix.shape[:-2], *part.shape[-2:]) for part in (matrix.right, matrix.left))
    return SemiseparableMatrix(torch.ones_like(B[..., :1]), B, C)


def _same_batch(*parts: SemiseparableMatrix) -> list[SemiseparableMatrix]:
    batch = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))

    def expand(tensor: Tensor, trailing: int) -> Tensor:
        return tensor.expand(*batch, *tensor.shape[-trailing:])

    return [
        SemiseparableMatrix(
            expand(part.A, 3 if modes.is_dense(part.A, part.B) else 2), expand(part.B, 2), expand(part.C, 2)
        )
        for part in parts
    ]


def _pairs(one: Tensor, other: Tensor) -> Tensor:
    return (one.unsqueeze(-1) * other.unsqueeze(-2)).flatten(-2)


def _block_triangular(first: Tensor, above: Tensor | None, second: Tensor) -> Tensor:
    """[[first, above], [0, second]]."""
    top = torch.nn.functional.pad(first, (0, second.shape[-1])) if above is None else torch.cat([first, above], dim=-1)
    return torch.cat([top, torch.nn.functional.pad(second, (first.shape[-1], 0))], dim=-2)
