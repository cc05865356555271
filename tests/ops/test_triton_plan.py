"""The tables of a packed batch: one launch gives what PyTorch does, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualscan.ops import _triton
from tests.strategies import packed

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    pytestmark = pytest.mark.usefixtures("interpreter")

NAMES = ("segments", "sequences", "chunks", "supers")
# (chunk, chunks a super-chunk, super-chunks a segment)
SIZES = [(16, 1, 1), (16, 1, 3), (16, 4, 1), (16, 4, 2), (64, 2, 1000)]
# Many short sequences, a few long ones, runs of empty ones.
LENGTHS = st.one_of(
    st.lists(st.integers(0, 40), min_size=1, max_size=30),
    st.lists(st.sampled_from([0, 1, 15, 16, 17, 64, 300]), min_size=1, max_size=12),
    st.integers(1, 700).map(lambda length: [length]),
).filter(any)


def check(lengths: list[int], chunk: int, every: int, supers: int) -> None:
    from dualscan.ops.triton_plan import packed_tables

    call = (packed(lengths).to(DEVICE), sum(lengths), chunk, every, chunk * every * supers)
    for name, actual, expected in zip(NAMES, packed_tables(*call), _triton.packed_tables(*call), strict=True):
        assert actual.dtype == expected.dtype == torch.int32, name
        assert torch.equal(actual, expected), name
        # As a tensor of its own: kernels are compiled for aligned pointers.
        assert actual.is_contiguous(), name
        assert actual.data_ptr() % 16 == 0, name


@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip
@given(LENGTHS, st.sampled_from(SIZES))
def test_tables(lengths: list[int], sizes: tuple[int, int, int]) -> None:
    from dualscan.ops import triton_plan

    # Small tiles: a table takes several programs, and a program several turns.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_plan, "TILE", (16, 8))
        check(lengths, *sizes)


@pytest.mark.parametrize(
    "lengths",
    [[1], [200], [0] * 63 + [5], [3] * 64, [0, 7] * 40, [90] + [0] * 520, [1] * 515 + [80]],
    ids=lambda lengths: f"{len(lengths)} of {sum(lengths)} tokens",
)
def test_tiles_of_the_gpu(lengths: list[int]) -> None:
    check(lengths, 64, 2, 1)


@pytest.mark.parametrize("lengths", [[70, 0, 33, 1, 130], [0, 0, 3]], ids=str)
def test_programs_write_their_own(lengths: list[int]) -> None:
    """In the emulator, which checks bounds and that no program touches what another has written."""
    from dualscan.ops.triton_plan import plan_kernel
    from tests import gluon

    call = (packed(lengths), sum(lengths), 16, 2, 64)
    expected = _triton.packed_tables(*call)
    tables = [torch.full_like(t, -7) for t in expected]
    nsegments, nseq, nchunks, nsupers = (t.shape[0] for t in tables)
    sizes = (nseq, nsegments, nchunks, nsupers, 64, 16, 32)
    gluon.run(plan_kernel, (-(-nchunks // 8), 3), (call[0], *tables, *sizes), ROWS=8, SEQUENCES=2)
    for name, actual, table in zip(NAMES, tables, expected, strict=True):
        assert torch.equal(actual, table), name


@pytest.mark.cuda
def test_captured_tables_follow_the_boundaries() -> None:
    bounds, later = packed([70, 0, 33, 1, 130]).to(DEVICE), packed([0, 200, 30, 4, 0]).to(DEVICE)
    call = (234, 16, 2, 64)
    _triton.packed_plan(bounds, *call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = _triton.plan(bounds, 1, *call, bounds.device)
    bounds.copy_(later)
    graph.replay()
    for name, expected in zip(NAMES, _triton.packed_tables(later, *call), strict=True):
        assert torch.equal(getattr(plan, name), expected), name
