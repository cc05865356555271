"""What the kernels for CPUs share: elementwise functions, products, segments and the two ways of launching."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numba.core import caching

from dualscan.ops import _numba
from dualscan.ops._numba import lanes, launch, product, segments, vector
from dualscan.ops._numba.vector import Kernel, load, share, store
from dualscan.ops.conv1d import causal_conv1d
from tests.strategies import packed


def _exponential(p):
    begin, end, _ = share(p, p[4])
    source, target = vector.float32(p[2]), vector.float32(p[3])
    for i in range(begin, end):
        target[i] = vector.exp(source[i])


def _round_trip(p):
    begin, end, _ = share(p, p[4])
    source, target = vector.float32(p[2]), vector.bfloat16(p[3])
    for i in range(begin, end):
        store(target, i, source[i])


def _widen(p):
    begin, end, _ = share(p, p[4])
    source, target = vector.bfloat16(p[2]), vector.float32(p[3])
    for i in range(begin, end):
        target[i] = load(source, i)


def _worker_numbers(p):
    begin, end, worker = share(p, p[3])
    target = vector.int64(p[2])
    for i in range(begin, end):
        target[i] = worker


def _multiply(p):
    c, a, b = vector.float32(p[2]), vector.float32(p[3]), vector.float32(p[4])
    product.multiply(c, p[6], a, p[8], p[9], b, p[6], p[5], p[6], p[7], p[10])


def _vectors(p):
    source, target = vector.float32(p[2]), vector.float32(p[3])
    a, b = lanes.read(source, 0), lanes.spread(source[1])
    lanes.write(target, 0, lanes.exp(lanes.times_plus(a, b, lanes.times(a, a))))
    target[lanes.LANES] = lanes.total(a)


VECTORS = Kernel(_vectors)
EXPONENTIAL, ROUND_TRIP, WIDEN = Kernel(_exponential), Kernel(_round_trip), Kernel(_widen)
WORKER_NUMBERS, MULTIPLY = Kernel(_worker_numbers), Kernel(_multiply)


def test_vectors_as_values():
    x, y = torch.linspace(-3, 2, lanes.LANES), torch.empty(lanes.LANES + 1)
    VECTORS(x, y, workers=1)
    expected = (x.double() * x[1].double() + x.double().square()).exp()
    assert torch.allclose(y[:-1].double(), expected, rtol=1e-6)
    assert torch.allclose(y[-1], x.sum())


def test_exp_is_right_to_the_last_places():
    x = torch.cat([torch.linspace(-87.3, 88.0, 200_001), torch.linspace(-1e-3, 1e-3, 1001)])
    y = torch.empty_like(x)
    EXPONENTIAL(x, y, len(x), workers=2)
    assert ((y.double() - x.double().exp()) / x.double().exp()).abs().max() < 3e-7


def test_exp_at_the_ends():
    x = torch.tensor([-float("inf"), -1e4, 0.0, 100.0, float("inf"), float("nan")])
    y = torch.empty_like(x)
    EXPONENTIAL(x, y, len(x), workers=1)
    assert (y[:2] > 0).all()
    assert (y[:2] < 1.3e-38).all()
    assert y[2] == 1
    assert torch.isinf(y[3:5]).all()
    assert torch.isnan(y[5])


def test_bfloat16_is_rounded_as_pytorch_rounds_it():
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int64).to(torch.int32)
    specials = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.00390625, 1.01171875, 3.4e38])
    x = torch.cat([bits.view(torch.float32), specials])
    y, back = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    ROUND_TRIP(x, y, len(x), workers=2)
    WIDEN(y, back, len(x), workers=2)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, y.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(8, 16, 1), (64, 64, 64), (16, 48, 37), (128, 80, 5)])
def test_products(rows: int, columns: int, depth: int, transposed: bool):
    a, b = torch.randn(rows, depth), torch.randn(depth, columns)
    held = a.T.contiguous() if transposed else a
    strides = (1, rows) if transposed else (depth, 1)
    c = torch.full((rows, columns), float("nan"))
    MULTIPLY(c, held, b, rows, columns, depth, *strides, 0, workers=1)
    torch.testing.assert_close(c, a @ b)
    MULTIPLY(c, held, b, rows, columns, depth, *strides, 1, workers=1)
    torch.testing.assert_close(c, 2 * (a @ b))


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("openmp", [True, False])
def test_every_item_is_done_once(workers: int, openmp: bool, monkeypatch: pytest.MonkeyPatch):
    if openmp and launch._OPENMP is None:
        pytest.skip("PyTorch brings no OpenMP runtime here")
    if not openmp:
        monkeypatch.setattr(launch, "_OPENMP", None)
    numbers = torch.full((103,), -1, dtype=torch.int64)
    WORKER_NUMBERS(numbers, len(numbers), workers=workers)
    assert (numbers.diff() >= 0).all()
    assert numbers.unique().tolist() == list(range(workers))


def test_the_thread_pool_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    x, weight = torch.randn(3, 400, 40), torch.randn(40, 4)
    expected = causal_conv1d(x, weight, impl="numba").y
    monkeypatch.setattr(launch, "_OPENMP", None)
    assert torch.equal(causal_conv1d(x, weight, impl="numba").y, expected)


def test_segments_of_packed_sequences():
    table, blocks = segments.table(1, 10, packed([0, 3, 7, 0]), 4)
    assert table.tolist() == [[0, 0, 0, 0], [0, 0, 3, 1], [0, 3, 7, 2], [0, 10, 0, 4]]
    assert blocks == 5
    found = [segments.sequence_of.py_func(table.view(-1).tolist(), len(table), block, 0) for block in range(blocks)]
    assert found == [0, 1, 2, 2, 3]


def test_without_numba_the_portable_form_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    x, weight = torch.randn(1, 9, 4), torch.randn(4, 2)
    with pytest.raises(ValueError, match="NUMBA_DISABLE_JIT is set"):
        causal_conv1d(x, weight, impl="numba")
    assert torch.equal(causal_conv1d(x, weight).y, causal_conv1d(x, weight, impl="chunked").y)
    assert "cpu" in str(_numba.obstacle(torch.device("meta"))).lower()


def test_the_default_dtype_does_not_matter():
    x, weight = torch.randn(2, 70, 8), torch.randn(8, 4)
    expected = causal_conv1d(x, weight, impl="numba").y
    torch.set_default_dtype(torch.float64)
    try:
        assert np.array_equal(causal_conv1d(x, weight, impl="numba").y, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def _increment(p):
    vector.int64(p[2])[0] += 1


def test_where_nothing_can_be_written_kernels_are_compiled_each_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    count = torch.zeros(1, dtype=torch.int64)
    Kernel(_increment)(count, workers=1)
    assert count.item() == 1


def test_machine_code_older_than_a_source_is_dropped(tmp_path: Path):
    kept = tmp_path / "ssd" / "__pycache__" / "kernel.nbi"
    kept.parent.mkdir(parents=True)
    source = tmp_path / "shared.py"
    for path in (source, kept):
        path.write_text("", encoding="utf-8")
    os.utime(source, (100, 100))
    os.utime(kept, (200, 200))
    vector.forget_stale_code(tmp_path)
    assert kept.exists()
    os.utime(source, (300, 300))
    vector.forget_stale_code(tmp_path)
    assert not kept.exists()
