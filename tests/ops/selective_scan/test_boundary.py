"""The operator boundary: what PyTorch's own machinery asks of `dualscan::selective_scan_fwd` and its kin."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualscan.ops.selective_scan import library, selective_scan, selective_scan_step
from tests.ops.selective_scan.problems import scan_problem
from tests.strategies import evaluate

FORMS = {
    "chunked": (torch.ops.dualscan.selective_scan_fwd.default, torch.ops.dualscan.selective_scan_bwd.default),
    "numba": (
        torch.ops.dualscan.selective_scan_numba_fwd.default,
        torch.ops.dualscan.selective_scan_numba_bwd.default,
    ),
}


def arguments(
    which: str, *, seqlen: int = 11, dtype: torch.dtype = torch.float32, requires_grad: bool = False
) -> list[Any]:
    """Arguments of the operator: 'bare' leaves out every optional one, 'full' and 'packed' give them."""
    given = dict.fromkeys(("D", "z", "dt_bias", "states"), which != "bare")
    lengths = [1, 0, seqlen - 1] if which == "packed" else None
    problem = scan_problem(
        batch=1, seqlen=seqlen, channels=3, d_state=2, ngroups=1, dtype=dtype, lengths=lengths, **given
    )
    tensors = [problem.tensors.get(name) for name in library.DIFFERENTIABLE]
    if requires_grad:
        tensors = [None if t is None else t.requires_grad_() for t in tensors]
    return [*tensors, problem.options.get("cu_seqlens"), which != "bare"]


@pytest.mark.parametrize(
    ("which", "dtype"), [("bare", torch.float32), ("full", torch.bfloat16), ("packed", torch.float32)]
)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str, which: str, dtype: torch.dtype) -> None:
    forward, backward = FORMS[form]
    torch.library.opcheck(forward, arguments(which, dtype=dtype, requires_grad=True))
    plain = arguments(which, dtype=dtype)
    y, states = forward(*plain)
    for dy, dfinal in [(y, None), (None, states)] if which == "bare" else [(y, states)]:
        torch.library.opcheck(backward, [dy, dfinal, *plain])


@pytest.mark.parametrize("which", ["bare", "full", "packed"])
def test_gradcheck(which: str) -> None:
    *tensors, cu_seqlens, softplus = arguments(which, dtype=torch.float64, requires_grad=True)
    forward = FORMS["chunked"][0]
    assert torch.autograd.gradcheck(lambda *t: forward(*t, cu_seqlens, softplus), tensors, fast_mode=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_compiles_to_one_graph(form: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(partial(selective_scan, impl=form), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (19, 30) if dynamic else (19,):
        problem = scan_problem(seqlen=seqlen, D=True, z=True, dt_bias=True, states=True)
        result = evaluate(replace(problem, face=compiled))
        for name, expected in evaluate(problem, impl=form).items():
            assert torch.equal(result[name], expected), name


def test_compiles_packed_and_stepping() -> None:
    torch._dynamo.reset()
    problem = scan_problem(lengths=[5, 0, 9], states=True)
    compiled = replace(problem, face=torch.compile(selective_scan, fullgraph=True, backend="aot_eager"))
    for name, expected in evaluate(problem).items():
        assert torch.equal(evaluate(compiled)[name], expected), name
    t = scan_problem(seqlen=1, states=True).tensors
    token = t["initial_states"], t["x"][:, 0], t["dt"][:, 0], t["A"], t["B"][:, 0], t["C"][:, 0]
    result = torch.compile(selective_scan_step, fullgraph=True, backend="aot_eager")(*token)
    for actual, expected in zip(result, selective_scan_step(*token), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("form", FORMS)
def test_flops_are_the_documented_formula(form: str) -> None:
    problem = scan_problem(batch=3, seqlen=20, channels=6, d_state=4, states=True)
    with FlopCounterMode(display=False) as counter:
        evaluate(problem, impl=form)
    counts = counter.get_flop_counts()["Global"]
    assert list(counts.values()) == [4 * 3 * 20 * 6 * 4, 14 * 3 * 20 * 6 * 4]
    # A step counts as a token, product by product (PyTorch does not count those in place).
    in_place = {torch.ops.aten.baddbmm_: lambda out, a, b, *_, **__: 2 * out[0] * out[1] * out[2] * a[2]}
    t = scan_problem(batch=3, seqlen=1, ngroups=2, states=True).tensors
    token = t["initial_states"], t["x"][:, 0], t["dt"][:, 0], t["A"], t["B"][:, 0], t["C"][:, 0]
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        selective_scan_step(*token, impl="recurrent")
    assert counter.get_total_flops() == library.forward_flops(3, 1, 6, 4)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(form: str) -> None:
    problem = scan_problem(batch=1, seqlen=5, channels=2, d_state=2)
    x = problem.tensors["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"second derivative.*impl='recurrent'"):
        torch.autograd.grad(problem.having(x=x)(impl=form).y.sum(), x, create_graph=True)
    exact = problem.double()
    leaves = [t.detach().requires_grad_() for t in exact.tensors.values()]

    def run(*tensors: Tensor) -> Tensor:
        return exact.having(**dict(zip(exact.tensors, tensors, strict=True)))(impl="recurrent").y

    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_nothing(form: str) -> None:
    problem = scan_problem(D=True, z=True, dt_bias=True, states=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, region = evaluate(problem, impl=form), problem(impl="recurrent")
    for name, outside in evaluate(problem, impl=form).items():
        assert torch.equal(inside[name], outside), name
    for mine, outside in zip(region, problem(impl="recurrent"), strict=True):
        assert torch.equal(mine, outside)


@pytest.mark.parametrize("form", [*FORMS, "recurrent"])
def test_inputs_are_not_touched_and_runs_repeat(form: str) -> None:
    full = dict.fromkeys(("D", "z", "dt_bias", "states"), True)
    for problem in (scan_problem(**full), scan_problem(**full, lengths=[0, 7, 7, 1])):
        before = {name: (t.clone(), t._version) for name, t in problem.tensors.items()}
        first, second = evaluate(problem, impl=form), evaluate(problem, impl=form)
        for name, t in problem.tensors.items():
            assert torch.equal(t, before[name][0]), name
            assert t._version == before[name][1], name
        for name in first:
            assert torch.equal(first[name], second[name]), name
        assert problem(impl=form).final_states.data_ptr() != problem.tensors["initial_states"].data_ptr()


@pytest.mark.parametrize("leaf", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"])
@pytest.mark.parametrize("form", FORMS)
def test_any_single_gradient(form: str, leaf: str) -> None:
    problem = scan_problem(D=True, z=True, dt_bias=True, states=True)
    expected = evaluate(problem, impl=form)[f"d{leaf}"]
    t = problem.tensors[leaf].detach().requires_grad_()
    out = problem.having(**{leaf: t})(impl=form)
    torch.autograd.backward(list(out), [problem.dy, problem.dfinal])
    assert torch.equal(t.grad, expected)
