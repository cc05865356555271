"""The base of the algebra: a matrix that knows a fast multiplication (sections 2 and 4 of arXiv 2405.21060).

A sequence mixer is a matrix, y = M x along time. `StructuredMatrix` is such a matrix, or a batch of them, held by its
parameters; `M @ x` multiplies without writing M down. What has no formula of its own is composed from two matrices that
have one: sums, products, transposes and blocks multiply as fast as their parts.
"""

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor


class StructuredMatrix(ABC):
    """A batch of matrices `(..., rows, columns)` held by parameters, with a multiplication of its own.

    Write a new one by giving `shape` and one or both of `matmul` (the fast algorithm) and `to_dense` (the definition):
    each is derived from the other where it is not given. Users write `M @ x`, which checks shapes and calls `matmul`;
    sums, products, transposes and blocks come for free, and faster ones are registered with `closed`.
    Tensors held as attributes give `dtype` and `device`, and take part in autograd.

    Example:
        >>> class Shift(StructuredMatrix):
        ...     def __init__(self, length): self.length = length
        ...     shape = property(lambda self: torch.Size((self.length, self.length)))
        ...     is_causal = True
        ...     def matmul(self, x): return torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :]], dim=-2)
        >>> (Shift(3) + Shift(3).mT).to_dense().tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.matmul is StructuredMatrix.matmul and cls.to_dense is StructuredMatrix.to_dense:
            raise TypeError(f"{cls.__name__} defines neither matmul nor to_dense; define at least one of them")

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """`(..., rows, columns)`."""

    @property
    def is_causal(self) -> bool:
        """True where the structure has only zeros above the diagonal: row t of the product sees rows 0 to t of x."""
        return False

    def matmul(self, x: Tensor) -> Tensor:
        """M x for `x` of shape `(..., columns, width)`, batch dimensions broadcast: `(..., rows, width)`.

        `M @ x` has checked the shape, promoted the dtype of x to that of M, and split a complex x where M is real.
        """
        return _promoted_product(self.to_dense(), x)

    def to_dense(self) -> Tensor:
        """The matrix itself, `(..., rows, columns)`."""
        dense = self.matmul(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))
        return dense.expand(self.shape)

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters, those of parts included."""
        found: list[Tensor] = []
        for value in vars(self).values():
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, StructuredMatrix):
                found += value.tensors
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to which the parameters promote one another; PyTorch's default where there are none."""
        dtypes = [value.dtype for value in vars(self).values() if isinstance(value, Tensor | StructuredMatrix)]
        return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Where the parameters are; PyTorch's default where there are none."""
        return self.tensors[0].device if self.tensors else torch.get_default_device()

    def transpose(self) -> "StructuredMatrix":
        """The matrix with rows and columns exchanged."""
        return Transposed(self)

    @property
    def mT(self) -> "StructuredMatrix":
        """Short for `transpose()`, as a tensor has it."""
        return self.transpose()

    def block(self, rows: slice, columns: slice) -> "StructuredMatrix":
        """The rows and columns of two slices of step 1, as a structured matrix."""
        return Block(self, _span(rows, self.shape[-2]), _span(columns, self.shape[-1]))

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: "StructuredMatrix") -> "StructuredMatrix": ...
    def __matmul__(self, other: "Tensor | StructuredMatrix") -> "Tensor | StructuredMatrix":
        if not isinstance(other, Tensor | StructuredMatrix):
            return NotImplemented
        given = tuple(other.shape)
        if len(given) < 2 or given[-2] != self.shape[-1]:
            raise ValueError(
                f"{self!r} multiplies (..., {self.shape[-1]}, width), not {given}; "
                + ("unsqueeze a last dimension" if len(given) == 1 else "its columns are the rows of what follows")
            )
        if isinstance(other, Tensor):
            return self._multiply(other)
        return _closed_form(operator.matmul, self, other) or Product(self, other)

    def _multiply(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.dtype, x.dtype)
        if not x.numel():
            # Not every Fourier transform takes a tensor without elements.
            batch = torch.broadcast_shapes(self.shape[:-2], x.shape[:-2])
            return torch.zeros(*batch, self.shape[-2], x.shape[-1], dtype=dtype, device=x.device)
        if x.is_complex() and not self.dtype.is_complex:
            return torch.complex(self.matmul(x.real), self.matmul(x.imag))
        return self.matmul(x.to(dtype))

    def __add__(self, other: "StructuredMatrix") -> "StructuredMatrix":
        if not isinstance(other, StructuredMatrix):
            return NotImplemented
        self._check_same_size(other, "added to")
        return _closed_form(operator.add, self, other) or Sum(self, other)

    def __mul__(self, other: "complex | StructuredMatrix") -> "StructuredMatrix":
        """A multiple, or the elementwise product, which is dense unless the two structures have a closed form."""
        if isinstance(other, int | float | complex):
            dtype = torch.result_type(torch.zeros(1, dtype=self.dtype), other)
            return Diagonal(torch.full(self.shape[-2:-1], other, dtype=dtype, device=self.device)) @ self
        if not isinstance(other, StructuredMatrix):
            return NotImplemented
        self._check_same_size(other, "multiplied elementwise with")
        return _closed_form(operator.mul, self, other) or Dense(self.to_dense() * other.to_dense())

    __rmul__ = __mul__

    def __neg__(self) -> "StructuredMatrix":
        return self * -1

    def __sub__(self, other: "StructuredMatrix") -> "StructuredMatrix":
        return self + -other

    def _check_same_size(self, other: "StructuredMatrix", what: str) -> None:
        if self.shape[-2:] != other.shape[-2:]:
            raise ValueError(f"{other!r} cannot be {what} {self!r}: rows and columns must be equal")

    def __repr__(self) -> str:
        return f"{type(self).__name__}{tuple(self.shape)}"


Rule = Callable[[Any, Any], StructuredMatrix]
_CLOSED: dict[tuple[Callable[..., Any], type, type], Rule] = {}


def closed(operation: Callable[..., Any], left: type, right: type) -> Callable[[Rule], Rule]:
    """Registers the closed form of `operator.matmul`, `operator.add` or `operator.mul` for two structures.

    Args:
        operation: the function of the module `operator`.
        left: the class of the left operand; its subclasses follow the rule too, unless they have one of their own.
        right: the class of the right operand.

    Returns:
        A decorator for the function of the two matrices.

    Example:
        >>> from dualscan.semiseparable import Toeplitz
        >>> Toeplitz(torch.ones(3)) + Toeplitz(torch.ones(3))  # registered in algebra.py
        Toeplitz(3, 3)
    """

    def register(rule: Rule) -> Rule:
        _CLOSED[operation, left, right] = rule
        return rule

    return register


def _closed_form(
    operation: Callable[..., Any], left: StructuredMatrix, right: StructuredMatrix
) -> StructuredMatrix | None:
    for left_type in type(left).__mro__:
        for right_type in type(right).__mro__:
            if rule := _CLOSED.get((operation, left_type, right_type)):
                return rule(left, right)
    return None


@dataclass(frozen=True, eq=False, repr=False)
class Dense(StructuredMatrix):
    """Any matrix, entry by entry: what has no structure.

    Attributes:
        entries: `(..., rows, columns)`.
    """

    entries: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.entries.shape

    @property
    def is_causal(self) -> bool:
        return not self.entries.triu(1).any()

    def to_dense(self) -> Tensor:
        return self.entries

    def transpose(self) -> "Dense":
        return Dense(self.entries.mT)


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(StructuredMatrix):
    """Each token for itself, M_tt = d_t.

    Attributes:
        values: `(..., T)`.

    Example:
        >>> (Diagonal(torch.tensor([2.0, 3.0])) @ torch.ones(2, 1)).tolist()
        [[2.0], [3.0]]
    """

    values: Tensor

    def __post_init__(self) -> None:
        check_dimensions("values", self.values, "(..., T)")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.values.shape, self.values.shape[-1]))

    @property
    def is_causal(self) -> bool:
        return True

    def matmul(self, x: Tensor) -> Tensor:
        return self.values.unsqueeze(-1) * x

    def to_dense(self) -> Tensor:
        return torch.diag_embed(self.values)

    def transpose(self) -> "Diagonal":
        return self


@dataclass(frozen=True, eq=False, repr=False)
class Sum(StructuredMatrix):
    """left + right, multiplied one after the other."""

    left: StructuredMatrix
    right: StructuredMatrix

    @property
    def is_causal(self) -> bool:
        return self.left.is_causal and self.right.is_causal

    @property
    def shape(self) -> torch.Size:
        return torch.broadcast_shapes(self.left.shape, self.right.shape)

    def matmul(self, x: Tensor) -> Tensor:
        return self.left @ x + self.right @ x

    def to_dense(self) -> Tensor:
        return self.left.to_dense() + self.right.to_dense()

    def transpose(self) -> StructuredMatrix:
        return self.left.mT + self.right.mT


@dataclass(frozen=True, eq=False, repr=False)
class Product(StructuredMatrix):
    """left @ right, multiplied from the right."""

    left: StructuredMatrix
    right: StructuredMatrix

    @property
    def is_causal(self) -> bool:
        return self.left.is_causal and self.right.is_causal

    @property
    def shape(self) -> torch.Size:
        batch = torch.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return torch.Size((*batch, self.left.shape[-2], self.right.shape[-1]))

    def matmul(self, x: Tensor) -> Tensor:
        return self.left @ (self.right @ x)

    def to_dense(self) -> Tensor:
        return _promoted_product(self.left.to_dense(), self.right.to_dense())

    def transpose(self) -> StructuredMatrix:
        return self.right.mT @ self.left.mT


@dataclass(frozen=True, eq=False, repr=False)
class Transposed(StructuredMatrix):
    """The transpose of a matrix that gives no formula for it.

    The backward pass of a linear algorithm multiplies by the transpose, at the same cost.
    """

    matrix: StructuredMatrix

    @property
    def shape(self) -> torch.Size:
        *batch, rows, columns = self.matrix.shape
        return torch.Size((*batch, columns, rows))

    def matmul(self, x: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(self.shape[:-2], x.shape[:-2])
        dtype = torch.promote_types(self.dtype, x.dtype)
        origin = torch.zeros(*batch, self.shape[-2], x.shape[-1], dtype=dtype, device=x.device)
        image, pull_back, *_ = torch.func.vjp(self.matrix.matmul, origin)
        # For complex entries the pull-back multiplies by the conjugate transpose.
        return pull_back(x.to(image.dtype).expand_as(image).conj())[0].conj()

    def to_dense(self) -> Tensor:
        return self.matrix.to_dense().mT

    def transpose(self) -> StructuredMatrix:
        return self.matrix


@dataclass(frozen=True, eq=False, repr=False)
class Block(StructuredMatrix):
    """Some rows and columns of a matrix: x is padded with zeros, the rows of the product are cut out.

    Attributes:
        matrix: the whole matrix.
        rows: first row, and the row after the last.
        columns: the same for the columns.
    """

    matrix: StructuredMatrix
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def is_causal(self) -> bool:
        # Above the block's diagonal, j > i, is then above the matrix's: columns[0] + j > rows[0] + i.
        return self.matrix.is_causal and self.columns[0] >= self.rows[0]

    @property
    def shape(self) -> torch.Size:
        (top, bottom), (left, right) = self.rows, self.columns
        return torch.Size((*self.matrix.shape[:-2], bottom - top, right - left))

    def matmul(self, x: Tensor) -> Tensor:
        left, right = self.columns
        padded = torch.nn.functional.pad(x, (0, 0, left, self.matrix.shape[-1] - right))
        return (self.matrix @ padded)[..., slice(*self.rows), :]

    def to_dense(self) -> Tensor:
        return self.matrix.to_dense()[..., slice(*self.rows), slice(*self.columns)]

    def transpose(self) -> StructuredMatrix:
        return self.matrix.mT.block(slice(*self.columns), slice(*self.rows))


def _promoted_product(left: Tensor, right: Tensor) -> Tensor:
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype) @ right.to(dtype)


def _span(piece: slice, length: int) -> tuple[int, int]:
    start, stop, step = piece.indices(length)
    if step != 1:
        raise ValueError(f"a block has adjacent rows and columns, step 1, not step {step}; use to_dense()[...] instead")
    return start, max(start, stop)


def check_dimensions(name: str, tensor: Tensor, layout: str) -> None:
    """ValueError when `tensor` has fewer dimensions than its layout `(..., a, b)` names."""
    needed = layout.count(",")
    if tensor.ndim < needed:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; it must be {layout}")
