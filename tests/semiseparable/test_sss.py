"""Semiseparable matrices as recurrences: entries, three modes, blocks, inverses, and the paper's costs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualscan.semiseparable import (
    LowRank,
    OneSemiseparable,
    SemiseparableMatrix,
    Toeplitz,
    as_semiseparable,
    count,
    scan,
)
from dualscan.semiseparable.scans import ALGORITHMS
from tests.oracle import assert_close
from tests.semiseparable.problems import (
    DOUBLE,
    KINDS,
    assert_equal,
    dtypes,
    entries,
    kinds,
    lengths,
    orders,
    quick,
    recurrence,
)

MODES = ("linear", "quadratic", "chunked")


@quick
@given(length=lengths, order=orders, kind=kinds, dtype=dtypes, width=st.integers(1, 3), chunk_size=st.integers(1, 25))
def test_three_modes_multiply_by_the_entries(length, order, kind, dtype, width, chunk_size):
    matrix = recurrence(length, order, kind, dtype)
    dense, x = entries(matrix), torch.randn(length, width, dtype=dtype)
    assert_equal("to_dense", matrix.to_dense(), dense)
    for mode in MODES:
        options = {"chunk_size": chunk_size} if mode == "chunked" else {}
        assert_equal(mode, matrix.matmul(x, mode=mode, **options), dense @ x)
    assert_equal("transpose", matrix.mT @ x, dense.mT @ x)
    assert_equal("dense transpose", matrix.mT.to_dense(), dense.mT)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_broadcast(kind):
    wide, one = recurrence(9, 3, kind, DOUBLE, 4, 2), recurrence(9, 3, kind, DOUBLE, 1, 2)
    matrix = SemiseparableMatrix(one.A, wide.B, one.C)
    assert matrix.shape == (4, 2, 9, 9)
    x = torch.randn(5, 1, 1, 9, 2, dtype=DOUBLE)
    for i in range(4):
        for j in range(2):
            dense = entries(SemiseparableMatrix(one.A[0, j], wide.B[i, j], one.C[0, j]))
            assert_equal("to_dense", matrix.to_dense()[i, j], dense)
            for mode in MODES:
                y = matrix.matmul(x, mode=mode)
                assert y.shape == (5, 4, 2, 9, 2)
                assert_equal(mode, y[3, i, j], dense @ x[3, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients(kind, mode):
    matrix = recurrence(5, 2, kind)
    inputs = [t.clone().requires_grad_() for t in (matrix.A, matrix.B, matrix.C, torch.randn(5, 2, dtype=DOUBLE))]

    def compute(A, B, C, x):
        return SemiseparableMatrix(A, B, C).matmul(x, mode=mode, **({"chunk_size": 2} if mode == "chunked" else {}))

    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close_to_float64(kind, mode):
    narrow = SemiseparableMatrix.random(200, 8, kind=kind, dtype=torch.float32)
    double = SemiseparableMatrix(narrow.A.double(), narrow.B.double(), narrow.C.double())
    x = torch.randn(200, 4)
    assert_close(mode, narrow.matmul(x, mode=mode), double.matmul(x.double(), mode="linear"), dtype=torch.float32)


def test_a_log_decay_of_minus_infinity_forgets():
    log_decay = -torch.rand(8, dtype=DOUBLE)
    log_decay[5] = -math.inf
    log_decay.requires_grad_()
    matrix = SemiseparableMatrix.from_log_decay(log_decay, torch.ones(8, 2).double(), torch.ones(8, 2).double())
    mask = OneSemiseparable.from_log_decay(log_decay)
    for product in (matrix, mask):
        dense = product.to_dense()
        assert not dense[5:, :5].any()
        assert dense[5:, 5:].tril().bool().equal(torch.ones(3, 3).tril().bool())
    (matrix @ torch.ones(8, 1).double() + mask @ torch.ones(8, 1).double()).sum().backward()
    assert log_decay.grad is not None
    assert log_decay.grad.isfinite().all()


@quick
@given(length=lengths, order=orders, kind=kinds, cuts=st.lists(st.integers(0, 20), min_size=4, max_size=4))
def test_blocks(length, order, kind, cuts):
    """Semiseparable on the diagonal, of low rank below it, zero above: lemma 3.3."""
    matrix = recurrence(length, order, kind)
    first, second, third, fourth = sorted(min(cut, length) for cut in cuts)
    spans = slice(first, second), slice(third, fourth)
    dense = entries(matrix)
    for rows in (*spans, slice(None), slice(first, third)):
        for columns in (*spans, slice(None), slice(second, fourth)):
            block = matrix.block(rows, columns)
            assert_equal(f"{rows} {columns}", block.to_dense(), dense[rows, columns])
            x = torch.randn(block.shape[-1], 2, dtype=DOUBLE)
            assert_equal(f"{rows} {columns} @", block @ x, dense[rows, columns] @ x)
    if first < second <= third < fourth:
        below, above, on = (matrix.block(*pair) for pair in (spans[::-1], spans, (spans[0], spans[0])))
        assert isinstance(below, LowRank)
        assert isinstance(above, LowRank)
        assert isinstance(on, SemiseparableMatrix)
        assert (below.left.shape[-1], above.left.shape[-1], on.order) == (order, 0, order)


@quick
@given(length=lengths, order=orders, kind=kinds, dtype=dtypes)
def test_the_inverse_has_one_more_state(length, order, kind, dtype):
    matrix = recurrence(length, order, kind, dtype)
    # A diagonal of ones keeps the inverse of a long product small.
    matrix = SemiseparableMatrix(matrix.A / 16, matrix.B, matrix.C / (matrix.C * matrix.B).sum(-1, keepdim=True))
    inverse = matrix.inverse()
    assert inverse.order == order + 1
    identity = torch.eye(length, dtype=dtype)
    assert_equal("from the right", matrix.to_dense() @ inverse.to_dense(), identity)
    assert_equal("from the left", (inverse @ matrix).to_dense(), identity)


def test_the_inverse_of_a_1_semiseparable_matrix_is_bidiagonal():
    a = torch.randn(6, dtype=DOUBLE)
    a[2] = 0
    expected = torch.eye(6, dtype=DOUBLE) - torch.diag(a[1:], -1)
    assert_equal("inverse", OneSemiseparable(a).inverse().to_dense(), expected)


@quick
@given(length=lengths, dtype=dtypes, algorithm=st.sampled_from(list(ALGORITHMS)))
def test_1_semiseparable_matrices_are_the_scan(length, dtype, algorithm):
    matrix = OneSemiseparable(torch.randn(3, length, dtype=dtype))
    x = torch.randn(length, 2, dtype=dtype)
    assert_equal("matmul", matrix.matmul(x, algorithm=algorithm), matrix.to_dense() @ x)
    assert_equal("recurrence", matrix.to_dense(), as_semiseparable(matrix).to_dense())
    assert_equal("transpose", matrix.mT @ x, matrix.to_dense().mT @ x)


def test_random_matrices_repeat_and_have_the_kind_asked_for():
    for kind, shape in {"scalar": (2, 6, 1), "diagonal": (2, 6, 3), "dense": (2, 6, 3, 3)}.items():
        draws = [
            SemiseparableMatrix.random(
                6, 3, batch=(2,), kind=kind, dtype=torch.float32, generator=torch.Generator().manual_seed(seed)
            )
            for seed in (1, 1, 2)
        ]
        assert draws[0].A.shape == shape
        assert draws[0].dtype == torch.float32
        assert draws[0].to_dense().equal(draws[1].to_dense())
        assert not draws[0].to_dense().equal(draws[2].to_dense())


def scalar_flops(mode: str, T: int, N: int, P: int, Q: int) -> tuple[int, int]:
    """Operations of each mode for a scalar A, and those in matrix products, exactly."""
    chunks = T // Q
    match mode:
        case "linear":  # an outer product and a decay (the first token has none), and a product with C
            return T * 5 * N * P - 2 * N * P, T * 2 * N * P
        case "quadratic":  # C Bᵀ, the mask by cumulative products, their elementwise product, the product with x
            products = 2 * T * T * N + 2 * T * T * P
            return products + 2 * T * T, products
    products = chunks * (2 * Q * Q * N + 2 * Q * Q * P + 2 * Q * N * P + 2 * Q * N * P)
    factors = chunks * (2 * Q * Q + (Q + Q * N) + (Q + Q * N + 1))
    return products + factors + chunks * 2 * N * P + T * P, products


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("T", "N", "P", "Q"), [(32, 4, 4, 8), (64, 8, 3, 16), (128, 2, 16, 4)])
def test_flops_are_those_of_the_formulas(mode, T, N, P, Q):
    matrix, x = SemiseparableMatrix.random(T, N), torch.randn(T, P)
    options = {"chunk_size": Q} if mode == "chunked" else {}
    cost = count(matrix.matmul, x, mode=mode, **options)
    assert (cost.flops, cost.matmul_flops) == scalar_flops(mode, T, N, P, Q)


def attention(q, k, v):
    scores = (q @ k.mT).exp()
    return scores / scores.sum(-1, keepdim=True) @ v


def states_by_scan(a, B, C, x):
    """All states at once, as a state space model without the duality has them."""
    states = scan(a, (B.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)).unflatten(-1, (B.shape[-1], -1))
    return (C.unsqueeze(-1) * states).sum(-2)


def growth(cost, T, N):
    """How often twice the tokens, and twice the sizes N = P, double the operations and the memory."""
    start, longer, wider = cost(T, N), cost(2 * T, N), cost(T, 2 * N)
    return [
        round(math.log2(getattr(other, field) / getattr(start, field)), 1)
        for field in ("flops", "memory")
        for other in (longer, wider)
    ]


def test_costs_grow_as_in_the_papers_comparison():
    """Attention, state space models and SSD with N = P (and chunks of N tokens): the table of section 6.

    Training FLOPs T²N, TN², TN²; memory T², TN², TN; and matrix products everywhere but in the scan.
    """

    def attend(T, N):
        return count(attention, *(torch.randn(T, N) for _ in range(3)))

    def scan_states(T, N):
        matrix = SemiseparableMatrix.random(T, N)
        return count(states_by_scan, matrix.A.squeeze(-1), matrix.B, matrix.C, torch.randn(T, N))

    def ssd(T, N):
        return count(SemiseparableMatrix.random(T, N).matmul, torch.randn(T, N), chunk_size=N)

    def rounded(numbers):
        return [round(number) for number in numbers]

    assert rounded(growth(attend, 1024, 32)) == [2, 1, 2, 0]
    assert rounded(growth(scan_states, 256, 16)) == [1, 2, 1, 2]
    assert rounded(growth(ssd, 1024, 32)) == [1, 2, 1, 1]
    shares = {f.__name__: f(512, 32).matmul_flops / f(512, 32).flops for f in (attend, scan_states, ssd)}
    assert shares["attend"] > 0.95
    assert shares["scan_states"] == 0
    assert shares["ssd"] > 0.9


def test_a_token_costs_as_in_the_papers_comparison():
    """Inference FLOPs: TN for attention over its T keys and values, N² for a state space model; states T N and N²."""

    def attend(T, N):
        return count(attention, torch.randn(1, N), torch.randn(T, N), torch.randn(T, N))

    def step(T, N):
        matrix = SemiseparableMatrix.random(2, N)
        two, one = (
            count(matrix.block(s, s).matmul, torch.randn(s.stop, N), mode="linear") for s in (slice(2), slice(1))
        )
        return two._replace(flops=two.flops - one.flops)

    assert growth(attend, 256, 64)[:2] == [1.0, 1.0]
    assert growth(step, 256, 64)[:2] == [0.0, 2.0]
    assert growth(step, 256, 64)[3] == 2.0


def test_chunks_bound_memory_and_depth():
    T, N = 1024, 16
    matrix, x = SemiseparableMatrix.random(T, N), torch.randn(T, N)
    costs = {mode: count(matrix.matmul, x, mode=mode) for mode in ("linear", "quadratic")}
    costs["chunked"] = count(matrix.matmul, x, chunk_size=N)
    assert costs["quadratic"].memory > T * T > 4 * costs["chunked"].memory
    assert costs["linear"].depth >= T > 4 * costs["chunked"].depth > 16 * costs["quadratic"].depth


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (
            lambda: SemiseparableMatrix(torch.ones(3, 4), torch.ones(3, 2), torch.ones(3, 2)),
            r"A \(3, 4\), B \(3, 2\) and C \(3, 2\) do not fit; B and C are \(..., T, N\), A is",
        ),
        (
            lambda: SemiseparableMatrix(torch.ones(3), torch.ones(3, 2), torch.ones(3, 4)),
            r"A \(3, 1\), B \(3, 2\) and C \(3, 4\) do not fit",
        ),
        (lambda: SemiseparableMatrix(torch.ones(3), torch.ones(3), torch.ones(3)), r"B has the shape \(3,\)"),
        (lambda: OneSemiseparable(torch.tensor(1.0)), r"a has the shape \(\); it must be \(..., T\)"),
        (lambda: SemiseparableMatrix.random(4, 2, kind="full"), "kind='full' is none of scalar, diagonal, dense"),
        (lambda: recurrence(4, 2).matmul(torch.ones(4, 1), mode="fast"), "mode='fast' is none of linear, quadratic"),
        (
            lambda: recurrence(4, 2).matmul(torch.ones(4, 1), mode="linear", chunk_size=2),
            "mode='linear' has no chunks; leave chunk_size=2 out",
        ),
        (lambda: recurrence(4, 2).matmul(torch.ones(4, 1), chunk_size=0), "chunk_size=0 must be at least 1"),
        (
            lambda: SemiseparableMatrix(torch.ones(3), torch.eye(3), torch.eye(3).flip(0)).inverse(),
            r"row 0 has a zero on the diagonal, so SemiseparableMatrix\(3, 3\) has no inverse; add a Diagonal",
        ),
        (lambda: as_semiseparable(Toeplitz(torch.ones(3))), r"Toeplitz\(3, 3\) is no recurrence by its structure"),
    ],
)
def test_bad_arguments_are_named(compute, message):
    with pytest.raises(ValueError, match=message):
        compute()
