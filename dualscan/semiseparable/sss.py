"""Semiseparable matrices in the form of a state space model (section 3 of arXiv 2405.21060).

A lower triangular matrix is N-semiseparable when no block on or below its diagonal has a rank over N (definition 3.1).
Those are the matrices of linear recurrences with N states, M_ji = C_jᵀ A_j ... A_{i+1} B_i (theorem 3.5): of O(NT)
numbers, multiplied in O(NT) a column, closed under sums, products and inverses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dualscan.semiseparable import modes, scans
from dualscan.semiseparable.matrix import Diagonal, StructuredMatrix, check_dimensions
from dualscan.semiseparable.ranks import hankel_factors
from dualscan.semiseparable.structured import LowRank


@dataclass(frozen=True, eq=False, repr=False)
class SemiseparableMatrix(StructuredMatrix):
    """The matrix of a recurrence: h_t = A_t h_{t-1} + B_t x_t, y_t = C_tᵀ h_t (the SSS form, definition 3.2).

    Attributes:
        A: `(..., T)` or `(..., T, 1)` for multiples of the identity, `(..., T, N)` for diagonal, `(..., T, N, N)` for
            dense matrices; any sign, zeros, complex. Decays given as logarithms: `from_log_decay`.
        B: `(..., T, N)`; batch dimensions as many as A's, broadcast.
        C: `(..., T, N)`.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> ones = torch.ones(3, 1)
        >>> SemiseparableMatrix(torch.tensor([1.0, 0.5, 0.5]), ones, ones).to_dense().tolist()
        [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]
    """

    A: Tensor
    B: Tensor
    C: Tensor

    def __post_init__(self) -> None:
        check_dimensions("B", self.B, "(..., T, N)")
        if self.A.ndim == self.B.ndim - 1:
            object.__setattr__(self, "A", self.A.unsqueeze(-1))
        length, order = self.B.shape[-2:]
        kinds = {self.B.ndim: [(length, 1), (length, order)], self.B.ndim + 1: [(length, order, order)]}
        fits = any(tuple(self.A.shape[-len(kind) :]) == kind for kind in kinds.get(self.A.ndim, []))
        if not fits or self.C.ndim != self.B.ndim or self.C.shape[-2:] != self.B.shape[-2:]:
            raise ValueError(
                f"A {tuple(self.A.shape)}, B {tuple(self.B.shape)} and C {tuple(self.C.shape)} do not fit; B and C are "
                "(..., T, N), A is (..., T), (..., T, 1), (..., T, N) or (..., T, N, N), of as many batch dimensions"
            )

    @classmethod
    def from_log_decay(cls, log_decay: Tensor, B: Tensor, C: Tensor) -> "SemiseparableMatrix":
        """The matrix of A = exp(log_decay), in the shapes of A; -inf forgets everything before."""
        return cls(log_decay.exp(), B, C)

    @classmethod
    def random(
        cls,
        length: int,
        order: int,
        *,
        batch: tuple[int, ...] = (),
        kind: str = "scalar",
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> "SemiseparableMatrix":
        """A random matrix with decays of 1/2 to 1, of exactly the given order where `length` allows it.

        Args:
            length: T.
            order: N.
            batch: leading dimensions.
            kind: "scalar", "diagonal" or "dense": what A_t is. A dense one is a rotation with a decay.
            dtype: of the parameters; None: PyTorch's default.
            device: of the parameters; None: PyTorch's default.
            generator: of the random numbers; None: PyTorch's default.

        Returns:
            The matrix.

        Raises:
            ValueError: for another kind.
        """
        real = torch.zeros((), dtype=dtype).real.dtype

        def normal(*shape: int) -> Tensor:
            return torch.randn(*batch, length, *shape, dtype=dtype, device=device, generator=generator)

        def decay(*shape: int) -> Tensor:
            uniform = torch.rand(*batch, length, *shape, dtype=real, device=device, generator=generator)
            return (0.5 + 0.5 * uniform).to(dtype or real)

        match kind:
            case "scalar":
                A = decay(1)
            case "diagonal":
                A = decay(order)
            case "dense":
                A = torch.linalg.qr(normal(order, order)).Q * decay(1, 1)
            case _:
                raise ValueError(f"kind={kind!r} is none of scalar, diagonal, dense")
        return cls(A, normal(order), normal(order))

    @classmethod
    def from_dense(
        cls, matrix: Tensor, *, order: int | None = None, tol: float | None = None, truncate: bool = False
    ) -> "SemiseparableMatrix":
        """The recurrence of a matrix that is given by its entries (proposition 3.4), without gradients.

        Args:
            matrix: `(..., T, T)`, lower triangular.
            order: the largest state size allowed; None: whatever the rank asks for.
            tol: singular values of a block below `tol` times the matrix's Frobenius norm count as zero; None: T times
                the dtype's resolution. Each token leaves out its own, so that the error of the whole grows to about
                sqrt(T) times as much.
            truncate: keep the `order` largest singular values instead of refusing a larger rank. The squared error is
                at most the sum of the squares of those left out.

        Returns:
            A matrix with dense A_t and the smallest state that holds every block; smaller states are filled with zeros.

        Raises:
            ValueError: when `matrix` is not square, not lower triangular, or of a rank over `order` and not truncated.

        Example:
            >>> dense = SemiseparableMatrix.random(20, 3, dtype=torch.float64).to_dense()
            >>> SemiseparableMatrix.from_dense(dense).order
            3

        Note:
            A singular value decomposition of at most T x (N + 1) numbers a token.
        """
        return cls(*hankel_factors(matrix, order=order, tol=tol, truncate=truncate))

    @property
    def order(self) -> int:
        """N, the state size: no block on or below the diagonal has a larger rank (lemma 3.3)."""
        return self.B.shape[-1]

    @property
    def shape(self) -> torch.Size:
        A_batch = self.A.shape[:-3] if modes.is_dense(self.A, self.B) else self.A.shape[:-2]
        batch = torch.broadcast_shapes(A_batch, self.B.shape[:-2], self.C.shape[:-2])
        return torch.Size((*batch, self.B.shape[-2], self.B.shape[-2]))

    @property
    def is_causal(self) -> bool:
        return True

    def matmul(self, x: Tensor, *, mode: str = "chunked", chunk_size: int | None = None) -> Tensor:
        """M x in one of three modes, described in `modes.py`.

        Args:
            x: `(..., T, P)`.
            mode: "linear", "quadratic" or "chunked".
            chunk_size: tokens of a chunk in the mode "chunked"; None: 64 for a scalar A, else 16.

        Returns:
            y `(..., T, P)`.

        Raises:
            ValueError: for another mode or a chunk size that is not positive or not used.
        """
        if mode not in ("linear", "quadratic", "chunked"):
            raise ValueError(f"mode={mode!r} is none of linear, quadratic, chunked")
        if mode != "chunked":
            if chunk_size is not None:
                raise ValueError(f"mode={mode!r} has no chunks; leave chunk_size={chunk_size} out")
            compute = modes.linear if mode == "linear" else modes.quadratic
            return compute(self.A, self.B, self.C, x)
        if chunk_size is None:
            chunk_size = 64 if self.A.shape[-1] == 1 else 16
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1")
        return modes.chunked(self.A, self.B, self.C, x, min(chunk_size, x.shape[-2]))

    def to_dense(self) -> Tensor:
        return modes.materialize(self.A, self.B, self.C).expand(self.shape)

    def block(self, rows: slice, columns: slice) -> StructuredMatrix:
        """A block: semiseparable on the diagonal, of rank N below it (lemma 3.3), of rank 0 above.

        C_jᵀ A_j ... A_{i+1} B_i splits, at any token between the columns and the rows, into a factor of j and one of i.
        """
        length = self.shape[-1]
        top, bottom, stride = rows.indices(length)
        left, right, other_stride = columns.indices(length)
        if (stride, other_stride) != (1, 1) or top >= bottom or left >= right:
            return super().block(rows, columns)
        if (top, bottom) == (left, right):
            return SemiseparableMatrix(self._A(top, bottom), self.B[..., top:bottom, :], self.C[..., top:bottom, :])
        if left >= bottom:
            return LowRank(self.C[..., rows, :0], self.B[..., columns, :0])
        if right > top:
            return super().block(rows, columns)
        from_cut = modes.left_factors(self._A(right, bottom), self.C[..., right:bottom, :])
        to_cut, _ = modes.right_factors(self._A(left, right), self.B[..., left:right, :])
        return LowRank(from_cut[..., top - right :, :], to_cut)

    def inverse(self) -> "SemiseparableMatrix":
        """The inverse, of order N + 1 (proposition C.1).

        The recurrence solved for its input: x_t = (y_t - C_tᵀ A_t h_{t-1}) / C_tᵀ B_t, and x_t joins the state.

        Raises:
            ValueError: where the diagonal C_tᵀ B_t has a zero, and the matrix no inverse.
        """
        diagonal = (self.C * self.B).sum(-1, keepdim=True)
        if (zero := (diagonal == 0).squeeze(-1)).any():
            row = int(zero.nonzero()[0, -1])
            raise ValueError(f"row {row} has a zero on the diagonal, so {self!r} has no inverse; add a Diagonal first")
        A, B = self.dense_A(), self.B / diagonal
        read = (self.C.unsqueeze(-2) @ A).squeeze(-2) / diagonal
        kept = A - self.B.unsqueeze(-1) * read.unsqueeze(-2)
        rows = torch.cat([kept, -read.unsqueeze(-2).expand(*kept.shape[:-2], 1, -1)], dim=-2)
        write = torch.cat([B, 1 / diagonal], dim=-1)
        last = torch.zeros_like(write)
        last[..., -1] = 1
        return SemiseparableMatrix(torch.nn.functional.pad(rows, (0, 1)), write, last)

    def dense_A(self) -> Tensor:
        """A as matrices, `(..., T, N, N)`."""
        if modes.is_dense(self.A, self.B):
            return self.A
        return torch.diag_embed(self.A.expand(*self.A.shape[:-1], self.order))

    def _A(self, start: int, stop: int) -> Tensor:
        return self.A[..., start:stop, :, :] if modes.is_dense(self.A, self.B) else self.A[..., start:stop, :]


@dataclass(frozen=True, eq=False, repr=False)
class OneSemiseparable(StructuredMatrix):
    """L_ji = a_j ... a_{i+1}: the mask of SSD, the matrix of the scalar scan (section 3 of arXiv 2405.21060).

    Attributes:
        a: `(..., T)`; the first entry is not read.

    Example:
        >>> OneSemiseparable(torch.tensor([1.0, 2.0, 3.0])).to_dense().tolist()
        [[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [6.0, 3.0, 1.0]]
    """

    a: Tensor

    def __post_init__(self) -> None:
        check_dimensions("a", self.a, "(..., T)")

    @classmethod
    def from_log_decay(cls, log_decay: Tensor) -> "OneSemiseparable":
        """The matrix of a = exp(log_decay); -inf forgets everything before."""
        return cls(log_decay.exp())

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.a.shape, self.a.shape[-1]))

    @property
    def is_causal(self) -> bool:
        return True

    def matmul(self, x: Tensor, *, algorithm: str = "associative", chunk_size: int | None = None) -> Tensor:
        """L x by one of the algorithms of `scans.py`."""
        return scans.scan(self.a, x, algorithm=algorithm, chunk_size=chunk_size)

    def to_dense(self) -> Tensor:
        return modes.segment_products(self.a)

    def inverse(self) -> SemiseparableMatrix:
        """The inverse, which is bidiagonal: 1 on the diagonal and -a_t below it."""
        return as_semiseparable(self).inverse()


def as_semiseparable(matrix: StructuredMatrix) -> SemiseparableMatrix:
    """A semiseparable, 1-semiseparable or diagonal matrix as a recurrence; a diagonal one forgets every token at once.

    Raises:
        ValueError: for other structures; `SemiseparableMatrix.from_dense` finds a recurrence where there is one.
    """
    match matrix:
        case SemiseparableMatrix():
            return matrix
        case OneSemiseparable(a=a):
            ones = torch.ones_like(a).unsqueeze(-1)
            return SemiseparableMatrix(a, ones, ones)
        case Diagonal(values=values):
            values = values.unsqueeze(-1)
            return SemiseparableMatrix(torch.zeros_like(values), torch.ones_like(values), values)
    raise ValueError(f"{matrix!r} is no recurrence by its structure; SemiseparableMatrix.from_dense looks at its ranks")
