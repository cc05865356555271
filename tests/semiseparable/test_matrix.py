"""What every structured matrix gets from the base class, against dense algebra in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualscan.semiseparable import (
    Cosine,
    Dense,
    Fourier,
    LowRank,
    SemiseparableMatrix,
    StructuredMatrix,
    Toeplitz,
)
from tests.oracle import assert_close

DOUBLE = torch.float64
small = st.integers(1, 9)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def random_toeplitz(rows: int, columns: int, *batch: int) -> Toeplitz:
    return Toeplitz(torch.randn(*batch, rows, dtype=DOUBLE), torch.randn(columns, dtype=DOUBLE))


def random_dense(rows: int, columns: int, *batch: int) -> Dense:
    return Dense(torch.randn(*batch, rows, columns, dtype=DOUBLE))


class OnlyMatmul(StructuredMatrix):
    """Complex diagonals times a running sum: no `to_dense`, no `transpose`."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.values.shape, self.values.shape[-1]))

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return self.values.unsqueeze(-1) * x.cumsum(-2)


class OnlyDense(StructuredMatrix):
    """The same matrix by its definition."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.values.shape, self.values.shape[-1]))

    def to_dense(self) -> torch.Tensor:
        return self.values.unsqueeze(-1) * torch.ones(self.shape[-2:], dtype=DOUBLE).tril()


@quick
@given(length=small, complex_entries=st.booleans())
def test_each_definition_gives_the_other(length, complex_entries):
    values = torch.randn(2, length, dtype=torch.complex128 if complex_entries else DOUBLE)
    by_matmul, by_dense = OnlyMatmul(values), OnlyDense(values)
    assert torch.equal(by_matmul.to_dense(), by_dense.to_dense())
    x = torch.randn(length, 3, dtype=values.dtype)
    torch.testing.assert_close(by_dense @ x, by_matmul @ x)
    torch.testing.assert_close(by_matmul.mT @ x, by_dense.to_dense().mT @ x)
    torch.testing.assert_close(by_matmul.mT.to_dense(), by_dense.to_dense().mT)
    assert by_matmul.mT.mT is by_matmul


@quick
@given(rows=small, columns=small, width=small)
def test_sum_product_transpose_and_block_are_those_of_dense_matrices(rows, columns, width):
    toeplitz, other, square = (
        random_toeplitz(rows, columns, 2, 1),
        random_dense(rows, columns, 3),
        random_dense(columns, columns),
    )
    x, z = torch.randn(columns, width, dtype=DOUBLE), torch.randn(rows, width, dtype=DOUBLE)
    top, left = rows // 2, columns // 3
    cases = {
        "sum": (toeplitz + other, toeplitz.to_dense() + other.to_dense()),
        "product": (toeplitz @ square, toeplitz.to_dense() @ square.to_dense()),
        "elementwise": (toeplitz * other, toeplitz.to_dense() * other.to_dense()),
        "block": (toeplitz.block(slice(top), slice(left, None)), toeplitz.to_dense()[..., :top, left:]),
    }
    cases["difference"] = (toeplitz - other, toeplitz.to_dense() - other.to_dense())
    cases["multiple"] = (toeplitz * 3 + 0.5 * other, 3 * toeplitz.to_dense() + 0.5 * other.to_dense())
    for name, (matrix, dense) in cases.items():
        assert matrix.shape == dense.shape, name
        assert_close(name, matrix.to_dense(), dense, dtype=DOUBLE)
        assert_close(f"{name} matmul", matrix @ x[: dense.shape[-1]], dense @ x[: dense.shape[-1]], dtype=DOUBLE)
        part = z[: dense.shape[-2]]
        assert_close(f"{name} transposed", matrix.mT @ part, dense.mT @ part, dtype=DOUBLE)


def test_dtypes_promote_one_another():
    narrow, wide = Toeplitz(torch.ones(4)), Cosine(4, DOUBLE)
    assert (narrow + wide).dtype == (narrow @ wide).mT.dtype == DOUBLE
    assert (narrow * 1j).dtype == (narrow + Fourier(4)).block(slice(2), slice(2)).dtype == torch.complex64
    assert (Toeplitz(torch.ones(4, dtype=torch.bfloat16)) * 0.5).dtype == torch.bfloat16
    for matrix in (narrow + wide, narrow * 1j, wide @ Fourier(4)):
        assert matrix.to_dense().dtype == (matrix @ torch.ones(4, 1)).dtype == matrix.dtype
        assert (matrix @ torch.ones(4, 0)).dtype == matrix.dtype


def test_real_and_complex_numbers_mix():
    x, real = torch.randn(6, 2, dtype=DOUBLE), SemiseparableMatrix.random(6, 2, dtype=DOUBLE)
    phases = torch.polar(torch.ones(6, dtype=DOUBLE), torch.arange(6, dtype=DOUBLE))
    complex_x, dense = x.to(phases.dtype), real.to_dense().to(phases.dtype)
    columns = phases.unsqueeze(-1)
    for matrix in (LowRank(columns, columns), SemiseparableMatrix(phases, columns, columns), Toeplitz(phases)):
        torch.testing.assert_close(matrix @ x, matrix.to_dense() @ complex_x)
        torch.testing.assert_close(real @ (matrix @ x), dense @ matrix.to_dense() @ complex_x)
        torch.testing.assert_close((Dense(real.to_dense()) @ matrix).to_dense(), dense @ matrix.to_dense())


def test_a_multiple_keeps_its_structure():
    for matrix in (LowRank(torch.ones(4, 2), torch.ones(4, 2)), SemiseparableMatrix.random(4, 2)):
        assert type(-2.0 * matrix) is type(matrix)


def test_causality_follows_from_the_parts():
    causal, full = Toeplitz(torch.randn(6)), Toeplitz(torch.randn(6), torch.randn(6))
    dense = Dense(torch.randn(6, 6).tril())
    claims = {
        True: [causal, dense, causal + dense, causal @ dense, causal.block(slice(4), slice(1, 6))],
        False: [full, dense.mT, causal + full, full @ causal, causal.block(slice(1, 6), slice(4)), causal.mT],
    }
    for is_causal, matrices in claims.items():
        assert [matrix.is_causal for matrix in matrices] == [is_causal] * len(matrices)
    for matrix in claims[True]:
        assert not matrix.to_dense().triu(1).any()


def test_gradients_through_every_composition():
    column, row = (torch.randn(5, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    entries = torch.randn(5, 5, dtype=DOUBLE, requires_grad=True)
    x = torch.randn(4, 2, dtype=DOUBLE, requires_grad=True)

    def compute(column, row, entries, x):
        both = Toeplitz(column, row) + Dense(entries) @ OnlyMatmul(column).mT
        return both.block(slice(1, 4), slice(4)) @ x

    assert torch.autograd.gradcheck(compute, (column, row, entries, x))
    assert torch.autograd.gradgradcheck(compute, (column, row, entries, x))


def test_a_class_without_a_definition_is_refused():
    with pytest.raises(TypeError, match="Nothing defines neither matmul nor to_dense; define at least one"):
        type("Nothing", (StructuredMatrix,), {})


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda m: m @ torch.ones(3, 2), r"Toeplitz\(2, 4, 5\) multiplies \(..., 5, width\), not \(3, 2\)"),
        (lambda m: m @ torch.ones(5), r"not \(5,\); unsqueeze a last dimension"),
        (lambda m: m @ m, r"multiplies \(..., 5, width\), not \(2, 4, 5\); its columns are the rows"),
        (lambda m: m + m.mT, "cannot be added to Toeplitz.*: rows and columns must be equal"),
        (lambda m: m * m.mT, "cannot be multiplied elementwise with Toeplitz"),
        (lambda m: m.block(slice(0, 4, 2), slice(2)), "adjacent rows and columns, step 1, not step 2"),
    ],
)
def test_wrong_sizes_are_named(compute, message):
    with pytest.raises(ValueError, match=message):
        compute(random_toeplitz(4, 5, 2))
