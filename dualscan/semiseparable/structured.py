"""Structured matrices that are not recurrences: Toeplitz, Fourier and their like, each with its multiplication.

Section 2 of arXiv 2405.21060 lists them as the other sequence mixers with a subquadratic multiplication; as masks of
structured masked attention (section 4) they are interchangeable with the semiseparable ones of `sss.py`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dualscan.semiseparable.matrix import StructuredMatrix, check_dimensions


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(StructuredMatrix):
    """left rightᵀ: attention without a mask, left the queries and right the keys.

    Attributes:
        left: `(..., rows, rank)`.
        right: `(..., columns, rank)`; complex entries are not conjugated.

    Example:
        >>> LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])).to_dense().tolist()
        [[3.0, 4.0], [6.0, 8.0]]

    Note:
        O(T rank) a column.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        check_dimensions("left", self.left, "(..., rows, rank)")
        check_dimensions("right", self.right, "(..., columns, rank)")
        if self.left.shape[-1] != self.right.shape[-1]:
            given = f"{tuple(self.left.shape)} and {tuple(self.right.shape)}"
            raise ValueError(f"left and right have the shapes {given}; their last dimension, the rank, must be equal")

    @property
    def shape(self) -> torch.Size:
        batch = torch.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return torch.Size((*batch, self.left.shape[-2], self.right.shape[-2]))

    def matmul(self, x: Tensor) -> Tensor:
        return self.left @ (self.right.mT @ x)

    def to_dense(self) -> Tensor:
        return self.left @ self.right.mT

    def transpose(self) -> "LowRank":
        return LowRank(self.right, self.left)


@dataclass(frozen=True, eq=False, repr=False)
class Toeplitz(StructuredMatrix):
    """Entries that depend on the distance alone, M_ij = t_{i-j}: a convolution along time.

    Attributes:
        column: the first column `(..., rows)`: t_0, t_1, ...
        row: the first row `(..., columns)`: t_0, t_{-1}, ...; its first entry is not read. None: square and causal,
            with zeros above the diagonal.

    Example:
        >>> Toeplitz(torch.tensor([1.0, 0.5, 0.25])).to_dense().tolist()
        [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]

    Note:
        O(T log T) a column, by the fast Fourier transform of a circulant matrix in which this one is a block. Rounding
        errors are relative to the largest entry of the product, not to each.
    """

    column: Tensor
    row: Tensor | None = None

    def __post_init__(self) -> None:
        check_dimensions("column", self.column, "(..., rows)")
        if self.row is not None:
            check_dimensions("row", self.row, "(..., columns)")

    @property
    def shape(self) -> torch.Size:
        row = self.column if self.row is None else self.row
        batch = torch.broadcast_shapes(self.column.shape[:-1], row.shape[:-1])
        return torch.Size((*batch, self.column.shape[-1], row.shape[-1]))

    @property
    def is_causal(self) -> bool:
        return self.row is None

    def matmul(self, x: Tensor) -> Tensor:
        rows, columns = self.shape[-2:]
        dtype = torch.promote_types(self.dtype, x.dtype)
        length = fast_length(rows + columns - 1)
        # (..., length, 1): t_0 ... t_{rows-1}, zeros, t_{-(columns-1)} ... t_{-1}, the first column of the circulant.
        circulant = _pad(self.column, length)
        if self.row is not None:
            circulant = circulant + _pad(self.row[..., 1:].flip(-1), length, at_end=True)
        return convolve(circulant.unsqueeze(-1), x, length)[..., :rows, :].to(dtype)

    def to_dense(self) -> Tensor:
        rows, columns = self.shape[-2:]
        row = torch.zeros_like(self.column) if self.row is None else self.row
        batch = self.shape[:-2]
        before = row[..., 1:].flip(-1).expand(*batch, columns - 1)
        diagonals = torch.cat([before, self.column.expand(*batch, rows)], dim=-1)
        distance = torch.arange(rows, device=self.device)[:, None] - torch.arange(columns, device=self.device)
        return diagonals[..., distance + columns - 1]

    def transpose(self) -> StructuredMatrix:
        row = torch.zeros_like(self.column) if self.row is None else self.row
        batch = self.shape[:-2]
        diagonal, above = self.column[..., :1].expand(*batch, 1), row[..., 1:].expand(*batch, row.shape[-1] - 1)
        return Toeplitz(torch.cat([diagonal, above], dim=-1), self.column)


@dataclass(frozen=True, eq=False, repr=False)
class Vandermonde(StructuredMatrix):
    """Powers, M_ij = u_i^j: polynomials at the points u, or the impulse responses of scalar recurrences.

    Attributes:
        nodes: u, `(..., rows)`, real or complex.
        columns: how many powers, from the 0th.

    Example:
        >>> Vandermonde(torch.tensor([0.5, 2.0]), 3).to_dense().tolist()
        [[1.0, 0.5, 0.25], [1.0, 2.0, 4.0]]

    Note:
        Horner's rule over pieces of sqrt(columns) powers: as many products as the dense matrix has entries, memory for
        rows x sqrt(columns) of them. What is faster in theory divides polynomials and is unstable.
    """

    nodes: Tensor
    columns: int

    def __post_init__(self) -> None:
        check_dimensions("nodes", self.nodes, "(..., rows)")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.nodes.shape, self.columns))

    def matmul(self, x: Tensor) -> Tensor:
        width = math.isqrt(max(0, self.columns - 1)) + 1
        powers = self._powers(width)
        stride = powers[..., -1:] * self.nodes.unsqueeze(-1)
        y = powers[..., :0] @ x[..., :0, :]
        for piece in reversed(x.split(width, dim=-2)):
            y = stride * y + powers[..., : piece.shape[-2]] @ piece
        return y

    def to_dense(self) -> Tensor:
        return self._powers(self.columns)

    def _powers(self, count: int) -> Tensor:
        nodes = self.nodes.unsqueeze(-1)
        return torch.cat([torch.ones_like(nodes), nodes.expand(*nodes.shape[:-1], count)], -1).cumprod(-1)[..., :count]


@dataclass(frozen=True, eq=False, repr=False)
class Cauchy(StructuredMatrix):
    """Reciprocal differences, M_ij = 1 / (u_i - v_j).

    Attributes:
        nodes: u, `(..., rows)`, real or complex.
        poles: v, `(..., columns)`; none of them may equal a node.

    Raises:
        ValueError: when one of them does.

    Example:
        >>> Cauchy(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 2.0])).to_dense().tolist()
        [[0.5, -1.0], [0.25, 1.0]]

    Note:
        As many products as the dense matrix has entries, in pieces of sqrt(rows) rows.
    """

    nodes: Tensor
    poles: Tensor

    def __post_init__(self) -> None:
        check_dimensions("nodes", self.nodes, "(..., rows)")
        check_dimensions("poles", self.poles, "(..., columns)")
        for part in self._pieces(self.nodes):
            if (equal := part.unsqueeze(-1) == self.poles.unsqueeze(-2)).any():
                pole = self.poles.unsqueeze(-2).expand_as(equal)[equal][0].item()
                raise ValueError(
                    f"nodes and poles share {pole:g}, where 1 / (node - pole) is infinite; move one of them"
                )

    @property
    def shape(self) -> torch.Size:
        batch = torch.broadcast_shapes(self.nodes.shape[:-1], self.poles.shape[:-1])
        return torch.Size((*batch, self.nodes.shape[-1], self.poles.shape[-1]))

    def matmul(self, x: Tensor) -> Tensor:
        return torch.cat([Cauchy._dense(part, self.poles) @ x for part in self._pieces(self.nodes)], dim=-2)

    def to_dense(self) -> Tensor:
        return Cauchy._dense(self.nodes, self.poles)

    def transpose(self) -> "Cauchy":
        return Cauchy(-self.poles, -self.nodes)

    @staticmethod
    def _dense(nodes: Tensor, poles: Tensor) -> Tensor:
        return 1 / (nodes.unsqueeze(-1) - poles.unsqueeze(-2))

    @staticmethod
    def _pieces(nodes: Tensor) -> tuple[Tensor, ...]:
        return nodes.split(math.isqrt(max(0, nodes.shape[-1] - 1)) + 1, dim=-1)


@dataclass(frozen=True, eq=False, repr=False)
class Fourier(StructuredMatrix):
    """The discrete Fourier transform along time, M_kt = exp(-2πi k t / T) / sqrt(T), unitary: the mixer of FNet.

    Attributes:
        length: T.
        dtype: a complex dtype; a product takes the wider one of it and x.

    Example:
        >>> (Fourier(4) @ torch.ones(4, 1)).real.flatten().tolist()
        [2.0, 0.0, 0.0, 0.0]

    Note:
        O(T log T) a column.
    """

    length: int
    dtype: torch.dtype = torch.complex64

    def __post_init__(self) -> None:
        if not self.dtype.is_complex:
            raise ValueError(f"dtype={self.dtype} has no imaginary part; use torch.complex64 or torch.complex128")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.length, self.length))

    def matmul(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x.to(torch.promote_types(self.dtype, x.dtype)), dim=-2, norm="ortho")

    def transpose(self) -> "Fourier":
        return self


@dataclass(frozen=True, eq=False, repr=False)
class Cosine(StructuredMatrix):
    """The discrete cosine transform along time (type II, orthogonal): M_kt = w_k cos(π k (2t + 1) / 2T).

    w_0 = sqrt(1 / T) and w_k = sqrt(2 / T) otherwise: a Fourier mask that is real.

    Attributes:
        length: T.
        dtype: of the dense matrix; a product takes the wider one of it and x.

    Example:
        >>> (Cosine(4) @ torch.ones(4, 1)).round(decimals=4).abs().flatten().tolist()
        [2.0, 0.0, 0.0, 0.0]

    Note:
        O(T log T) a column: a Fourier transform of the even tokens followed by the odd ones in reverse (Makhoul 1980).
    """

    length: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype={self.dtype} holds no real numbers; use torch.float32 or torch.float64")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.length, self.length))

    def matmul(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.dtype, x.dtype)
        if dtype.is_complex:
            return self @ x  # the real and the imaginary part, one after the other
        x = x.to(torch.promote_types(dtype, torch.float32))
        folded = torch.cat([x[..., ::2, :], x[..., 1::2, :].flip(-2)], dim=-2)
        angles = torch.arange(self.length, dtype=x.dtype, device=x.device) * (math.pi / (2 * self.length))
        weights = torch.full_like(angles, math.sqrt(2 / self.length))
        weights[:1] = math.sqrt(1 / self.length)
        return (torch.polar(weights, -angles).unsqueeze(-1) * torch.fft.fft(folded, dim=-2)).real.to(dtype)


def fast_length(length: int) -> int:
    """The smallest length from `length` on that is 2, 3 or 5 times a power of two, for a fast Fourier transform."""
    return min(factor << max(0, -(-length // factor) - 1).bit_length() for factor in (2, 3, 5))


def convolve(kernel: Tensor, x: Tensor, length: int) -> Tensor:
    """Circular convolution along dimension -2 in at least float32, both operands padded to `length`."""
    dtype = torch.promote_types(torch.promote_types(kernel.dtype, x.dtype), torch.float32)
    kernel, x = kernel.to(dtype), x.to(dtype)
    if dtype.is_complex:
        return torch.fft.ifft(torch.fft.fft(kernel, length, dim=-2) * torch.fft.fft(x, length, dim=-2), dim=-2)
    return torch.fft.irfft(torch.fft.rfft(kernel, length, dim=-2) * torch.fft.rfft(x, length, dim=-2), length, dim=-2)


def _pad(values: Tensor, length: int, *, at_end: bool = False) -> Tensor:
    missing = length - values.shape[-1]
    return torch.nn.functional.pad(values, (missing, 0) if at_end else (0, missing))
