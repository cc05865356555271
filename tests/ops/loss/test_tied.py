"""A tied embedding's gradient, added to the loss's: against PyTorch's own sum of the two, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.ops.loss import linear_cross_entropy
from dualscan.ops.loss.tied import add_rows_, tied_embedding

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
# How often the tokens occur, for blocks of 4 places: runs that begin and end where blocks do, and some of many blocks.
RUNS = {"borders": (4, 8, 2, 2, 12, 1, 3, 4, 5, 6), "long": (3, 14, 1, 9, 20), "crossing": (5,) * 9 + (2,)}


def drawn(kind: str, count: int) -> Tensor:
    """Tokens as a text has them: few often, many once; or in other ways."""
    if kind == "one":
        return torch.full((count,), 5)
    if kind == "once":
        return torch.randperm(50)[:count]
    if kind == "random":
        return torch.randint(50, (count,))
    if kind in RUNS:
        sorted_tokens = torch.arange(len(RUNS[kind])).repeat_interleave(torch.tensor(RUNS[kind]))
        return sorted_tokens[:count][torch.randperm(count)]
    return (50 * torch.rand(count) ** 4).long()


def losses(tokens: Tensor, target: Tensor, weight: Tensor, by_hand: bool, which: str) -> Tensor:
    h, head = (F.embedding(tokens, weight), weight) if by_hand else tied_embedding(tokens, weight)
    hidden = (h * 1.5).sin()
    if which == "rows":
        return hidden.square().sum()
    return linear_cross_entropy(hidden.detach() if which == "head" else hidden, head, target)


@pytest.mark.parametrize("which", ["both", "rows", "head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_is_the_sum_of_both(dtype: torch.dtype, which: str) -> None:
    tokens, target = torch.randint(11, (3, 9)), torch.randint(11, (3, 9))
    weight = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    expected, found = (
        torch.autograd.grad(losses(tokens, target, weight, by_hand, which), weight)[0] for by_hand in (True, False)
    )
    # The same two summands: on a CPU the same bits.
    assert torch.equal(found, expected)


def test_backward_twice_and_accumulation() -> None:
    tokens, target = torch.randint(11, (2, 9)), torch.randint(11, (2, 9))
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(losses(tokens, target, weight, True, "both"), weight)
    loss = losses(tokens, target, weight, False, "both")
    loss.backward(retain_graph=True)
    kept = weight.grad
    assert kept is not None
    torch.testing.assert_close(kept, expected)
    loss.backward()
    losses(tokens, target, weight, False, "both").backward()
    torch.testing.assert_close(weight.grad, 3 * expected)


def test_the_weight_may_not_change_before_the_backward() -> None:
    tokens, target = torch.randint(11, (2, 9)), torch.randint(11, (2, 9))
    weight = torch.randn(11, 6, requires_grad=True)
    loss = losses(tokens, target, weight, False, "both")
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def kernels(request: Any, monkeypatch: Any) -> Any:
    """The kernels' module, with blocks so small that little data has many."""
    pytest.importorskip("triton")
    if not CUDA:
        request.getfixturevalue("interpreter")
    from dualscan.ops.loss import triton_rows

    sizes = {"ROWS": 4, "AT_ONCE": 2, "COLUMNS": 16, "LOOKED": 4, "JOINED": 2, "JOINED_COLUMNS": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(triton_rows, name, size)
    return triton_rows


def check_rows(kernels: Any, total: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """Against float64, and the same bits twice."""
    expected = total.double().index_add(0, tokens, rows.double())
    found = [total.clone() for _ in range(2)]
    for each in found:
        kernels.add_rows_(each, tokens, rows)
    torch.testing.assert_close(found[0], expected.to(total.dtype))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["text", "one", "once"])
@pytest.mark.parametrize("count", [1, 47])
@pytest.mark.parametrize("width", [24, 13, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype: torch.dtype, width: int, count: int, kind: str, kernels: Any) -> None:
    tokens, rows = drawn(kind, count).to(DEVICE), torch.randn(count, width, device=DEVICE).to(dtype)
    check_rows(kernels, torch.randn(50, width, device=DEVICE).to(dtype), tokens, rows)


@pytest.mark.parametrize("kind", ["random", "one", *RUNS])
@pytest.mark.parametrize("count", [3, 4, 5, 32, 47])
def test_runs(count: int, kind: str, kernels: Any) -> None:
    tokens = drawn(kind, count).to(DEVICE, torch.int32)
    check_rows(kernels, torch.randn(50, 10, device=DEVICE), tokens, torch.randn(count, 10, device=DEVICE))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_rows_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype], kernels: Any) -> None:
    tokens, rows = drawn("long", 47).to(DEVICE), torch.randn(47, 10, device=DEVICE).to(dtypes[1])
    check_rows(kernels, torch.randn(50, 10, device=DEVICE).to(dtypes[0]), tokens, rows)


def test_sums_are_in_float32(kernels: Any) -> None:
    # Each alone is less than half a step from 1 to the next float16, and a block's are too.
    rows = torch.full((47, 10), 2.0**-14, dtype=torch.float16, device=DEVICE)
    total = torch.ones(50, 10, dtype=torch.float16, device=DEVICE)
    kernels.add_rows_(total, drawn("one", 47).to(DEVICE), rows)
    assert torch.equal(total[5], torch.full_like(total[5], 1 + 3 * 2**-10))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_is_its_tokens_alone(value: float, kernels: Any) -> None:
    tokens, rows = drawn("crossing", 47).to(DEVICE), torch.randn(47, 10, device=DEVICE)
    rows[7] = value
    total = torch.zeros(50, 10, device=DEVICE)
    kernels.add_rows_(total, tokens, rows)
    assert (~total.isfinite()).nonzero()[:, 0].unique().tolist() == [int(tokens[7])]


@pytest.mark.parametrize("tokens", [torch.int64, torch.int32], ids=str)
def test_any_layout(tokens: torch.dtype) -> None:
    places = torch.randint(20, (3, 8), device=DEVICE).to(tokens).t()
    rows = torch.randn(3, 8, 10, device=DEVICE).transpose(0, 1)
    total = torch.randn(20, 10, device=DEVICE)
    expected = total.double().index_put((places.long(),), rows.double(), accumulate=True)
    assert add_rows_(total, places, rows) is total
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(add_rows_(total.clone(), places[:0], rows[:0]), total)


@pytest.mark.cuda
def test_a_vocabulary_of_a_model() -> None:
    tokens = (50288 * torch.rand(16384, device="cuda") ** 6).long()
    rows, total = torch.randn(16384, 768, device="cuda"), torch.randn(50288, 768, device="cuda")
    expected = total.double().index_put((tokens,), rows.double(), accumulate=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    add_rows_(total, tokens, rows)
    assert torch.cuda.max_memory_allocated() - before < 2**22
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)
