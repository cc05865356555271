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


def drawn(kind: str, count: int) -> Tensor:
    """Tokens as a text has them: few often, many once; or in other ways."""
    if kind == "one":
        return torch.full((count,), 5)
    if kind == "once":
        return torch.randperm(50)[:count]
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


@pytest.mark.parametrize("kind", ["text", "one", "once"])
@pytest.mark.parametrize("count", [1, 47])
@pytest.mark.parametrize("width", [24, 13, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype: torch.dtype, width: int, count: int, kind: str, request: Any, monkeypatch: Any) -> None:
    pytest.importorskip("triton")
    if not CUDA:
        request.getfixturevalue("interpreter")
    from dualscan.ops.loss import triton_rows

    for name, size in (("ROWS", 4), ("COLUMNS", 16)):
        monkeypatch.setattr(triton_rows, name, size)
    tokens, rows = drawn(kind, count).to(DEVICE), torch.randn(count, width, device=DEVICE).to(dtype)
    total = torch.randn(50, width, device=DEVICE).to(dtype)
    expected = total.double().index_put((tokens,), rows.double(), accumulate=True)
    found = [total.clone() for _ in range(2)]
    for each in found:
        triton_rows.add_rows_(each, tokens, rows)
    torch.testing.assert_close(found[0], expected.to(dtype))
    assert torch.equal(*found)


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
