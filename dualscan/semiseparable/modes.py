"""Multiplication by a semiseparable matrix in three modes: linear, quadratic, chunked (sections 3, 5, 6 of
arXiv 2405.21060).

The matrix of the state space model h_t = A_t h_{t-1} + B_t x_t, y_t = C_tᵀ h_t is M_ji = C_jᵀ A_j ... A_{i+1} B_i for
j >= i. With state size N, width P of x, chunks of Q tokens and a scalar A_t, a sequence of T tokens costs, to leading
order (`costs.count` counts):

| mode | FLOPs | in matrix products | memory | chain |
|---|---|---|---|---|
| `linear` | 5 TNP | 2 TNP | NP | T |
| `quadratic` | 2 T²(N + P) | 2 T²(N + P) | T² | log T |
| `chunked` | 2 TQ(N + P) + 4 TNP | all of it | T(Q + NP/Q) | T/Q |

The matrix is written down nowhere in the first, whole in the second, and by its diagonal blocks in the third.

Shapes: A is `(..., T, 1)` for a multiple of the identity, `(..., T, N)` for a diagonal, `(..., T, N, N)` for a dense
matrix; B and C are `(..., T, N)`; x is `(..., T, P)`.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def is_dense(A: Tensor, B: Tensor) -> bool:
    """Whether A holds matrices rather than their diagonals."""
    return A.ndim > B.ndim


def linear(A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> Tensor:
    """The recurrence, one token after the other (section 2)."""
    state, rows, dense = None, [], is_dense(A, B)
    for A_t, B_t, C_t, x_t in zip(_steps(A, dense), B.unbind(-2), C.unbind(-2), x.unbind(-2), strict=True):
        B_t, x_t = B_t.unsqueeze(-1), x_t.unsqueeze(-2)
        state = B_t * x_t if state is None else torch.addcmul(_advance(A_t, state, dense), B_t, x_t)
        rows.append((C_t.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(rows, dim=-2)


def quadratic(A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> Tensor:
    """The matrix, then the product (equation 16 for a scalar A)."""
    return materialize(A, B, C) @ x


def chunked(A: Tensor, B: Tensor, C: Tensor, x: Tensor, chunk_size: int) -> Tensor:
    """Diagonal blocks by the quadratic mode, the blocks below through the states between chunks (section 6)."""
    length, dense = x.shape[-2], is_dense(A, B)
    missing = -length % chunk_size
    A = pad(A, (0, 0, 0, 0, 0, missing)) if dense else pad(A, (0, 0, 0, missing))
    A = A.unflatten(-3 if dense else -2, (-1, chunk_size))
    B, C, x = (pad(t, (0, 0, 0, missing)).unflatten(-2, (-1, chunk_size)) for t in (B, C, x))
    inside = materialize(A, B, C) @ x
    right, decay = right_factors(A, B)
    added = right.mT @ x
    entering = [torch.zeros_like(added[..., 0, :, :])]
    for decay_c, added_c in zip(_steps(decay, dense), added.unbind(-3), strict=True):
        entering.append(_advance(decay_c, entering[-1], dense) + added_c)
    y = inside + left_factors(A, C) @ torch.stack(entering[:-1], dim=-3)
    return y.flatten(-3, -2)[..., :length, :]


def materialize(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The matrix `(..., T, T)`: scores under one mask where A is scalar, under N masks where it is diagonal."""
    if is_dense(A, B):
        identity = torch.eye(B.shape[-2], dtype=B.dtype, device=B.device)
        return linear(A, B, C, identity)
    if A.shape[-1] == 1:
        return segment_products(A.squeeze(-1)) * (C @ B.mT)
    masks = segment_products(A.mT)
    return (C.mT.unsqueeze(-1) * masks * B.mT.unsqueeze(-2)).sum(-3)


def segment_products(a: Tensor) -> Tensor:
    """(..., T) -> (..., T, T): a_j ... a_{i+1} at (j, i), 1 on the diagonal, 0 above: the 1-semiseparable matrix of a.

    Every column is multiplied up by itself; quotients of prefix products would fail at zeros and underflow.
    """
    length = a.shape[-1]
    below = torch.ones(length, length, dtype=torch.bool, device=a.device).tril(-1)
    factors = torch.where(below, a.unsqueeze(-1), torch.ones((), dtype=a.dtype, device=a.device))
    return factors.cumprod(-2).tril()


def left_factors(A: Tensor, C: Tensor) -> Tensor:
    """C_jᵀ A_j ... A_1 for every j, `(..., T, N)`: what y_j takes from the state before the first token."""
    if not is_dense(A, C):
        return C * A.cumprod(-2)
    product, rows = None, []
    for A_t, C_t in zip(_steps(A, dense=True), C.unbind(-2), strict=True):
        product = A_t if product is None else A_t @ product
        rows.append((C_t.unsqueeze(-2) @ product).squeeze(-2))
    return torch.stack(rows, dim=-2)


def right_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A_T ... A_{i+1} B_i for every i, `(..., T, N)`: what x_i leaves in the state after the last; and A_T ... A_1."""
    if not is_dense(A, B):
        # The factors after i: shifted by one, multiplied up from the end.
        after = torch.cat([A[..., 1:, :], torch.ones_like(A[..., :1, :])], dim=-2).flip(-2).cumprod(-2).flip(-2)
        return B * after, A[..., 0, :] * after[..., 0, :]
    product, rows = None, []
    for A_t, B_t in zip(_steps(A.flip(-3), dense=True), B.flip(-2).unbind(-2), strict=True):
        rows.append(B_t if product is None else (product @ B_t.unsqueeze(-1)).squeeze(-1))
        product = A_t if product is None else product @ A_t
    assert product is not None
    return torch.stack(torch.broadcast_tensors(*rows), dim=-2).flip(-2), product


def _steps(A: Tensor, dense: bool) -> tuple[Tensor, ...]:
    return A.unbind(-3 if dense else -2)


def _advance(A_t: Tensor, state: Tensor, dense: bool) -> Tensor:
    return A_t @ state if dense else A_t.unsqueeze(-1) * state
