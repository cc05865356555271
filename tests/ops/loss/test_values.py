"""The loss against PyTorch's cross-entropy over all logits at once, in float64: values, gradients and properties."""

from typing import Any

import pytest
import torch

from dualscan.ops.loss import chunked, linear_cross_entropy, torch_softmax
from tests.ops.loss.problem import CORNERS, by_pytorch, compare, evaluate, problem
from tests.oracle import assert_close


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("corner", CORNERS.values(), ids=CORNERS)
def test_matches_pytorch(corner: dict[str, Any], impl: str):
    compare(*problem(**corner), impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("corner", ["plain", "everything", "everything, none"])
def test_lower_precision(corner: str, dtype: torch.dtype):
    # Small logits: bfloat16 rounds them before the softmax.
    tensors, target, options = problem(**CORNERS[corner], dtype=dtype)
    tensors["x"] *= 0.2
    compare(tensors, target, options)


def test_float32_weights_serve_bfloat16_inputs():
    tensors, target, options = problem(dtype=torch.bfloat16)
    tensors["weight"] = tensors["weight"].float()  # no more digits than before: the products are in bfloat16
    tensors["x"] *= 0.2
    compare(tensors, target, options)


@pytest.mark.parametrize("corner", ["plain", "everything", "everything, none"])
@pytest.mark.parametrize("tokens", [1, 40, 1000])
def test_slices_do_not_matter(corner: str, tokens: int, monkeypatch: pytest.MonkeyPatch):
    for name in ("SLICE_FORWARD", "SLICE"):
        monkeypatch.setattr(chunked, name, (tokens, 0))
    compare(*problem(shape=(5, 30), **CORNERS[corner]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parts_do_not_matter(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    tensors, target, options = problem(**CORNERS["everything"], dtype=dtype)
    expected = evaluate(linear_cross_entropy, tensors, target, options)
    monkeypatch.setattr(torch_softmax, "PART", 5 * 37)
    found = evaluate(linear_cross_entropy, tensors, target, options)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sums_of_bfloat16_weights_are_rounded_a_few_times(monkeypatch: pytest.MonkeyPatch):
    """However many tokens there are."""
    monkeypatch.setattr(chunked, "SLICE_LOW", (4, 0))
    sums, real = [], chunked._add_product
    monkeypatch.setattr(chunked, "_add_product", lambda *args, **first: (sums.append(args[0]), real(*args, **first)))
    tensors, target, options = problem(shape=(40, 200), vocab=64, dtype=torch.bfloat16)
    tensors["x"] *= 0.2
    compare(tensors, target, options)
    assert 8 < len(sums) <= chunked.MOST_ROUNDINGS
    assert sums[0].dtype == torch.bfloat16


def test_pieces_cover_everything_once():
    for tokens, most in ((0, 5), (1, 1), (1000, 300), (16384, 2668), (16384, 1024), (2432, 667), (38, 1), (5000, 1024)):
        found = list(chunked.pieces(tokens, most))
        assert [t for piece in found for t in range(piece.start, piece.stop)] == list(range(tokens))
        assert all(piece.stop - piece.start <= most for piece in found)
        assert len(found) == -(-tokens // most)


def test_a_small_mean_survives_float16():
    """1 / tokens of a small probability is below float16's smallest number."""
    tensors, target, options = problem(shape=(4096,), d=8, vocab=512, dtype=torch.float16)
    compare(tensors, target, options)


def test_a_second_backward_of_one_graph():
    tensors, target, options = problem(bias=True)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    loss = linear_cross_entropy(**leaves, target=target, **options)
    first = torch.autograd.grad(loss, list(leaves.values()), torch.tensor(2.0).double(), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, list(leaves.values()), torch.tensor(3.0).double())
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, c)
        assert_close("second", b, 1.5 * a, dtype=torch.float64, gradient=True)


def test_ignored_tokens_have_no_influence():
    tensors, target, options = problem(reduction="none")
    found = evaluate(linear_cross_entropy, tensors, target, options)
    out = target == -100
    assert (found["loss"][out] == 0).all()
    assert (found["dx"][out] == 0).all()
    changed = {**tensors, "x": torch.where(out[..., None], 7.0, tensors["x"])}
    again = evaluate(linear_cross_entropy, changed, target, options)
    assert torch.equal(again["dweight"], found["dweight"])


def test_mean_of_nothing_is_nan():
    tensors, target, _ = problem()
    target.fill_(-100)
    assert linear_cross_entropy(**tensors, target=target).isnan()
    assert linear_cross_entropy(**tensors, target=target, reduction="sum") == 0
    found = evaluate(linear_cross_entropy, tensors, target, {})
    assert not found["dx"].any()
    assert not found["dweight"].any()


@pytest.mark.parametrize("cotangent", [1.0, 3.0])
def test_a_cotangent_scales(cotangent: float):
    tensors, target, options = problem(bias=True)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    expected = torch.autograd.grad(by_pytorch(**leaves, target=target, **options), list(leaves.values()))
    loss = linear_cross_entropy(**leaves, target=target, **options)
    for a, e in zip(torch.autograd.grad(cotangent * loss, list(leaves.values())), expected, strict=True):
        assert_close("gradient", a, cotangent * e, dtype=torch.float64, gradient=True)


def test_a_bias_of_minus_infinity_leaves_an_entry_out():
    tensors, target, _ = problem(vocab=40)
    target.clamp_(max=36)
    bias = torch.zeros(40, dtype=torch.float64)
    bias[37:] = float("-inf")
    whole = linear_cross_entropy(**tensors, target=target, bias=bias)
    assert_close("loss", whole, by_pytorch(tensors["x"], tensors["weight"][:37], target), dtype=torch.float64)


def test_logits_are_never_all_there(monkeypatch: pytest.MonkeyPatch):
    """The largest allocation is that of one slice."""
    monkeypatch.setattr(chunked, "SLICE", (16, 0))
    largest, real = [0], torch.mm

    def product(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(*args, **kwargs)
        largest.append(out.numel() if out.shape[-1] == 100 else 0)
        return out

    monkeypatch.setattr(torch, "mm", product)
    tensors, target, _ = problem(shape=(400,), vocab=100)
    evaluate(linear_cross_entropy, tensors, target, {})
    assert 0 < max(largest) <= 16 * 100
