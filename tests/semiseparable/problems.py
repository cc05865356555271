"""What the tests of semiseparable matrices share: random recurrences and their dense matrices, entry by entry."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from dualscan.semiseparable import SemiseparableMatrix
from tests.oracle import assert_close

DOUBLE, COMPLEX = torch.float64, torch.complex128
KINDS = ("scalar", "diagonal", "dense")
quick = settings(max_examples=25, deadline=None, derandomize=True)
lengths = st.integers(1, 20)
orders = st.integers(1, 5)
kinds = st.sampled_from(KINDS)
dtypes = st.sampled_from([DOUBLE, COMPLEX])


def recurrence(length: int, order: int, kind: str = "scalar", dtype: torch.dtype = DOUBLE, *batch: int):
    """A random recurrence with factors of both signs, and some that forget."""
    matrix = SemiseparableMatrix.random(length, order, kind=kind, dtype=dtype, batch=batch)
    signs = torch.tensor([1.0, -1.0, 1.0, 0.0, 1.0], dtype=dtype).repeat(length)[:length].unsqueeze(-1)
    A = matrix.A * (signs.unsqueeze(-1) if kind == "dense" else signs)
    return SemiseparableMatrix(A, matrix.B, matrix.C)


def entries(matrix: SemiseparableMatrix) -> Tensor:
    """The dense matrix of one recurrence by its definition: C_jᵀ A_j ... A_{i+1} B_i, each a product of its own."""
    A, length = matrix.dense_A(), matrix.shape[-1]
    rows = []
    for j in range(length):
        row = []
        for i in range(length):
            vector = matrix.B[i] if i <= j else torch.zeros_like(matrix.B[i])
            for t in range(i + 1, j + 1):
                vector = A[t] @ vector
            row.append(matrix.C[j] @ vector)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def assert_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    """Equal to the tolerance of float64, in dtype and shape too."""
    assert actual.dtype == expected.dtype, name
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (actual, expected)]
    assert_close(name, *parts, dtype=DOUBLE)
