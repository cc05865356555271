"""Every form against the float64 recurrence: values and every gradient, over the corners of the contract."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.selective_scan.problems import CORNERS, scan_problem
from tests.oracle import assert_close
from tests.strategies import Problem, assert_matches, evaluate, pack_lengths

quick = settings(max_examples=15, deadline=None, derandomize=True)

DTYPES = {
    "chunked": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "numba": [torch.float32, torch.bfloat16],
}
FORMS = list(DTYPES)
COMPUTED = [(form, dtype) for form in FORMS for dtype in DTYPES[form]]


def compare(problem: Problem, dtype: torch.dtype, **options: str) -> None:
    oracle = evaluate(problem.double(), impl="recurrent")
    # The oracle itself computes in float64: as a yardstick it would allow no error at all.
    yardstick = None if dtype == torch.float64 else evaluate(problem, impl="recurrent")
    assert_matches(evaluate(problem, **options), oracle, dtype=dtype, yardstick=yardstick)


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize(("form", "dtype"), COMPUTED)
def test_corners(form: str, dtype: torch.dtype, corner: str) -> None:
    compare(scan_problem(dtype=dtype, **CORNERS[corner]), dtype, impl=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seqlen", [15, 16, 17, 63, 64, 65, 150])
def test_lengths_around_the_chunks(form: str, seqlen: int) -> None:
    problem = scan_problem(seqlen=seqlen, channels=3, d_state=2, D=True, z=True, dt_bias=True, states=True)
    compare(problem, torch.float32, impl=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("through", ["y", "final_states"])
def test_gradients_through_one_result(form: str, through: str) -> None:
    problem = scan_problem(D=True, z=True, dt_bias=True, states=True)
    oracle = evaluate(problem.double(), through=(through,), impl="recurrent")
    assert_matches(evaluate(problem, through=(through,), impl=form), oracle, dtype=torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_step_sizes_of_another_dtype(form: str) -> None:
    for x_dtype, dt_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        problem = scan_problem(dtype=x_dtype, D=True, z=True, dt_bias=True, states=True)
        problem = problem.having(dt=problem.tensors["dt"].to(dt_dtype))
        result = evaluate(problem, impl=form)
        assert result["y"].dtype == result["dz"].dtype == x_dtype
        assert result["ddt"].dtype == dt_dtype
        assert_matches(result, evaluate(problem.double(), impl="recurrent"), dtype=torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_views_of_one_projection(form: str) -> None:
    """Slices of wider rows, transposed time and broadcast rows are read where they are."""
    problem = scan_problem(D=True, z=True, states=True, ngroups=1)
    t = problem.tensors
    wide = torch.randn(2, 21, 64)
    views = {"x": wide[..., 1:7], "z": wide[..., 7:13], "B": wide[..., None, 13:17], "C": wide[..., None, 20:24]}
    views["dt"] = t["dt"].transpose(0, 1).contiguous().transpose(0, 1)
    views["A"] = t["A"].t().contiguous().t()
    views["D"] = torch.randn(12)[::2]
    views["initial_states"] = t["initial_states"][:1].expand(2, -1, -1)
    compare(problem.having(**views), torch.float32, impl=form)
    every_other = torch.randn(2, 21, 12)[..., ::2]
    compare(problem.having(x=every_other, z=torch.randn(6, 21, 2).transpose(0, 2)), torch.float32, impl=form)


@pytest.mark.parametrize("form", FORMS)
@quick
@given(lengths=pack_lengths(), states=st.booleans())
def test_packed_is_each_sequence_alone_to_the_bit(form: str, lengths: list[int], states: bool) -> None:
    problem = scan_problem(lengths=lengths, D=True, z=True, dt_bias=True, states=states)
    together = evaluate(problem, impl=form)
    bounds = [0, *itertools.accumulate(lengths)]
    parameters = ("A", "D", "dt_bias")
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        own = {name: t if name in parameters else t[:, start:end] for name, t in problem.tensors.items()}
        if states:
            own["initial_states"] = problem.tensors["initial_states"][i : i + 1]
        options = {"dt_softplus": True}
        alone = Problem(problem.face, own, problem.dy[:, start:end], problem.dfinal[i : i + 1], options)
        for name, value in evaluate(alone, impl=form).items():
            if name[1:] in parameters:
                continue
            cut = slice(i, i + 1) if name.endswith("states") else (slice(None), slice(start, end))
            assert torch.equal(together[name][cut], value), name


@pytest.mark.parametrize("form", FORMS)
@quick
@given(first=st.integers(0, 30), rest=st.integers(0, 30))
def test_continues_at_any_cut(form: str, first: int, rest: int) -> None:
    problem = scan_problem(seqlen=first + rest, D=True, z=True, dt_bias=True, states=True)
    whole = problem(impl=form)
    per_token = ("x", "dt", "B", "C", "z")
    state, ys = problem.tensors["initial_states"], []
    for span in (slice(0, first), slice(first, None)):
        cut = {name: problem.tensors[name][:, span] for name in per_token}
        y, state = problem.having(**cut, initial_states=state)(impl=form)
        ys.append(y)
    assert_close("y", torch.cat(ys, 1), whole.y.double(), dtype=torch.float32)
    assert_close("states", state, whole.final_states.double(), dtype=torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_the_past_does_not_depend_on_the_future(form: str) -> None:
    problem = scan_problem(z=True)
    x = problem.tensors["x"].clone().requires_grad_()
    problem.having(x=x)(impl=form).y[:, :10].square().sum().backward()
    assert x.grad is not None
    assert not x.grad[:, 10:].any()
    assert x.grad[:, :10].any()
