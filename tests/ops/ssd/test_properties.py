"""What holds for every input: properties of the operator, drawn by hypothesis."""

import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualscan.ops.ssd import linear_attention, ssd
from tests.oracle import assert_close
from tests.strategies import Problem, assert_matches, attention_problem, evaluate, pack_lengths, sizes, ssd_problem

FORMS = ("chunked", "quadratic", "recurrent")
quick = settings(max_examples=15, deadline=None, derandomize=True)

PER_TOKEN = ("x", "dt", "B", "C", "z")


def tokens(problem: Problem, span: slice) -> dict[str, Tensor]:
    """The tensors of a problem with the time dimension cut."""
    return {name: t[:, span] if name in PER_TOKEN else t for name, t in problem.tensors.items()}


@quick
@given(sizes(), st.integers(1, 50), st.integers(1, 50))
def test_the_chunk_size_does_not_matter(size: dict[str, int], first: int, second: int) -> None:
    problem = ssd_problem(**size, D="vector", states=True, dtype=torch.float64)
    one, other = evaluate(problem, chunk_size=first), evaluate(problem, chunk_size=second)
    assert_matches(one, other, dtype=torch.float64)


@quick
@given(sizes(), st.booleans())
def test_the_three_forms_agree(size: dict[str, int], resets: bool) -> None:
    for problem in (
        ssd_problem(**size, D="scalar", z=True, dt_bias=True, states=True, dtype=torch.float64),
        attention_problem(**size, resets=resets, states=True, dtype=torch.float64),
    ):
        recurrence = evaluate(problem, impl="recurrent")
        assert_matches(evaluate(problem, impl="quadratic"), recurrence, dtype=torch.float64)
        assert_matches(evaluate(problem, impl="chunked", chunk_size=8), recurrence, dtype=torch.float64)


@quick
@given(sizes(), st.data(), st.sampled_from(FORMS))
def test_cutting_anywhere_changes_nothing(size: dict[str, int], data: st.DataObject, impl: str) -> None:
    """Values and gradients of the whole equal those of two calls joined by the state."""
    problem = ssd_problem(**size, D="scalar", z=True, states=True, dtype=torch.float64)
    cut = data.draw(st.integers(0, size["seqlen"]))

    def joined(**tensors: Tensor) -> object:
        whole = problem.having(**tensors)
        first = ssd(**tokens(whole, slice(cut)), impl=impl, chunk_size=8)
        rest = {**tokens(whole, slice(cut, None)), "initial_states": first.final_states}
        second = ssd(**rest, impl=impl, chunk_size=8)
        return second._replace(y=torch.cat([first.y, second.y], 1))

    pieces = Problem(joined, problem.tensors, problem.dy, problem.dfinal)
    assert_matches(evaluate(pieces), evaluate(problem, impl=impl, chunk_size=8), dtype=torch.float64)


def assert_packed_is_alone(problem: Problem, **options: Any) -> None:
    """Every sequence's values and gradients have the same bits in the pack as by themselves."""
    bounds = problem.options["cu_seqlens"]
    together = evaluate(problem, **options)
    rest = {name: value for name, value in problem.options.items() if name != "cu_seqlens"}
    for i, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        cut = {**tokens(problem, slice(start, end)), "initial_states": problem.tensors["initial_states"][i : i + 1]}
        single = Problem(problem.face, cut, problem.dy[:, start:end], problem.dfinal[i : i + 1], rest)
        alone = evaluate(single, **options)
        for name in ("y", "dx", "ddt", "dB", "dC"):
            assert torch.equal(together[name][:, start:end], alone[name]), (name, i)
        for name in ("final_states", "dinitial_states"):
            assert torch.equal(together[name][i : i + 1], alone[name]), (name, i)


@settings(quick, max_examples=30)
@given(sizes(), pack_lengths(), st.sampled_from(FORMS), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_packed_is_each_sequence_alone(
    size: dict[str, int], lengths: list[int], impl: str, dtype: torch.dtype, steep: bool
) -> None:
    size = {name: n for name, n in size.items() if name not in ("batch", "seqlen")}
    problem = ssd_problem(**size, lengths=lengths, D="vector", dt_bias=True, states=True, dtype=dtype)
    if steep:
        # One sequence with decays of another scale: the others must not notice.
        problem.tensors["dt"][:, : lengths[0]] *= 1e3
    assert_packed_is_alone(problem, impl=impl, chunk_size=8)


def test_packed_is_each_sequence_alone_at_a_model_s_sizes() -> None:
    for lengths in ([100] * 3, [130, 1, 64, 70]):
        problem = ssd_problem(lengths=lengths, nheads=4, headdim=64, ngroups=1, d_state=128, dt_bias=True, states=True)
        assert_packed_is_alone(problem)


@quick
@given(sizes(), st.integers(1, 5))
def test_a_row_does_not_notice_its_batch(size: dict[str, int], copies: int) -> None:
    problem = ssd_problem(**{**size, "batch": 1}, D="vector", dt_bias=True, states=True)
    alone = evaluate(problem, chunk_size=8)
    shared = ("A", "D", "dt_bias")
    crowd = {
        name: t if name in shared else torch.cat([t, *[torch.randn_like(t) * 30 for _ in range(copies)]])
        for name, t in problem.tensors.items()
    }
    rows = 1 + copies
    crowded = Problem(
        problem.face,
        crowd,
        problem.dy.repeat(rows, 1, 1, 1),
        problem.dfinal.repeat(rows, 1, 1, 1),
        problem.options,
    )
    together = evaluate(crowded, chunk_size=8)
    for name, t in alone.items():
        if name.removeprefix("d") not in shared and name != "ddt_bias":
            assert torch.equal(together[name][:1], t), name


@quick
@given(sizes(), st.data(), st.sampled_from(FORMS))
def test_zero_steps_are_no_ops(size: dict[str, int], data: st.DataObject, impl: str) -> None:
    """Tokens with Δ = 0 neither write nor decay the state: leaving them out gives the same state, bit for bit."""
    problem = ssd_problem(**size, states=True)
    silent = data.draw(st.lists(st.booleans(), min_size=size["seqlen"], max_size=size["seqlen"]))
    mask = torch.tensor(silent)
    problem.tensors["dt"][:, mask] = 0.0
    full = problem(impl=impl, chunk_size=8)
    kept = {name: t[:, ~mask] if name in PER_TOKEN else t for name, t in problem.tensors.items()}
    short = ssd(**kept, impl=impl, chunk_size=8)
    assert_close("state", full.final_states, short.final_states, dtype=torch.float32)
    assert_close("y", full.y[:, ~mask], short.y, dtype=torch.float32)
    if all(silent):
        assert torch.equal(full.final_states, problem.tensors["initial_states"])


@quick
@given(sizes(), st.sampled_from([0.125, 0.5, 3.0, 100.0]), st.sampled_from(FORMS))
def test_time_has_no_unit(size: dict[str, int], c: float, impl: str) -> None:
    """Δ → cΔ, A → A/c, B → B/c describes the same system."""
    problem = ssd_problem(**size, states=True, D="scalar", dtype=torch.float64)
    t = problem.tensors
    rescaled = problem.having(dt=t["dt"] * c, A=t["A"] / c, B=t["B"] / c)(impl=impl)
    original = problem(impl=impl)
    assert_close("y", rescaled.y, original.y, dtype=torch.float64)
    assert_close("state", rescaled.final_states, original.final_states, dtype=torch.float64)


@quick
@given(sizes(), st.floats(-3, 3), st.sampled_from(FORMS))
def test_linear_in_x_and_affine_in_the_state(size: dict[str, int], a: float, impl: str) -> None:
    problem = ssd_problem(**size, states=True, D="vector", dtype=torch.float64)
    x, h = problem.tensors["x"], problem.tensors["initial_states"]
    other, g = torch.randn_like(x), torch.randn_like(h)

    def run(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return problem.having(x=x, initial_states=h)(impl=impl, chunk_size=8)

    nothing = torch.zeros_like(h)
    for name, mixed, *parts in zip(
        ("y", "state"), run(a * x + other, nothing), run(x, nothing), run(other, nothing), strict=True
    ):
        assert_close(f"linear {name}", mixed, a * parts[0] + parts[1], dtype=torch.float64)
    for name, mixed, *parts in zip(("y", "state"), run(x, a * h + (1 - a) * g), run(x, h), run(x, g), strict=True):
        assert_close(f"affine {name}", mixed, a * parts[0] + (1 - a) * parts[1], dtype=torch.float64)


@quick
@given(sizes(), st.data(), st.sampled_from(FORMS))
def test_the_future_has_no_gradient(size: dict[str, int], data: st.DataObject, impl: str) -> None:
    problem = ssd_problem(**size, D="scalar", z=True, dt_bias=True, states=True)
    last = data.draw(st.integers(0, size["seqlen"] - 1))
    problem.dy[:, last + 1 :] = 0
    grads = evaluate(problem, through=("y",), impl=impl, chunk_size=8)
    for name in PER_TOKEN:
        assert not grads[f"d{name}"][:, last + 1 :].any(), name
        assert grads[f"d{name}"][:, last].any(), name


@quick
@given(sizes(), st.sampled_from(FORMS))
def test_groups_broadcast_to_their_heads(size: dict[str, int], impl: str) -> None:
    problem = ssd_problem(**size, D="scalar", states=True, dtype=torch.float64)
    repeats = size["nheads"] // size["ngroups"]
    grouped = evaluate(problem, impl=impl)
    spread = {name: problem.tensors[name].repeat_interleave(repeats, dim=2) for name in ("B", "C")}
    every = evaluate(problem.having(**spread), impl=impl)
    for name in ("dB", "dC"):
        every[name] = every[name].unflatten(2, (size["ngroups"], repeats)).sum(3)
    assert_matches(grouped, every, dtype=torch.float64)


@quick
@given(sizes(), st.sampled_from(FORMS))
def test_groups_of_heads_computed_apart_make_the_whole(size: dict[str, int], impl: str) -> None:
    """Tensor parallelism's split: every rank holds some groups with their heads."""
    problem = ssd_problem(**size, D="vector", z=True, dt_bias=True, states=True, dtype=torch.float64)
    whole = evaluate(problem, impl=impl)
    dims = {"A": 0, "D": 0, "dt_bias": 0, "initial_states": 1}
    shards = []
    for rank in range(size["ngroups"]):

        def own(t: Tensor, dim: int, rank: int = rank) -> Tensor:
            return t.chunk(size["ngroups"], dim)[rank]

        tensors = {name: own(t, dims.get(name, 2)) for name, t in problem.tensors.items()}
        part = Problem(problem.face, tensors, own(problem.dy, 2), own(problem.dfinal, 1), problem.options)
        shards.append(evaluate(part, impl=impl))
    for name, t in whole.items():
        dim = 1 if name == "final_states" else 2 if name == "y" else dims.get(name[1:], 2)
        assert_close(name, torch.cat([s[name] for s in shards], dim), t, dtype=torch.float64, gradient=name[0] == "d")


@quick
@given(sizes(), st.sampled_from(FORMS))
def test_ssd_is_linear_attention_with_the_step_folded_into_v(size: dict[str, int], impl: str) -> None:
    problem = ssd_problem(**size, states=True, dtype=torch.float64)

    def attention(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Tensor) -> object:
        return linear_attention(C, B, x * dt.unsqueeze(-1), log_decay=dt * A, impl=impl, **rest)

    folded = Problem(attention, problem.tensors, problem.dy, problem.dfinal)
    assert_matches(evaluate(folded), evaluate(problem, impl=impl), dtype=torch.float64)


@quick
@given(sizes(), st.sampled_from(FORMS), st.floats(0.1, 4.0))
def test_linear_attention_is_a_masked_product(size: dict[str, int], impl: str, scale: float) -> None:
    problem = attention_problem(**size, decay=None, scale=scale, dtype=torch.float64)
    q, k, v = (problem.tensors[name] for name in ("q", "k", "v"))
    q, k = (t.repeat_interleave(size["nheads"] // size["ngroups"], 2) for t in (q, k))
    scores = torch.einsum("blhn,bshn->bhls", q, k).tril() * scale
    assert_close("y", problem(impl=impl).y, torch.einsum("bhls,bshp->blhp", scores, v), dtype=torch.float64)
    q, k = problem.tensors["q"].abs(), problem.tensors["k"].abs()
    normal = linear_attention(q, k, v, normalize=True, impl=impl).y
    q, k = (t.repeat_interleave(size["nheads"] // size["ngroups"], 2) for t in (q, k))
    scores = torch.einsum("blhn,bshn->bhls", q, k).tril()
    weights = scores / scores.sum(-1, keepdim=True)
    assert_close("normalized", normal, torch.einsum("bhls,bshp->blhp", weights, v), dtype=torch.float64)
