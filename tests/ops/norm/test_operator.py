"""The operator boundary: registration, tracing, derivatives, FLOPs, selective checkpointing."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dualscan.ops.norm import gated_rms_norm, rms_norm
from dualscan.ops.norm.library import rms_norm_bwd, rms_norm_fwd
from tests.oracle import assert_close

CASES: dict[str, tuple[bool, int, bool]] = {
    "plain": (False, 8, False),
    "gated": (True, 8, False),
    "gated after": (True, 8, True),
    "groups": (True, 4, False),
    "groups, gated after": (True, 4, True),
}


def arguments(gate: bool, group_size: int, before: bool, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    x, z, weight = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((2, 3, 8), (2, 3, 8), (8,)))
    return x, z if gate else None, weight, group_size, before, 1e-5


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case: tuple[bool, int, bool], dtype: torch.dtype):
    results = torch.library.opcheck(rms_norm_fwd, arguments(*case, dtype=dtype))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_opcheck_of_the_backward(case: tuple[bool, int, bool]):
    inputs = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments(*case)]
    assert set(torch.library.opcheck(rms_norm_bwd, (inputs[0], *inputs)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradcheck(case: tuple[bool, int, bool]):
    x, z, weight, *options = arguments(*case)
    if z is None:
        assert torch.autograd.gradcheck(lambda x, w: rms_norm_fwd(x, None, w, *options), (x, weight))
    else:
        assert torch.autograd.gradcheck(lambda x, z, w: rms_norm_fwd(x, z, w, *options), (x, z, weight))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic: bool):
    def step(x, z, weight):
        return rms_norm(gated_rms_norm(x.sin(), z, weight, group_size=4), weight).cos()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for seqlen in (3, 5):
        tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, seqlen, 8), (2, seqlen, 8), 8)]
        actual, expected = compiled(*tensors), step(*tensors)
        assert_close("y", actual, expected, dtype=torch.float64)
        grads = (torch.autograd.grad(y.sum(), tensors) for y in (actual, expected))
        for a, e in zip(*grads, strict=True):
            assert_close("gradient", a, e, dtype=torch.float64, gradient=True)


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(rms_norm(x, torch.ones(8)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(("gate", "forward", "backward"), [(False, 4, 11), (True, 9, 24)])
def test_flops(gate: bool, forward: int, backward: int):
    inputs = arguments(gate, 8, False)
    with FlopCounterMode(display=False) as counter:
        y = rms_norm_fwd(*inputs)
    assert counter.get_total_flops() == forward * y.numel()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), inputs[0])
    assert counter.get_total_flops() == backward * y.numel()


@pytest.mark.parametrize(("keep", "runs"), [(True, 1), (False, 2)])
def test_selective_checkpointing_by_name(keep: bool, runs: int):
    def policy(ctx: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        saved = keep and op == torch.ops.dualscan.rms_norm_fwd.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    x, _, weight, *_ = arguments(False, 8, False)
    with FlopCounterMode(display=False) as counter:
        out = checkpoint(
            lambda: rms_norm(x, weight).sin().sum(),
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
        (dx,) = torch.autograd.grad(out, x)
    assert counter.get_total_flops() == (4 * runs + 11) * x.numel()
    expected = torch.autograd.grad(rms_norm(x, weight).sin().sum(), x)[0]
    assert_close("dx", dx, expected, dtype=torch.float64, gradient=True)
