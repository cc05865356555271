"""Structured matrices that are not recurrences: Toeplitz, Fourier and their like, each with its multiplication.

Section 2.2 of arXiv 2405.21060 lists them as the other sequence mixers with a subquadratic multiplication; as masks of
structured masked attention (section 4.2) they are interchangeable with the semiseparable ones of `sss.py`.
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from dualscan.semiseparable.matrix import StructuredMatrix, closed


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
        O(T log T) by the fast Fourier transform of a circulant matrix in which this one is a block. Rounding errors
        are relative to the largest entry of the product, not to each.
    """

    column: Tensor
    row: Tensor | None = None

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
