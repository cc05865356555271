"""The three forms against the float64 recurrence: values and every gradient, over the corners of the contract."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from dualscan.ops.ssd import linear_attention, ssd, ssd_step
from tests.oracle import assert_close
from tests.strategies import Problem, assert_matches, attention_problem, evaluate, packed, ssd_problem

SSD_CORNERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "D scalar": {"D": "scalar"},
    "D vector": {"D": "vector", "ngroups": 4},
    "gate": {"z": True},
    "bias and softplus": {"dt_bias": True},
    "limit": {"dt_bias": True, "dt_limit": (0.2, 0.9)},
    "states": {"states": True},
    "everything": {"D": "vector", "z": True, "dt_bias": True, "dt_limit": (0.01, 2.0), "states": True, "seqlen": 37},
    "everything packed": {
        "D": "scalar",
        "z": True,
        "dt_bias": True,
        "states": True,
        "lengths": [1, 0, 33, 7, 1, 16, 0],
    },
    "one group": {"ngroups": 1, "states": True},
    "a group a head": {"ngroups": 4, "states": True},
    "one head": {"nheads": 1, "ngroups": 1},
    "odd sizes": {"nheads": 3, "ngroups": 3, "headdim": 5, "d_state": 7, "seqlen": 29, "states": True},
    "size 1": {"nheads": 2, "ngroups": 1, "headdim": 1, "d_state": 1, "seqlen": 21, "D": "vector"},
    "shorter than a chunk": {"seqlen": 5, "states": True},
    "one token": {"seqlen": 1, "states": True, "D": "scalar"},
    "one token, no state": {"seqlen": 1},
    "one more than a chunk": {"seqlen": 17, "states": True},
    "no tokens": {"seqlen": 0, "states": True, "D": "scalar"},
    "no batch": {"batch": 0, "states": True, "D": "scalar"},
    "equal packs": {"lengths": [12, 12, 12], "states": True},
    "single tokens packed": {"lengths": [1, 1, 1, 1], "states": True},
    "empty packs": {"lengths": [0, 0, 0], "states": True},
    "no packs": {"lengths": [], "states": True},
    "one pack": {"lengths": [23]},
    "more rows than fit the cache": {
        "batch": 14,
        "nheads": 8,
        "headdim": 64,
        "seqlen": 20,
        "d_state": 4,
        "states": True,
    },
    "more packs than fit the cache": {"lengths": [20] * 14, "nheads": 8, "headdim": 64, "d_state": 4, "states": True},
    "fast decay": {"decay": 1e4, "states": True},
    "slow decay": {"decay": 1e-6, "states": True},
}

ATTENTION_CORNERS: dict[str, dict[str, Any]] = {
    "no decay": {"decay": None},
    "no decay, states": {"decay": None, "states": True},
    "decay": {},
    "scale": {"scale": 0.25, "states": True},
    "normalized": {"normalize": True, "states": True},
    "resets": {"resets": True, "states": True, "decay": 3.0},
    "resets packed": {"resets": True, "states": True, "lengths": [9, 0, 1, 22, 5]},
    "only resets": {"decay": math.inf, "states": True},
    "steep": {"decay": 600.0, "states": True},
}


def compare(problem: Problem, dtype: torch.dtype, **options: Any) -> None:
    oracle = evaluate(problem.double(), impl="recurrent")
    # The oracle itself computes in float64: as a yardstick it would allow no error at all.
    yardstick = None if dtype == torch.float64 else evaluate(problem, impl="recurrent")
    assert_matches(evaluate(problem, **options), oracle, dtype=dtype, yardstick=yardstick)


@pytest.mark.parametrize("impl", ["numba", "chunked", "quadratic"])
@pytest.mark.parametrize("corner", SSD_CORNERS)
def test_ssd_equals_the_recurrence(corner: str, impl: str) -> None:
    compare(ssd_problem(**SSD_CORNERS[corner]), torch.float32, impl=impl, chunk_size=16)


@pytest.mark.parametrize("impl", ["numba", "chunked", "quadratic"])
@pytest.mark.parametrize("corner", ATTENTION_CORNERS)
def test_linear_attention_equals_the_recurrence(corner: str, impl: str) -> None:
    compare(attention_problem(**ATTENTION_CORNERS[corner]), torch.float32, impl=impl, chunk_size=16)


@pytest.mark.parametrize("impl", ["auto", "chunked", "quadratic"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("corner", ["everything", "everything packed"])
def test_other_dtypes(corner: str, dtype: torch.dtype, impl: str) -> None:
    compare(ssd_problem(**SSD_CORNERS[corner], dtype=dtype), dtype, impl=impl)
    compare(attention_problem(resets=True, states=True, dtype=dtype), dtype, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_result_dtypes(dtype: torch.dtype) -> None:
    for problem in (ssd_problem(dtype=dtype, states=True, D="scalar"), attention_problem(dtype=dtype, states=True)):
        for impl in ("auto", "chunked", "recurrent", "quadratic"):
            result = evaluate(problem, impl=impl)
            assert result["y"].dtype == dtype
            assert result["final_states"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            for name, t in problem.tensors.items():
                assert result[f"d{name}"].dtype == t.dtype, name


@pytest.mark.parametrize("impl", ["numba", "chunked", "recurrent", "quadratic"])
@pytest.mark.parametrize("lengths", [None, [7, 0, 20, 1]])
def test_gradient_through_the_final_states_only(impl: str, lengths: list[int] | None) -> None:
    problem = ssd_problem(states=True, D="scalar", seqlen=28, lengths=lengths)
    oracle = evaluate(problem.double(), through=("final_states",), impl="recurrent")
    assert oracle["dinitial_states"].abs().sum() > 0
    result = evaluate(problem, through=("final_states",), impl=impl, chunk_size=8)
    assert_matches(result, oracle, dtype=torch.float32)
    # C and D read the state out; they have no part in it.
    assert not result["dC"].any()
    assert not result["dD"].any()


def brute_force(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """y = M x with the semiseparable matrix M of every head written out entry by entry, in numpy."""
    x, dt, A, B, C = (problem.tensors[name].double().numpy() for name in ("x", "dt", "A", "B", "C"))
    start = problem.tensors["initial_states"].double().numpy()
    batch, seqlen, nheads, _ = x.shape
    y, final = np.zeros_like(x), np.zeros_like(start)
    for b, h in np.ndindex(batch, nheads):
        g = h // (nheads // B.shape[2])
        for i in range(seqlen):
            for j in range(i + 1):
                decay = math.exp(A[h] * dt[b, j + 1 : i + 1, h].sum())
                y[b, i, h] += (C[b, i, g] @ B[b, j, g]) * decay * dt[b, j, h] * x[b, j, h]
            y[b, i, h] += math.exp(A[h] * dt[b, : i + 1, h].sum()) * (start[b, h] @ C[b, i, g])
        final[b, h] = math.exp(A[h] * dt[b, :, h].sum()) * start[b, h]
        for j in range(seqlen):
            decay = math.exp(A[h] * dt[b, j + 1 :, h].sum())
            final[b, h] += decay * dt[b, j, h] * np.outer(x[b, j, h], B[b, j, g])
    return y, final


@pytest.mark.parametrize("impl", ["recurrent", "quadratic", "chunked"])
def test_forms_equal_the_dense_semiseparable_matrix(impl: str) -> None:
    problem = ssd_problem(seqlen=19, headdim=3, d_state=5, states=True, dtype=torch.float64)
    y, final = brute_force(problem)
    result = problem(impl=impl, chunk_size=4)
    assert_close("y", result.y, torch.from_numpy(y), dtype=torch.float64)
    assert_close("final_states", result.final_states, torch.from_numpy(final), dtype=torch.float64)


@pytest.mark.parametrize("impl", ["recurrent", "quadratic", "chunked"])
def test_options_mean_what_they_say(impl: str) -> None:
    problem = ssd_problem(D="vector", z=True, dt_bias=True, dtype=torch.float64, dt_limit=(0.3, 1.1), states=True)
    t = problem.tensors
    step = torch.log1p(torch.exp(t["dt"] + t["dt_bias"])).clip(0.3, 1.1)
    assert (step == 0.3).any()
    assert (step == 1.1).any()
    core = ssd(t["x"], step, t["A"], t["B"], t["C"], initial_states=t["initial_states"], impl="recurrent")
    expected = (core.y + t["D"] * t["x"]) * t["z"] * torch.sigmoid(t["z"])
    assert_close("y", problem(impl=impl).y, expected, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_sizes_of_any_magnitude(dtype: torch.dtype) -> None:
    """Softplus from where it vanishes to where it is the identity; its derivative is the sigmoid."""
    dt = torch.tensor([-1e30, -800, -100, -20, -1, 0, 1, 19, 20.5, 39, 40, 41, 300, 1e30], dtype=dtype)
    leaf = dt.view(1, -1, 1).clone().requires_grad_()
    one = torch.ones(1, len(dt), 1, 1, dtype=dtype)
    # Without decay and with a C that reads the newest token alone, y is the step size.
    tokens = torch.eye(len(dt), dtype=dtype).view(1, len(dt), 1, -1)
    y = ssd(one, leaf, torch.zeros(1, dtype=one.dtype), tokens, tokens, dt_softplus=True).y
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    wide = dt.double()
    pairs = ((y.flatten(), torch.logaddexp(wide, torch.zeros_like(wide))), (slope.flatten(), wide.sigmoid()))
    for value, exact in pairs:
        for i in range(len(dt)):
            # Below the dtype's range every answer is right that is not larger.
            if exact[i] < torch.finfo(dtype).tiny:
                assert 0 <= value[i] < torch.finfo(dtype).tiny
            else:
                assert_close(f"dt={dt[i]}", value[i], exact[i], dtype=dtype)


@pytest.mark.parametrize("impl", ["numba", "chunked", "quadratic"])
def test_inputs_may_have_any_strides(impl: str) -> None:
    batch, seqlen, nheads, headdim, ngroups, d_state = 2, 21, 4, 6, 2, 5
    wide = torch.randn(batch, seqlen, nheads * headdim + 2 * ngroups * d_state + nheads)
    x, B, C, dt = wide.split([nheads * headdim, ngroups * d_state, ngroups * d_state, nheads], dim=-1)
    columns = ssd_problem(
        batch=batch,
        seqlen=seqlen,
        nheads=nheads,
        headdim=headdim,
        ngroups=ngroups,
        d_state=d_state,
        states=True,
        D="vector",
    ).having(
        x=x.unflatten(-1, (nheads, headdim)),
        dt=dt.abs(),
        B=B.unflatten(-1, (ngroups, d_state)),
        C=C.unflatten(-1, (ngroups, d_state)),
    )
    transposed = columns.having(
        x=columns.tensors["x"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        dt=columns.tensors["dt"].transpose(1, 2).contiguous().transpose(1, 2),
        initial_states=columns.tensors["initial_states"].mT.contiguous().mT,
        D=columns.tensors["D"].T.contiguous().T,
    )
    expanded = columns.having(
        x=torch.randn(1, seqlen, 1, headdim).expand(batch, seqlen, nheads, headdim),
        dt=torch.rand(1, 1, 1).expand(batch, seqlen, nheads),
        B=torch.randn(batch, 1, 1, d_state).expand(batch, seqlen, ngroups, d_state),
        D=torch.randn(1, 1).expand(nheads, headdim),
        A=-torch.rand(1).expand(nheads),
        initial_states=torch.randn(1, 1, headdim, d_state).expand(batch, nheads, headdim, d_state),
    )
    for problem in (columns, transposed, expanded):
        assert not problem.tensors["x"].is_contiguous()
        contiguous = problem.having(**{name: t.contiguous() for name, t in problem.tensors.items()})
        expected = evaluate(contiguous.double(), impl="recurrent")
        assert_matches(evaluate(problem, impl=impl, chunk_size=8), expected, dtype=torch.float32)


def test_cotangents_may_have_any_strides() -> None:
    problem = ssd_problem(states=True)
    expected = evaluate(problem, chunk_size=8)
    strided = Problem(
        problem.face,
        problem.tensors,
        problem.dy.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        problem.dfinal.mT.contiguous().mT,
    )
    assert_matches(evaluate(strided, chunk_size=8), expected, dtype=torch.float32)


@pytest.mark.parametrize("impl", ["numba", "chunked", "recurrent", "quadratic"])
@pytest.mark.parametrize("seqlen", [1, 30])
def test_a_reset_forgets_exactly(impl: str, seqlen: int) -> None:
    """A log-decay of -inf: what is before has no influence, no gradient, and makes no NaN."""
    cut = seqlen // 2
    problem = attention_problem(seqlen=seqlen, states=True)
    problem.tensors["log_decay"][:, cut] = -math.inf
    wild = {name: problem.tensors[name].clone() for name in ("k", "v", "initial_states")}
    wild["k"][:, :cut], wild["v"][:, :cut], wild["initial_states"][:] = 1e6, -1e6, 1e6
    calm, shaken = problem(impl=impl, chunk_size=8), problem.having(**wild)(impl=impl, chunk_size=8)
    assert torch.equal(calm.y[:, cut:], shaken.y[:, cut:])
    assert torch.equal(calm.final_states, shaken.final_states)
    after = {name: t[:, cut:] for name, t in problem.tensors.items() if name != "initial_states"}
    fresh = linear_attention(**after, impl=impl, chunk_size=8)
    assert_close("y", calm.y[:, cut:], fresh.y, dtype=torch.float32)
    problem.dy[:, :cut] = 0
    grads = evaluate(problem, impl=impl, chunk_size=8)
    for name in ("k", "v", "log_decay"):
        assert not grads[f"d{name}"][:, :cut].any(), name
    assert not grads["dlog_decay"][:, cut].any()
    assert not grads["dinitial_states"].any()
    assert all(t.isfinite().all() for t in grads.values())


WIDE = (torch.float32, torch.float64)
STEEP = {
    "mixture": lambda t: torch.where(torch.arange(t.shape[1])[:, None] % 3 == 1, -300.0, t),
    "one cliff": lambda t: torch.where(torch.arange(t.shape[1])[:, None] == 2, -160.0, t),
    "cliffs under the range": lambda t: torch.where(torch.arange(t.shape[1])[:, None] % 20 == 2, -55.0, t),
    "cliffs with resets": lambda t: torch.where(torch.arange(t.shape[1])[:, None] % 9 == 4, -math.inf, 90 * t),
    "one head": lambda t: t * torch.tensor([1.0, 1e3, 1e-3, 1e4]),
}


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("numba", torch.float32), *((impl, wide) for impl in ("chunked", "quadratic") for wide in WIDE)],
)
@pytest.mark.parametrize("kind", STEEP)
def test_steep_decays_beside_mild_ones_stay_exact(kind: str, dtype: torch.dtype, impl: str) -> None:
    """Large sums inside a chunk must not cost the small differences their precision."""
    problem = attention_problem(seqlen=70, states=True, decay=0.05, dtype=dtype)
    problem = problem.having(log_decay=STEEP[kind](problem.tensors["log_decay"]))
    compare(problem, dtype, impl=impl)


def test_normalized_weights_may_leave_the_range_of_float16() -> None:
    problem = attention_problem(batch=1, seqlen=300, d_state=64, normalize=True, decay=None, dtype=torch.float16)
    problem = problem.having(**{name: problem.tensors[name] * 4 for name in ("q", "k")})
    oracle = evaluate(problem.double(), impl="recurrent")
    assert oracle["final_states"].sum() > torch.finfo(torch.float16).max
    assert_matches(evaluate(problem), oracle, dtype=torch.float16)


def test_long_sequences_do_not_drift() -> None:
    problem = ssd_problem(batch=1, seqlen=5000, nheads=2, headdim=2, ngroups=1, d_state=2, decay=0.02)
    with torch.no_grad():
        exact, yardstick = problem.double()(impl="recurrent"), problem(impl="recurrent")
        result = problem()
    assert_close("y", result.y, exact.y, dtype=torch.float32, yardstick=yardstick.y)
    assert_close(
        "state", result.final_states, exact.final_states, dtype=torch.float32, yardstick=yardstick.final_states
    )


@pytest.mark.parametrize("impl", ["numba", "chunked", "recurrent", "quadratic"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_spoils_nothing_before_it(impl: str, bad: float) -> None:
    problem = ssd_problem(seqlen=20)
    spoilt = problem.tensors["x"].clone()
    spoilt[:, 11] = bad
    clean, dirty = problem(impl=impl, chunk_size=4), problem.having(x=spoilt)(impl=impl, chunk_size=4)
    assert not dirty.y[:, 11].isfinite().any()
    if impl != "quadratic":
        # Inside one block a masked product is 0 times the value, which is NaN; blocks before it are untouched.
        assert torch.equal(clean.y[:, :8], dirty.y[:, :8])


@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
def test_a_step_size_that_is_nan_is_not_swallowed(impl: str) -> None:
    problem = ssd_problem(seqlen=20)
    problem.tensors["dt"][:, 11] = math.nan
    out = problem(impl=impl, chunk_size=4)
    assert out.y[:, 11:].isnan().all()
    assert out.final_states.isnan().all()
    assert out.y[:, :8].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ngroups", [1, 2, 4])
def test_step_by_step_equals_the_whole(dtype: torch.dtype, ngroups: int) -> None:
    problem = ssd_problem(
        D="vector", z=True, dt_bias=True, states=True, ngroups=ngroups, dtype=dtype, seqlen=12, dt_limit=(0.1, 1.0)
    )
    t, exact = problem.tensors, problem.double()(impl="recurrent")
    state, ys = t["initial_states"], []
    for i in range(12):
        token = {name: t[name][:, i] for name in ("x", "dt", "B", "C", "z")}
        out = ssd_step(state, A=t["A"], D=t["D"], dt_bias=t["dt_bias"], **token, **problem.options)
        state = out.final_states
        ys.append(out.y)
    y = torch.stack(ys, 1)
    assert y.dtype == dtype
    whole = problem(impl="recurrent")
    assert_close("y", y, exact.y, dtype=dtype, yardstick=whole.y)
    assert_close("state", state, exact.final_states, dtype=dtype, yardstick=whole.final_states)


def test_a_step_takes_mixed_precision_like_the_sequence() -> None:
    """float64 A beside float32 inputs, a float32 state beside float64 ones: computed alike by `ssd` and `ssd_step`."""
    for dtype, other in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        problem = ssd_problem(seqlen=1, states=True, dtype=dtype)
        t = {**problem.tensors, "A": problem.tensors["A"].to(other), "initial_states": torch.randn(2, 4, 8, 16)}
        whole = ssd(**t, impl="recurrent")
        step = ssd_step(t["initial_states"], t["x"][:, 0], t["dt"][:, 0], t["A"], t["B"][:, 0], t["C"][:, 0])
        assert step.y.dtype == whole.y.dtype == dtype
        assert step.final_states.dtype == whole.final_states.dtype == dtype
        assert_close("y", step.y, whole.y[:, 0], dtype=dtype)
        assert_close("state", step.final_states, whole.final_states, dtype=dtype)


def test_step_gradients() -> None:
    problem = ssd_problem(D="scalar", z=True, states=True, seqlen=1, dt_bias=True)
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
    token = {name: leaves[name].squeeze(1) for name in ("x", "dt", "B", "C", "z")}
    shared = {name: leaves[name] for name in ("A", "D", "dt_bias")}
    out = ssd_step(leaves["initial_states"], **token, **shared, dt_softplus=True)
    torch.autograd.backward([out.y, out.final_states], [problem.dy.squeeze(1), problem.dfinal])
    oracle = evaluate(problem.double(), impl="recurrent")
    for name, leaf in leaves.items():
        assert_close(name, leaf.grad, oracle[f"d{name}"], dtype=torch.float32, gradient=True)


def test_packed_empty_sequences_keep_their_state() -> None:
    states = torch.randn(3, 2, 4, 8)
    problem = ssd_problem(nheads=2, ngroups=1, headdim=4, d_state=8, lengths=[0, 5, 0]).having(initial_states=states)
    for impl in ("chunked", "recurrent", "quadratic"):
        final = problem(impl=impl).final_states
        assert torch.equal(final[0], states[0])
        assert torch.equal(final[2], states[2])
        assert not torch.equal(final[1], states[1])
    empty = ssd_problem(nheads=2, ngroups=1, headdim=4, d_state=8, lengths=[0, 0])
    assert empty.options["cu_seqlens"].tolist() == packed([0, 0]).tolist() == [0, 0, 0]
    assert not empty().final_states.any()
