"""The operator boundary: registration, tracing, derivatives, FLOPs, selective checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dualscan.ops.conv1d import causal_conv1d
from dualscan.ops.conv1d.library import causal_conv1d_bwd, causal_conv1d_fwd
from tests.ops.conv1d.problem import problem
from tests.oracle import assert_close

CASES: dict[str, dict[str, Any]] = {
    "batch": {},
    "plain": {"bias": False, "states": False, "activation": None},
    "one token": {"seqlen": 1},
    "packed": {"lengths": [4, 1, 0, 2]},
    "width 1": {"width": 1},
}


def arguments(**options: Any) -> tuple[Any, ...]:
    p = problem(**options)
    tensors = [p.tensors.get(name) for name in ("x", "weight", "bias", "initial_states")]
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    return *leaves, p.cu_seqlens, p.activation is not None


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case: dict[str, Any], dtype: torch.dtype):
    results = torch.library.opcheck(causal_conv1d_fwd, arguments(dtype=dtype, **case))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


def test_opcheck_of_the_backward():
    x, weight, bias, states, _, silu = (t.detach() if isinstance(t, Tensor) else t for t in arguments())
    inputs = (x, weight, bias, states, None, silu)
    for dfinal in (states, x.new_empty(0)):
        assert set(torch.library.opcheck(causal_conv1d_bwd, (x, dfinal, *inputs)).values()) == {"SUCCESS"}
    torch.library.opcheck(causal_conv1d_bwd, (x, x.new_empty(0), x, weight, None, None, None, silu))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradcheck(case: dict[str, Any]):
    *tensors, cu_seqlens, silu = arguments(channels=3, **{"seqlen": 6, **case})
    present = [t is not None for t in tensors]

    def run(*given: Tensor) -> Any:
        values = iter(given)
        return causal_conv1d_fwd(*(next(values) if p else None for p in present), cu_seqlens, silu)

    assert torch.autograd.gradcheck(run, [t for t in tensors if t is not None])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("lengths", [None, [4, 1, 0, 2]], ids=["batch", "packed"])
def test_compiles_without_a_break(lengths: list[int] | None, dynamic: bool):
    def step(x, weight, bias, states, cu_seqlens):
        y, final = causal_conv1d(x.sin(), weight, bias, activation="silu", initial_states=states, cu_seqlens=cu_seqlens)
        return y.cos(), final.cos()

    def evaluate(run: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Any, ...]) -> list[Tensor]:
        y, final = run(*inputs)
        return [y, final, *torch.autograd.grad(y.sum() + final.sum(), inputs[:4])]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for seqlen in (7, 9):
        inputs = arguments(seqlen=seqlen, lengths=None if lengths is None else [*lengths[:-1], seqlen])[:5]
        for actual, expected in zip(evaluate(compiled, inputs), evaluate(step, inputs), strict=True):
            assert_close("compiled", actual, expected, dtype=torch.float64, gradient=True)


def test_a_gradient_of_one_result_only():
    p = problem()
    states = p.tensors["initial_states"].requires_grad_()
    y, final = p()
    assert (torch.autograd.grad(y.sum(), states, retain_graph=True)[0] != 0).all()
    # Nine tokens push all of a state of three out.
    assert (torch.autograd.grad(final.sum(), states)[0] == 0).all()


def test_a_second_derivative_is_refused():
    p = problem()
    x = p.tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(p().y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_flops():
    p = problem(batch=3, seqlen=10, channels=6, width=4)
    x = p.tensors["x"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = p().y
    forward = 2 * 3 * 10 * 6 * 4
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), x)
    assert counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize(("keep", "runs"), [(True, 1), (False, 2)])
def test_selective_checkpointing_by_name(keep: bool, runs: int):
    def policy(ctx: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        saved = keep and op == torch.ops.dualscan.causal_conv1d_fwd.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    p = problem()
    x = p.tensors["x"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = checkpoint(
            lambda: p().y.sin().sum(),
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
        (dx,) = torch.autograd.grad(out, x)
    forward = 2 * x.numel() * 4
    assert counter.get_total_flops() == (runs + 2) * forward
    assert_close("dx", dx, torch.autograd.grad(p().y.sin().sum(), x)[0], dtype=torch.float64, gradient=True)
