"""Broadcast heads reach the compiled kernels as views without a step: each of them must read what PyTorch reads."""

import pytest
import torch
from torch import Tensor

from dualscan.ops import _numba
from dualscan.ops.sma.heads import expand_heads
from dualscan.ops.ssd import ssd, ssd_step
from tests.oracle import assert_close

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HEADS = 4
# Heads of x, B and C.
SHARED = {"multi-query": (1, 1, 4), "multi-key": (1, 4, 1)}


@pytest.fixture(params=["triton", "numba"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "numba" and (CUDA or _numba.obstacle(DEVICE) is not None):
        pytest.skip("Numba compiles for CPUs, where it is installed")
    if request.param == "triton" and not CUDA:
        request.getfixturevalue("interpreter")
    return request.param


def broadcast(pattern: str, length: int) -> list[Tensor]:
    counts, tensors = SHARED[pattern], []
    groups = max(counts[1:])
    for count, heads, width in zip(counts, (HEADS, groups, groups), (16, 24, 24), strict=True):
        tensors.append(expand_heads(torch.randn(1, length, count, width, device=DEVICE), heads))
    return tensors


@pytest.mark.parametrize("pattern", SHARED)
def test_values_and_gradients(pattern: str, impl: str) -> None:
    x, B, C = broadcast(pattern, 70)
    dt, A = torch.rand(1, 70, HEADS, device=DEVICE), -torch.rand(HEADS, device=DEVICE)
    cotangent = torch.randn(1, 70, HEADS, 16, device=DEVICE)
    results = []
    for form, dtype in ((impl, torch.float32), ("recurrent", torch.float64)):
        # Leaves with the strides of the view.
        leaves = [t.detach().to(dtype) if dtype == torch.float64 else t.detach() for t in (x, dt, A, B, C)]
        for leaf in leaves:
            leaf.requires_grad_()
        y, states = ssd(*leaves, impl=form)
        results.append([y, states, *torch.autograd.grad(y, leaves, cotangent.to(dtype))])
    for name, got, wanted in zip(("y", "states", "dx", "ddt", "dA", "dB", "dC"), *results, strict=True):
        assert_close(name, got, wanted, dtype=torch.float32, gradient=name[0] == "d")


@pytest.mark.parametrize("impl", ["triton"], indirect=True)
@pytest.mark.parametrize("pattern", SHARED)
def test_one_token(pattern: str, impl: str) -> None:
    x, B, C = (t[:, 1] for t in broadcast(pattern, 3))
    state = torch.randn(1, HEADS, 16, 24, device=DEVICE)
    dt, A = torch.rand(1, 3, HEADS, device=DEVICE)[:, 1], -torch.rand(HEADS, device=DEVICE)
    got = ssd_step(state, x, dt, A, B, C, impl=impl)
    wanted = ssd_step(*(t.double() for t in (state, x, dt, A, B, C)), impl="recurrent")
    assert_close("y", got.y, wanted.y, dtype=torch.float32)
    assert_close("state", got.final_states, wanted.final_states, dtype=torch.float32)
