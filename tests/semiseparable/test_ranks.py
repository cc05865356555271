"""N-semiseparable matrices are those of recurrences with N states: ranks, realisations, sums, products."""

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualscan.semiseparable import (
    Diagonal,
    LowRank,
    OneSemiseparable,
    SemiseparableMatrix,
    StructuredMatrix,
    Toeplitz,
    as_semiseparable,
    block_ranks,
)
from tests.semiseparable.problems import (
    DOUBLE,
    assert_equal,
    dtypes,
    entries,
    kinds,
    lengths,
    orders,
    quick,
    recurrence,
)


@quick
@given(length=lengths, order=orders, kind=kinds, dtype=dtypes)
def test_a_recurrence_of_n_states_is_n_semiseparable_and_back(length, order, kind, dtype):
    """Theorem 3.5, both ways: no block has a rank over N, and the ranks of the blocks are the states needed."""
    dense = SemiseparableMatrix.random(length, order, kind=kind, dtype=dtype).to_dense()
    ranks = block_ranks(dense)
    possible = torch.minimum(torch.arange(length) + 1, length - torch.arange(length)).clamp(max=order)
    assert ranks.tolist() == possible.tolist()
    found = SemiseparableMatrix.from_dense(dense)
    assert found.order == possible.max()
    assert_equal("realisation", entries(found), dense)


@quick
@given(length=lengths, order=orders, data=st.data())
def test_ranks_below_the_diagonal_survive_inversion(length, order, data):
    matrix = SemiseparableMatrix.random(length, order, dtype=DOUBLE)
    matrix = SemiseparableMatrix(matrix.A, matrix.B, matrix.C / (matrix.C * matrix.B).sum(-1, keepdim=True) / 4)
    ranks = block_ranks(matrix, diagonal=False, tol=1e-9)
    inverse = torch.linalg.inv(matrix.to_dense())
    assert block_ranks(inverse, diagonal=False, tol=1e-9).equal(ranks)
    assert ranks[-1] == 0


def test_batches_take_the_largest_rank():
    few, many = (SemiseparableMatrix.random(12, order, dtype=DOUBLE).to_dense() for order in (1, 4))
    batch = torch.stack([few, many])
    assert block_ranks(batch)[:, 6].tolist() == [1, 4]
    found = SemiseparableMatrix.from_dense(batch)
    assert (found.order, found.shape) == (4, (2, 12, 12))
    assert_equal("batch", found.to_dense(), batch)


def test_a_zero_matrix_and_a_full_one():
    zero = torch.zeros(5, 5, dtype=DOUBLE)
    assert block_ranks(zero).tolist() == [0] * 5
    assert not SemiseparableMatrix.from_dense(zero).to_dense().any()
    full = torch.randn(6, 6, dtype=DOUBLE).tril()
    assert block_ranks(full).tolist() == [1, 2, 3, 3, 2, 1]
    assert_equal("full", SemiseparableMatrix.from_dense(full).to_dense(), full)


def test_tolerance_separates_signal_from_noise():
    dense = SemiseparableMatrix.random(16, 2, dtype=DOUBLE).to_dense()
    noise = 1e-7 * torch.randn(16, 16, dtype=DOUBLE).tril()
    assert block_ranks(dense + noise).max() == 8
    assert block_ranks(dense + noise, tol=1e-5).max() == 2
    found = SemiseparableMatrix.from_dense(dense + noise, order=2, tol=1e-5)
    assert found.order == 2
    assert (found.to_dense() - dense).norm() < 1e-5 * dense.norm()


def test_truncation_error_is_bounded_by_what_is_left_out():
    dense = torch.randn(20, 20, dtype=DOUBLE).tril()
    errors = []
    for order in range(1, 11):
        error = (SemiseparableMatrix.from_dense(dense, order=order, truncate=True).to_dense() - dense).square().sum()
        left_out = sum(torch.linalg.svdvals(dense[t:, : t + 1])[order:].square().sum() for t in range(dense.shape[0]))
        assert error <= left_out + 1e-20
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-20


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_power_law_needs_few_states(exponent):
    dense = Toeplitz((1 + torch.arange(128, dtype=DOUBLE)) ** -exponent).to_dense()
    for tol, most in ((1e-2, 2), (1e-3, 4), (1e-6, 7)):
        found = SemiseparableMatrix.from_dense(dense, tol=tol)
        assert found.order <= most
        assert (found.to_dense() - dense).norm() < tol * 128**0.5 * dense.norm()


def recurrences(length: int, order: int, kind: str) -> dict[str, StructuredMatrix]:
    return {
        "semiseparable": recurrence(length, order, kind),
        "1-semiseparable": OneSemiseparable(torch.randn(length, dtype=DOUBLE)),
        "diagonal": Diagonal(torch.randn(length, dtype=DOUBLE)),
    }


@quick
@given(length=lengths, order=orders, other_order=orders, kind=kinds, other_kind=kinds)
def test_sums_and_products_are_closed(length, order, other_order, kind, other_kind):
    """Proposition C.1: orders add in sums and products; elementwise, they multiply."""
    for one in recurrences(length, order, kind).values():
        for other in recurrences(length, other_order, other_kind).values():
            orders_of = [as_semiseparable(m).order for m in (one, other)]
            for name, most in (
                ("add", sum(orders_of)),
                ("matmul", sum(orders_of)),
                ("mul", orders_of[0] * orders_of[1]),
            ):
                compute = getattr(operator, name)
                result = compute(one, other)
                assert isinstance(result, SemiseparableMatrix | OneSemiseparable | Diagonal)
                assert as_semiseparable(result).order <= most
                assert_equal(name, result.to_dense(), compute(one.to_dense(), other.to_dense()))


def test_closed_forms_broadcast_batches():
    one, other = recurrence(6, 2, "dense", DOUBLE, 3, 1), recurrence(6, 3, "scalar", DOUBLE, 2)
    diagonal = Diagonal(torch.randn(4, 1, 1, 6, dtype=DOUBLE))
    for name in ("add", "matmul", "mul"):
        compute = getattr(operator, name)
        for left, right in ((one, other), (diagonal, one), (one, diagonal)):
            result, expected = compute(left, right), compute(left.to_dense(), right.to_dense())
            assert result.shape == expected.shape
            assert_equal(name, result.to_dense(), expected)


@quick
@given(length=lengths, order=orders)
def test_duality(length, order):
    """A 1-semiseparable mask on scores of low rank is the recurrence with a scalar A (section 5)."""
    a, keys, queries = (torch.randn(*shape, dtype=DOUBLE) for shape in ((length,), (length, order), (length, order)))
    scores, mask = LowRank(queries, keys), OneSemiseparable(a)
    for masked in (mask * scores, scores * mask):
        assert isinstance(masked, SemiseparableMatrix)
        assert masked.A.shape == (length, 1)
        assert_equal("masked scores", masked.to_dense(), mask.to_dense() * (queries @ keys.mT))


def test_gradients_of_closed_forms():
    a, b, c = (torch.randn(4, 2, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    x = torch.randn(4, 1, dtype=DOUBLE)

    def compute(a, b, c):
        one, other = SemiseparableMatrix(a, b, c), SemiseparableMatrix(a[:, 0], c, b)
        safe = Diagonal(torch.full((4,), 20.0, dtype=DOUBLE)) + one
        return (one @ other + one * other + as_semiseparable(safe).inverse()) @ x

    assert torch.autograd.gradcheck(compute, (a, b, c))


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (
            lambda: SemiseparableMatrix.from_dense(torch.eye(4) + torch.ones(4, 4).tril(-3).T),
            r"entry \(0, 3\) = 1 is above the diagonal; pass matrix.tril\(\)",
        ),
        (
            lambda: SemiseparableMatrix.from_dense(SemiseparableMatrix.random(12, 4).to_dense(), order=2),
            "rows 3 to 11 of columns 0 to 3 have the numerical rank 4, more than order=2; use order=4, a larger tol",
        ),
        (lambda: SemiseparableMatrix.from_dense(torch.ones(3, 4)), r"shape \(3, 4\) is not square; pass \(..., T, T\)"),
        (lambda: block_ranks(torch.ones(3)), r"shape \(3,\) is not square; pass"),
        (lambda: SemiseparableMatrix.from_dense(torch.eye(4), order=0), "order=0 must be at least 1"),
        (lambda: SemiseparableMatrix.from_dense(torch.eye(4), truncate=True), "truncate=True needs the order to keep"),
    ],
)
def test_bad_matrices_are_named(compute, message):
    with pytest.raises(ValueError, match=message):
        compute()
