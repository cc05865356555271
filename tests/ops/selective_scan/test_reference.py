"""The recurrence itself: against a sum written out from the definition, against SSD, and its own gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.ops.selective_scan import selective_scan_step
from dualscan.ops.ssd import ssd
from tests.ops.selective_scan.problems import scan_problem
from tests.oracle import assert_close


def written_out(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y_t = Σ_{s ≤ t} Σ_n C_t[n] exp(A[n] Σ_{s < r ≤ t} Δ_r) B_s[n] Δ_s x_s: no state, no recurrence."""
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for s in range(t + 1):
            elapsed = dt[:, s + 1 : t + 1].sum(1)
            kernel = (C[:, t, None] * torch.exp(elapsed.unsqueeze(-1) * A) * B[:, s, None]).sum(-1)
            y[:, t] += kernel * dt[:, s] * x[:, s]
    return y


def test_is_the_kernel_of_the_definition() -> None:
    problem = scan_problem(seqlen=9, dtype=torch.float64)
    assert_close("y", problem(impl="recurrent").y, written_out(**problem.tensors), dtype=torch.float64)


def test_bias_softplus_skip_and_gate() -> None:
    problem = scan_problem(seqlen=9, dtype=torch.float64, D=True, z=True, dt_bias=True)
    t = problem.tensors
    delta = F.softplus(t["dt"] + t["dt_bias"])
    expected = (written_out(t["x"], delta, t["A"], t["B"], t["C"]) + t["D"] * t["x"]) * F.silu(t["z"])
    assert_close("y", problem(impl="recurrent").y, expected, dtype=torch.float64)


def test_gradients_are_those_of_the_definition() -> None:
    problem = scan_problem(seqlen=7, dtype=torch.float64)
    leaves = [t.detach().requires_grad_() for t in problem.tensors.values()]
    run = problem.having(**dict(zip(problem.tensors, leaves, strict=True)))
    actual = torch.autograd.grad(run(impl="recurrent").y, leaves, problem.dy)
    expected = torch.autograd.grad(written_out(*leaves), leaves, problem.dy)
    for name, mine, other in zip(problem.tensors, actual, expected, strict=True):
        assert_close(f"d{name}", mine, other, dtype=torch.float64, gradient=True)


@pytest.mark.parametrize("impl", ["auto", "recurrent"])
def test_is_ssd_where_a_head_shares_its_decay(impl: str) -> None:
    """A equal across the states, Δ and A shared by the channels of a head: S6 is SSD, exactly."""
    batch, seqlen, nheads, headdim, ngroups, d_state = 2, 15, 4, 3, 2, 5
    double = {"dtype": torch.float64}
    x, z = torch.randn(2, batch, seqlen, nheads, headdim, **double)
    dt, rate = torch.rand(batch, seqlen, nheads, **double), -torch.rand(nheads, **double)
    B, C = torch.randn(2, batch, seqlen, ngroups, d_state, **double)
    D, start = torch.randn(nheads, headdim, **double), torch.randn(batch, nheads, headdim, d_state, **double)
    expected = ssd(x, dt, rate, B, C, D=D, z=z, initial_states=start, impl="recurrent")
    problem = scan_problem(dtype=torch.float64).having(
        x=x.flatten(2),
        dt=dt.repeat_interleave(headdim, -1),
        A=rate.repeat_interleave(headdim).unsqueeze(-1).expand(-1, d_state),
        B=B,
        C=C,
        D=D.flatten(),
        z=z.flatten(2),
        initial_states=start.flatten(1, 2),
    )
    y, states = problem(impl=impl)
    assert_close("y", y.view(x.shape), expected.y, dtype=torch.float64)
    assert_close("states", states.view(start.shape), expected.final_states, dtype=torch.float64)


def test_a_step_of_zero_is_no_step() -> None:
    problem = scan_problem(seqlen=5, states=True)
    final = problem.having(dt=torch.zeros_like(problem.tensors["dt"]))().final_states
    assert torch.equal(final, problem.tensors["initial_states"])


@pytest.mark.parametrize("ngroups", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_steps_are_the_sequence(dtype: torch.dtype, ngroups: int | None) -> None:
    problem = scan_problem(dtype=dtype, D=True, z=True, dt_bias=True, states=True, ngroups=ngroups)
    t, (whole, last) = problem.tensors, problem(impl="recurrent")
    state, ys = t["initial_states"], []
    shared = {"A": t["A"], "D": t["D"], "dt_bias": t["dt_bias"], "dt_softplus": True}
    for i in range(t["x"].shape[1]):
        before = state.clone()
        token = {name: t[name][:, i] for name in ("x", "dt", "B", "C", "z")}
        y, after = selective_scan_step(state, **token, **shared)
        assert torch.equal(state, before)
        assert y.dtype == dtype
        state = after
        ys.append(y)
    assert_close("y", torch.stack(ys, 1), whole.double(), dtype=dtype)
    assert_close("state", state, last.double(), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
