"""The operator boundary: what PyTorch's own machinery asks of `dualscan::ssd_fwd` and `ssd_bwd`."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dualscan.ops.ssd import SSDOutput, chunked, ssd, ssd_step
from tests.strategies import Problem, attention_problem, evaluate, packed, ssd_problem

FORWARD, BACKWARD = torch.ops.dualscan.ssd_fwd.default, torch.ops.dualscan.ssd_bwd.default
OPERATORS = {
    "chunked": (FORWARD, BACKWARD),
    "numba": (torch.ops.dualscan.ssd_numba_fwd.default, torch.ops.dualscan.ssd_numba_bwd.default),
}


def core_arguments(which: str, *, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> list[Any]:
    """Arguments of the core: 'bare' leaves out every optional one, 'full' and 'packed' give them."""
    batch, seqlen, nheads, headdim, ngroups, d_state = 1, 11, 2, 3, 1, 4
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(batch, seqlen, nheads, headdim).to(dtype)
    log_decay = -torch.rand(batch, seqlen, nheads, dtype=wide)
    B, C = torch.randn(2, batch, seqlen, ngroups, d_state).to(dtype)
    scale = D = states = cu_seqlens = None
    if which != "bare":
        scale, D = torch.rand(batch, seqlen, nheads, dtype=wide), torch.randn(nheads, headdim, dtype=wide)
        cu_seqlens = packed([4, 0, 7]) if which == "packed" else None
        states = torch.randn(3 if which == "packed" else batch, nheads, headdim, d_state, dtype=wide)
    tensors = [x, scale, log_decay, B.clone(), C.clone(), D, states]
    if requires_grad:
        tensors = [None if t is None else t.requires_grad_() for t in tensors]
    return [*tensors, cu_seqlens, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["bare", "full", "packed"])
@pytest.mark.parametrize("impl", OPERATORS)
def test_opcheck(impl: str, which: str, dtype: torch.dtype) -> None:
    forward, backward = OPERATORS[impl]
    arguments = core_arguments(which, dtype=dtype, requires_grad=True)
    torch.library.opcheck(forward, arguments)
    plain = core_arguments(which, dtype=dtype)
    y, states = forward(*plain)
    for dy, dfinal in ((y, states), (y, None), (None, states)):
        torch.library.opcheck(backward, [dy, dfinal, *plain])


@pytest.mark.parametrize("which", ["bare", "full", "packed"])
def test_gradcheck(which: str) -> None:
    *tensors, cu_seqlens, chunk_size = core_arguments(which, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: FORWARD(*t, cu_seqlens, chunk_size), tensors, fast_mode=True)


def test_gradcheck_of_the_faces() -> None:
    problem = ssd_problem(
        batch=1, seqlen=6, headdim=2, d_state=2, D="scalar", z=True, dt_bias=True, states=True, dtype=torch.float64
    )
    attention = attention_problem(batch=1, seqlen=6, headdim=2, d_state=2, normalize=True, dtype=torch.float64)
    for case in (problem, attention):
        names = list(case.tensors)
        leaves = [t.detach().requires_grad_() for t in case.tensors.values()]

        def run(*tensors: Tensor, case: Problem = case, names: list[str] = names) -> tuple[Tensor, Tensor]:
            return tuple(case.having(**dict(zip(names, tensors, strict=True)))(chunk_size=4))

        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


FACES: dict[str, Callable[..., Problem]] = {
    "ssd": partial(ssd_problem, D="scalar", dt_bias=True, z=True),
    "ssd with states": partial(ssd_problem, states=True),
    "attention": partial(attention_problem, decay=None),
    "attention with states": partial(attention_problem, states=True),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("face", FACES)
def test_compiles_to_one_graph(face: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = None
    for seqlen in (19, 30) if dynamic else (19,):
        problem = FACES[face](seqlen=seqlen)
        compiled = compiled or torch.compile(problem.face, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        result = evaluate(replace(problem, face=compiled), chunk_size=8)
        for name, expected in evaluate(problem, chunk_size=8).items():
            assert torch.equal(result[name], expected), name


def test_compiles_packed_and_stepping() -> None:
    torch._dynamo.reset()
    problem = ssd_problem(lengths=[5, 0, 9], states=True)
    compiled = replace(problem, face=torch.compile(ssd, fullgraph=True, backend="aot_eager"))
    for name, expected in evaluate(problem).items():
        assert torch.equal(evaluate(compiled)[name], expected), name
    token = ssd_problem(seqlen=1, states=True, D="scalar")
    t = token.tensors
    arguments = t["initial_states"], *(t[name][:, 0] for name in ("x", "dt")), t["A"], t["B"][:, 0], t["C"][:, 0]
    expected = ssd_step(*arguments, D=t["D"])
    result = torch.compile(ssd_step, fullgraph=True, backend="aot_eager")(*arguments, D=t["D"])
    assert torch.equal(result.y, expected.y)
    assert torch.equal(result.final_states, expected.final_states)


class Calls(TorchDispatchMode):
    """Counts the calls of every operator below it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("impl", OPERATORS)
def test_selective_checkpointing_by_name(impl: str, saved: bool) -> None:
    forward, backward = OPERATORS[impl]
    problem = ssd_problem(D="scalar", dt_bias=True, states=True)

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = saved and operator == forward
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def face(**arguments: Any) -> SSDOutput:
        def run(x: Tensor) -> SSDOutput:
            return problem.face(**{**arguments, "x": x.mul(2.0)}, impl=impl)

        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(run, arguments["x"], use_reentrant=False, context_fn=contexts)

    doubled = problem.having(x=problem.tensors["x"] * 2)
    expected = evaluate(doubled, impl=impl)
    with Calls() as calls:
        result = evaluate(replace(problem, face=face))
    assert calls.count[forward] == (1 if saved else 2)
    assert calls.count[backward] == 1
    expected["dx"] = expected["dx"] * 2
    for name in expected:
        assert torch.equal(result[name], expected[name]), name


@pytest.mark.parametrize(("seqlen", "chunk_size"), [(64, 16), (10, 16)])
def test_flops_are_the_documented_formula(seqlen: int, chunk_size: int) -> None:
    batch, nheads, headdim, ngroups, d_state = 3, 4, 8, 2, 16
    problem = ssd_problem(batch=batch, seqlen=seqlen, headdim=headdim, d_state=d_state, states=True)
    q = min(seqlen, chunk_size)
    forward = 2 * seqlen * (ngroups * q * d_state + nheads * headdim * (q + 2 * d_state)) * batch
    with FlopCounterMode(display=False) as counter:
        evaluate(problem, chunk_size=chunk_size, impl="chunked")
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.dualscan.ssd_fwd] == forward
    # The formulas are what the portable form does, product by product.
    arguments = [problem.tensors[name] for name in ("x", "dt")]
    log_decay = problem.tensors["dt"] * problem.tensors["A"]
    arguments = [*arguments, log_decay, *(problem.tensors[name] for name in ("B", "C")), None]
    arguments = [*arguments, problem.tensors["initial_states"], None, chunk_size]
    # PyTorch counts products, but not those in place.
    in_place = {torch.ops.aten.baddbmm_: lambda out, a, b, *_, **__: 2 * out[0] * out[1] * out[2] * a[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as inside:
        chunked.forward(*arguments)
    assert inside.get_total_flops() == forward
    with FlopCounterMode(display=False, custom_mapping=in_place) as inside:
        chunked.backward(problem.dy, problem.dfinal, *arguments)
    assert inside.get_total_flops() == counts[torch.ops.dualscan.ssd_bwd]


def test_second_derivatives() -> None:
    problem = ssd_problem(batch=1, seqlen=5, headdim=2, d_state=2, dtype=torch.float64)
    x = problem.tensors["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"second derivative.*impl='quadratic'"):
        torch.autograd.grad(problem.having(x=x)().y.sum(), x, create_graph=True)
    for impl in ("recurrent", "quadratic"):
        face = partial(ssd, impl=impl)
        leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
        assert torch.autograd.gradgradcheck(lambda *t, face=face: face(*t).y, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("impl", ["chunked", "recurrent", "quadratic"])
def test_autocast_leaves_decays_and_states_alone(impl: str) -> None:
    problem = ssd_problem(D="scalar", z=True, dt_bias=True, states=True, seqlen=30)
    t = problem.tensors
    step = partial(ssd_step, t["initial_states"], t["x"][:, 0], t["dt"][:, 0], t["A"], t["B"][:, 0], t["C"][:, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        region, stepped = problem(impl=impl), step()
    for inside, outside in zip((*region, *stepped), (*problem(impl=impl), *step()), strict=True):
        assert inside.dtype == torch.float32
        assert torch.equal(inside, outside)


def test_a_backward_pass_inside_autocast() -> None:
    problem = ssd_problem(D="scalar", z=True, dt_bias=True, states=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = evaluate(problem)
    for name, outside in evaluate(problem).items():
        assert torch.equal(inside[name], outside), name


@pytest.mark.parametrize("impl", ["chunked", "recurrent", "quadratic"])
def test_inputs_are_not_touched_and_runs_repeat(impl: str) -> None:
    for problem in (
        ssd_problem(D="vector", z=True, dt_bias=True, states=True),
        ssd_problem(D="vector", states=True, ngroups=1, lengths=[0, 7, 7, 1]),
        attention_problem(resets=True, states=True, ngroups=1),
    ):
        before = {name: (t.clone(), t._version) for name, t in problem.tensors.items()}
        first, second = evaluate(problem, impl=impl), evaluate(problem, impl=impl)
        for name, t in problem.tensors.items():
            assert torch.equal(t, before[name][0]), name
            assert t._version == before[name][1], name
        for name in first:
            assert torch.equal(first[name], second[name]), name
        assert problem(impl=impl).final_states.data_ptr() != problem.tensors["initial_states"].data_ptr()


def test_a_step_does_not_touch_the_state() -> None:
    t = ssd_problem(seqlen=1, states=True).tensors
    for state in (t["initial_states"], t["initial_states"].mT.contiguous().mT):
        before = state.clone()
        out = ssd_step(state, t["x"][:, 0], t["dt"][:, 0], t["A"], t["B"][:, 0], t["C"][:, 0])
        assert torch.equal(state, before)
        assert not torch.equal(out.final_states, before)


@pytest.mark.parametrize("leaf", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"])
def test_any_single_gradient(leaf: str) -> None:
    problem = ssd_problem(D="vector", z=True, dt_bias=True, states=True)
    expected = evaluate(problem)[f"d{leaf}"]
    t = problem.tensors[leaf].detach().requires_grad_()
    out = problem.having(**{leaf: t})()
    pairs = [pair for pair in zip(out, (problem.dy, problem.dfinal), strict=True) if pair[0].requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    assert torch.equal(t.grad, expected)


def extra_bytes(run: Callable[[], tuple[Tensor, ...]]) -> int:
    """Bytes that were alive at the worst moment beyond the results."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    # pyrefly: ignore[missing-attribute] (the stubs of this extension type leave nbytes out)
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes)) - sum(t.untyped_storage().nbytes() for t in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_beyond_the_results_is_one_chunk(dtype: torch.dtype) -> None:
    """With the length grow a few numbers a token and head, and in the backward pass one state a chunk; nothing of x's
    size."""
    nheads, headdim, d_state, chunk_size, forward, backward = 8, 64, 64, 64, [], []
    lengths = (256, 1024)
    for seqlen in lengths:
        problem = ssd_problem(
            batch=1, seqlen=seqlen, nheads=nheads, headdim=headdim, ngroups=1, d_state=d_state, dtype=dtype, states=True
        )
        forward.append(extra_bytes(partial(problem, chunk_size=chunk_size)))
        t, dt = problem.tensors, problem.tensors["dt"].float()
        core = [t["x"], dt, dt * t["A"], t["B"], t["C"], None, t["initial_states"], None, chunk_size]
        backward.append(extra_bytes(partial(BACKWARD, problem.dy, problem.dfinal, *core)))
    tokens = lengths[1] - lengths[0]
    floats_a_token = nheads * torch.float32.itemsize
    states = tokens // chunk_size * nheads * headdim * d_state * torch.float32.itemsize
    assert forward[1] - forward[0] <= 8 * tokens * floats_a_token
    assert backward[1] - backward[0] <= states + 12 * tokens * floats_a_token
