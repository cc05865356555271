"""The scalar scan: six algorithms, one answer, and the work and depth that each is said to have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualscan.semiseparable.costs import count
from dualscan.semiseparable.scans import ALGORITHMS, scan
from tests.oracle import assert_close

DOUBLE = torch.float64
quick = settings(max_examples=40, deadline=None, derandomize=True)
CHUNKED = ("state_passing", "block_scan")


def by_definition(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Multiplication by the dense matrix with the entries a_j ... a_{i+1}, each a product of its own."""
    length = a.shape[-1]
    ones = torch.ones((), dtype=a.dtype)
    rows = [
        torch.stack([a[i + 1 : j + 1].prod() if i < j else ones * (i == j) for i in range(length)])
        for j in range(length)
    ]
    return torch.stack(rows) @ x


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@quick
@given(
    length=st.integers(1, 40),
    width=st.integers(1, 3),
    chunk_size=st.integers(1, 45) | st.none(),
    dtype=st.sampled_from([DOUBLE, torch.complex128, torch.float32]),
    zeros=st.booleans(),
)
def test_every_algorithm_multiplies_by_the_matrix(algorithm, length, width, chunk_size, dtype, zeros):
    a, x = torch.randn(length, dtype=dtype), torch.randn(length, width, dtype=dtype)
    if zeros:
        a[::3] = 0
    y = scan(a, x, algorithm=algorithm, chunk_size=chunk_size if algorithm in CHUNKED else None)
    wide = torch.complex128 if dtype.is_complex else DOUBLE
    expected = by_definition(a.to(wide), x.to(wide))
    if dtype.is_complex:
        y, expected = torch.view_as_real(y), torch.view_as_real(expected)
    assert_close(algorithm, y, expected, dtype=y.dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_batches_broadcast(algorithm):
    a, x = torch.randn(3, 1, 11, dtype=DOUBLE), torch.randn(2, 11, 4, dtype=DOUBLE)
    y = scan(a, x, algorithm=algorithm)
    assert y.shape == (3, 2, 11, 4)
    for i in range(3):
        for j in range(2):
            assert_close("y", y[i, j], by_definition(a[i, 0], x[j]), dtype=DOUBLE)
    assert scan(a, x[:, :, :0], algorithm=algorithm).shape == (3, 2, 11, 0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients(algorithm):
    a = torch.randn(7, dtype=DOUBLE)
    a[3] = 0
    x = torch.randn(7, 2, dtype=DOUBLE)
    inputs = (a.requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, x: scan(a, x, algorithm=algorithm), inputs)
    assert torch.autograd.gradgradcheck(lambda a, x: scan(a, x, algorithm=algorithm), inputs)


def test_algorithms_are_factorisations_into_sparse_matrices():
    length = 16
    a = torch.randn(length, dtype=DOUBLE)
    dense, identity = by_definition(a, torch.eye(length, dtype=DOUBLE)), torch.eye(length, dtype=DOUBLE)

    def below(values, distance):
        return identity + torch.diag(values[distance:], -distance)

    one_by_one = [below(torch.where(torch.arange(length) == t, a, 0), 1) for t in range(1, length)]
    products = {
        distance: torch.cat([torch.zeros(distance), torch.ones(length - distance)]) for distance in (1, 2, 4, 8)
    }
    doubling = [
        below(torch.stack([a[max(0, t - s + 1) : t + 1].prod() for t in range(length)]) * products[s], s)
        for s in products
    ]
    for factors in (one_by_one, doubling):
        assert_close("product", torch.linalg.multi_dot(factors[::-1]), dense, dtype=DOUBLE)
        x = torch.randn(length, 2, dtype=DOUBLE)
        y = x
        for factor in factors:
            y = factor @ y
        algorithm = "dilated" if factors is doubling else "fully_recurrent"
        assert_close(algorithm, scan(a, x, algorithm=algorithm), y, dtype=DOUBLE)


def merging(tokens: int, width: int) -> int:
    """Operations of the associative scan of a power of two."""
    return (tokens - 1) + 2 * width * (tokens - 1) + 2 * width * (tokens - tokens.bit_length())


@pytest.mark.parametrize("log_length", [3, 4, 6, 8])
@pytest.mark.parametrize("width", [1, 5])
def test_work_and_depth_are_those_of_the_table(log_length, width):
    T, Q = 2**log_length, 2 ** (log_length // 2)
    log_chunk, blocks = log_length // 2, T // Q
    dilating, within = T * log_length - T + 1, Q * log_chunk - Q + 1
    expected = {
        "sequential": (2 * width * (T - 1), T - 1),
        "fully_recurrent": (2 * width * (T - 1), T - 1),
        "dilated": ((2 * width + 1) * dilating, log_length),
        "state_passing": (
            blocks * (2 * width + 1) * within + 2 * width * (blocks - 1),
            blocks * (log_chunk + 1) - 1,
        ),
        "associative": (merging(T, width), 2 * log_length),
        "block_scan": (
            (Q - 1) * blocks * (2 * width + 1) + merging(blocks, width) + 2 * width * (T - Q),
            Q - 1 + 2 * (log_length - log_chunk) + 1,
        ),
    }
    a, x = torch.randn(T), torch.randn(T, width)
    for algorithm, work_and_depth in expected.items():
        cost = count(scan, a, x, algorithm=algorithm, chunk_size=Q if algorithm in CHUNKED else None)
        assert (cost.flops, cost.depth) == work_and_depth, algorithm


def test_costs_count_operations_chains_and_memory():
    def chain(x):
        for _ in range(10):
            x = x * 2 + 1  # each result replaces the one before
        return x

    cost = count(chain, torch.ones(100))
    assert (cost.flops, cost.matmul_flops, cost.depth) == (2000, 0, 20)
    assert 200 <= cost.memory <= 300
    side_by_side = count(lambda x: torch.stack([x.exp(), x.cumsum(0), x / 3]).sum(), torch.ones(16))
    assert (side_by_side.flops, side_by_side.depth) == (16 * 3 + 48, 4 + 6)
    softmax = count(torch.softmax, torch.ones(2, 16), -1)
    assert (softmax.flops, softmax.depth) == (4 * 32, 4 + 3)
    transform = count(torch.fft.fft, torch.ones(3, 16, dtype=torch.complex64))
    assert (transform.flops, transform.depth) == (5 * 48 * 4, 4)
    products = count(lambda x: (x @ x.mT).where(x @ x.mT > 0, 0), torch.ones(4, 8))
    assert products == (2 * 256, 2 * 256, 4, products.memory)


def test_an_unknown_cost_is_an_error():
    with pytest.raises(NotImplementedError, match=r"count knows no cost of aten\..*svd.*; compose it from products"):
        count(torch.linalg.svd, torch.ones(3, 3))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(3), torch.ones(3, 1)), {"algorithm": "quick"}, "algorithm='quick' is none of sequential, fully"),
        ((torch.ones(3), torch.ones(4, 1)), {}, r"a \(3,\) and x \(4, 1\) must be \(..., T\) and \(..., T, width\)"),
        ((torch.ones(3), torch.ones(3, 1)), {"chunk_size": 2}, "'associative' has no chunks; leave chunk_size=2 out"),
        (
            (torch.ones(3), torch.ones(3, 1)),
            {"algorithm": "block_scan", "chunk_size": 0},
            "chunk_size=0 must be at least 1",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        scan(*arguments, **options)
