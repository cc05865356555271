"""Toeplitz, Vandermonde, Cauchy, Fourier, cosine, diagonal and low rank: entry by entry, products, gradients."""

import cmath
import math
import operator
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualscan.semiseparable import (
    Cauchy,
    Cosine,
    Dense,
    Diagonal,
    Fourier,
    LowRank,
    StructuredMatrix,
    Toeplitz,
    Vandermonde,
)
from tests.oracle import assert_close

Entry = Callable[[int, int], complex | Tensor]
DOUBLE, COMPLEX = torch.float64, torch.complex128
quick = settings(max_examples=25, deadline=None, derandomize=True)
small = st.integers(1, 12)
dtypes = st.sampled_from([DOUBLE, COMPLEX])


def randn(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def build(name: str, rows: int, columns: int, dtype: torch.dtype = DOUBLE) -> tuple[StructuredMatrix, Entry]:
    """A matrix by name (square ones have `rows` rows), and the definition of its entries."""
    column, row = randn(rows, dtype=dtype), randn(columns, dtype=dtype)
    left, right = randn(rows, 2, dtype=dtype), randn(columns, 2, dtype=dtype)
    inside = column / (1 + column.abs())
    match name:
        case "Diagonal":
            return Diagonal(column), lambda i, j: column[i] if i == j else 0
        case "LowRank":
            return LowRank(left, right), lambda i, j: left[i, 0] * right[j, 0] + left[i, 1] * right[j, 1]
        case "Toeplitz":
            return Toeplitz(column, row), lambda i, j: column[i - j] if i >= j else row[j - i]
        case "causal Toeplitz":
            return Toeplitz(column), lambda i, j: column[i - j] if i >= j else 0
        case "Vandermonde":
            return Vandermonde(inside, columns), lambda i, j: complex(inside[i]) ** j
        case "Cauchy":
            return Cauchy(inside, right[:, 0] + 5), lambda i, j: 1 / (inside[i] - right[j, 0] - 5)
        case "Fourier":
            return Fourier(rows, COMPLEX), lambda i, j: cmath.exp(-2j * math.pi * i * j / rows) / math.sqrt(rows)
        case "Cosine":
            weights = [math.sqrt(1 / rows), *[math.sqrt(2 / rows)] * rows]
            return Cosine(rows, DOUBLE), lambda i, j: weights[i] * math.cos(math.pi * i * (2 * j + 1) / (2 * rows))
    raise AssertionError(name)


def filled(matrix: StructuredMatrix, entry: Entry) -> Tensor:
    """The matrix with these entries, computed one by one."""
    rows, columns = matrix.shape
    dense = torch.tensor([[complex(entry(i, j)) for j in range(columns)] for i in range(rows)], dtype=COMPLEX)
    return dense if matrix.dtype.is_complex else dense.real


NAMES = ("Diagonal", "LowRank", "Toeplitz", "causal Toeplitz", "Vandermonde", "Cauchy", "Fourier", "Cosine")


def assert_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype, name
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in (actual.resolve_conj(), expected.resolve_conj())]
    assert_close(name, *parts, dtype=DOUBLE)


@pytest.mark.parametrize("name", NAMES)
@quick
@given(rows=small, columns=small, width=st.integers(0, 3), dtype=dtypes)
def test_entries_products_and_transposes(name, rows, columns, width, dtype):
    matrix, entry = build(name, rows, columns, dtype)
    dense = filled(matrix, entry)
    assert matrix.shape == dense.shape
    assert_equal("to_dense", matrix.to_dense(), dense)
    assert_equal("mT.to_dense", matrix.mT.to_dense(), dense.mT)
    x, z = randn(2, dense.shape[1], width, dtype=dtype), randn(dense.shape[0], width, dtype=dtype)
    wide = torch.promote_types(dense.dtype, dtype)
    assert_equal("matmul", matrix @ x, dense.to(wide) @ x.to(wide))
    assert_equal("mT matmul", matrix.mT @ z, dense.mT.to(wide) @ z.to(wide))


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_close_to_float64(name):
    matrix, _ = build(name, 300, 300)
    parts = {key: value.float() if isinstance(value, Tensor) else value for key, value in vars(matrix).items()}
    if "dtype" in parts:
        parts["dtype"] = torch.complex64 if name == "Fourier" else torch.float32
    x = randn(300, 4)
    actual, expected = type(matrix)(**parts) @ x.float(), matrix @ x
    if expected.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    assert actual.dtype == torch.float32
    # The rounding of the inputs themselves is part of the error here; a Cauchy matrix with close nodes magnifies it.
    assert_close(name, actual, expected, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_transformed_in_float32(dtype):
    column, x = torch.rand(20).to(dtype), torch.rand(20, 3).to(dtype)
    for matrix in (Toeplitz(column), Cosine(20, dtype)):
        y = matrix @ x
        assert y.dtype == dtype
        assert_close(repr(matrix), y, matrix.to_dense().double() @ x.double(), dtype=dtype)


@pytest.mark.parametrize("name", NAMES[:6])
def test_gradients(name):
    matrix, _ = build(name, 5, 4)
    rest = {key: value for key, value in vars(matrix).items() if not isinstance(value, Tensor)}
    names = [key for key, value in vars(matrix).items() if isinstance(value, Tensor)]

    def multiply(x, *parameters):
        return type(matrix)(**rest, **dict(zip(names, parameters, strict=True))) @ x

    parameters = [vars(matrix)[key].clone().requires_grad_() for key in names]
    x = randn(matrix.shape[-1], 2).requires_grad_()
    assert torch.autograd.gradcheck(multiply, (x, *parameters))
    assert torch.autograd.gradgradcheck(multiply, (x, *parameters))


def test_a_power_of_zero_has_a_gradient():
    nodes = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: Vandermonde(u, 4).to_dense(), (nodes,))


PAIRS = [
    ("causal Toeplitz", "causal Toeplitz", "matmul", Toeplitz),
    ("Toeplitz", "causal Toeplitz", "add", Toeplitz),
    ("Toeplitz", "Toeplitz", "add", Toeplitz),
    ("Toeplitz", "Toeplitz", "mul", Toeplitz),
    ("causal Toeplitz", "Toeplitz", "mul", Toeplitz),
    ("Diagonal", "Diagonal", "matmul", Diagonal),
    ("Diagonal", "Diagonal", "add", Diagonal),
    ("Diagonal", "Diagonal", "mul", Diagonal),
    ("LowRank", "Toeplitz", "matmul", LowRank),
    ("Cauchy", "LowRank", "matmul", LowRank),
    ("LowRank", "LowRank", "matmul", LowRank),
    ("LowRank", "LowRank", "add", LowRank),
    ("LowRank", "LowRank", "mul", LowRank),
    ("Toeplitz", "Toeplitz", "matmul", StructuredMatrix),
    ("Cauchy", "Cosine", "add", StructuredMatrix),
    ("Cauchy", "Cosine", "mul", Dense),
]


@pytest.mark.parametrize(("left", "right", "operation", "kind"), PAIRS)
def test_closed_forms_are_the_dense_ones(left, right, operation, kind):
    (one, _), (other, _) = build(left, 7, 7), build(right, 7, 7)
    compute = getattr(operator, operation)
    assert isinstance(compute(one, other), kind)
    assert_equal(operation, compute(one, other).to_dense(), compute(one.to_dense(), other.to_dense()))


def test_ranks_add_and_multiply():
    one, other = LowRank(randn(3, 1, 8, 2), randn(9, 2)), LowRank(randn(8, 3), randn(2, 9, 3))
    results = {"sum": one + other, "elementwise": one * other}
    assert [m.left.shape[-1] for m in results.values() if isinstance(m, LowRank)] == [5, 6]
    assert_equal("sum", results["sum"].to_dense(), one.to_dense() + other.to_dense())
    assert_equal("elementwise", results["elementwise"].to_dense(), one.to_dense() * other.to_dense())


def test_circulant_matrices_are_diagonal_in_the_fourier_basis():
    column = randn(8).to(COMPLEX)
    circulant = Toeplitz(column, torch.cat([column[:1], column[1:].flip(0)]))
    inverse = Dense(Fourier(8, COMPLEX).to_dense().conj())
    assert_equal(
        "F⁻¹DF", (inverse @ Diagonal(torch.fft.fft(column)) @ Fourier(8, COMPLEX)).to_dense(), circulant.to_dense()
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Diagonal(torch.tensor(1.0)), r"values has the shape \(\); it must be \(..., T\)"),
        (lambda: Toeplitz(torch.tensor(1.0)), r"column has the shape \(\); it must be \(..., rows\)"),
        (
            lambda: LowRank(torch.ones(3), torch.ones(3, 1)),
            r"left has the shape \(3,\); it must be \(..., rows, rank\)",
        ),
        (lambda: LowRank(torch.ones(3, 2), torch.ones(3, 1)), r"\(3, 2\) and \(3, 1\); .* the rank, must be equal"),
        (lambda: Cauchy(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0])), "nodes and poles share 2, where"),
        (lambda: Fourier(4, torch.float32), "dtype=torch.float32 has no imaginary part; use torch.complex64"),
        (lambda: Cosine(4, torch.complex64), "dtype=torch.complex64 holds no real numbers; use torch.float32"),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
