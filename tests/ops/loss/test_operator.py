"""The operator boundary: registration, tracing, derivatives, FLOPs, error messages."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualscan.ops.loss import linear_cross_entropy
from dualscan.ops.loss.library import (
    linear_cross_entropy_fwd,
    linear_cross_entropy_grad,
    linear_cross_entropy_scale_,
)
from tests.ops.loss.problem import problem
from tests.oracle import assert_close


def arguments(scale: bool, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    tensors, target, _ = problem(shape=(5,), d=4, vocab=6, bias=bias, dtype=dtype)
    leaves = [tensors[name].requires_grad_() if name in tensors else None for name in ("x", "weight", "bias")]
    target[2] = -1
    weight = torch.rand((), dtype=torch.float64 if dtype == torch.float64 else torch.float32) if scale else None
    return *leaves, target, weight, -1, 0.1, 0.2, False


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(scale: bool, bias: bool, dtype: torch.dtype):
    given = arguments(scale, bias, dtype)
    results = torch.library.opcheck(linear_cross_entropy_fwd, given)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4
    x, weight, b, target, _, *options = (t.detach() if isinstance(t, Tensor) else t for t in given)
    for weights in (torch.rand(5), torch.rand(())):
        results = torch.library.opcheck(linear_cross_entropy_grad, (weights, x, weight, b, target, *options))
        assert set(results.values()) == {"SUCCESS"}
    results = torch.library.opcheck(linear_cross_entropy_scale_, (weight, torch.tensor(2.0), False))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_gradcheck(scale: bool, bias: bool):
    x, weight, b, *rest = arguments(scale, bias)
    leaves = (x, weight) if b is None else (x, weight, b)

    def run(x: Tensor, weight: Tensor, b: Tensor | None = None) -> Tensor:
        return linear_cross_entropy_fwd(x, weight, b, *rest)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_break(reduction: Any, dynamic: bool):
    def step(x, weight, target):
        return linear_cross_entropy(x.sin(), weight, target, reduction=reduction, z_loss=0.1).cos().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tokens in (5, 9):
        tensors, target, _ = problem(shape=(2, tokens))
        leaves = [t.requires_grad_() for t in tensors.values()]
        actual, expected = (run(tensors["x"], tensors["weight"], target) for run in (compiled, step))
        assert_close("loss", actual, expected, dtype=torch.float64)
        for a, e in zip(*(torch.autograd.grad(loss, leaves) for loss in (actual, expected)), strict=True):
            assert_close("gradient", a, e, dtype=torch.float64, gradient=True)


def test_a_second_derivative_is_refused():
    tensors, target, _ = problem()
    x = tensors["x"].requires_grad_()
    loss = linear_cross_entropy(x, tensors["weight"], target).square()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(("reduction", "backward"), [("mean", 0), ("none", 3)])
def test_flops(reduction: Any, backward: int):
    tensors, target, _ = problem(shape=(10,), d=4, vocab=6)
    product = 2 * 10 * 4 * 6
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(**tensors, target=target, reduction=reduction)
    assert counter.get_total_flops() == product
    leaves = [t.requires_grad_() for t in tensors.values()]
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(**tensors, target=target, reduction=reduction)
        forward = counter.get_total_flops()
        torch.autograd.grad(loss.sum(), leaves)
    assert forward == (3 - 2 * (reduction == "none")) * product
    assert counter.get_total_flops() - forward == backward * product


def test_autocast_leaves_it_in_its_own_precision():
    tensors, target, _ = problem(dtype=torch.float32)
    expected = linear_cross_entropy(**tensors, target=target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_cross_entropy(**tensors, target=target), expected)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x": ({"x": torch.zeros(())}, ValueError, r"x has no dimension"),
    "weight": ({"weight": torch.zeros(5, 3)}, ValueError, r"weight has shape \(5, 3\); expected \(vocab, d=4\)"),
    "target": ({"target": torch.zeros(3).long()}, ValueError, r"target has shape \(3,\)"),
    "target dtype": ({"target": torch.zeros(2)}, TypeError, r"target has dtype torch.float32; use torch.int64"),
    "target value": ({"target": torch.tensor([0, 5])}, ValueError, r"target 5 is not in 0 to 4 .* ignore_index=-100"),
    "bias": ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\); expected \(vocab=5,\)"),
    "dtype": ({"bias": torch.zeros(5).long()}, TypeError, r"bias has dtype torch.int64; use a floating-point"),
    "device": ({"weight": torch.zeros(5, 4, device="meta")}, ValueError, r"weight is on meta, x on cpu; move it"),
    "z_loss": ({"z_loss": -1.0}, ValueError, r"z_loss=-1.0 is negative"),
    "label_smoothing": ({"label_smoothing": 1.5}, ValueError, r"label_smoothing=1.5 is not in 0 to 1"),
    "reduction": ({"reduction": "max"}, ValueError, r"reduction='max' does not exist; use one of 'mean', 'sum'"),
    "impl": ({"impl": "quadratic"}, ValueError, r"impl='quadratic' does not exist"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_messages(case: tuple[dict[str, Any], type[Exception], str]):
    changed, error, message = case
    good = {"x": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "target": torch.zeros(2).long()}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**good, **changed})
