"""The kernels against the float64 recurrence: in Triton's interpreter (float32, float16), on a GPU as they are."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops.ssd import configs, linear_attention, ssd, ssd_step
from tests.ops.ssd.test_parity import ATTENTION_CORNERS, SSD_CORNERS
from tests.oracle import assert_close
from tests.strategies import Problem, assert_matches, attention_problem, evaluate, ssd_problem

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [] if CUDA else [pytest.mark.usefixtures("interpreter")]

# Too many programs for the interpreter.
LARGE = {"more rows than fit the cache", "more packs than fit the cache"}
CORNERS = {name: options for name, options in SSD_CORNERS.items() if name not in LARGE}
# Tiles: widths that are no power of two, several blocks of headdim, the widest state.
TILES: dict[str, dict[str, Any]] = {
    "odd tiles": {"headdim": 24, "d_state": 40, "D": "vector"},
    "blocks of columns": {"headdim": 80, "D": "vector"},
    "blocks of columns, scalar D": {"headdim": 72, "D": "scalar"},
    "widest state": {"d_state": 256, "D": "scalar"},
    "several chunks": {"seqlen": 150, "D": "scalar"},
}
# The interpreter is slow: there float16 takes the corners that reach every branch.
FEW = ["everything", "everything packed", "odd sizes"]
RUNS = [(name, torch.float32) for name in CORNERS]
RUNS += [(name, dtype) for dtype in (torch.float16, torch.bfloat16)[: 1 + CUDA] for name in (CORNERS if CUDA else FEW)]


def elsewhere(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the kernels give on another stream of a GPU, and in a CUDA graph that was replayed twice."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = evaluate(problem, impl="triton")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        captured = evaluate(problem, impl="triton")
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    return on_side, captured


def on_device(problem: Problem) -> Problem:
    options = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in problem.options.items()}
    tensors = {name: t.to(DEVICE) for name, t in problem.tensors.items()}
    dy, dfinal = problem.dy.to(DEVICE), problem.dfinal.to(DEVICE)
    return replace(problem, tensors=tensors, dy=dy, dfinal=dfinal, options=options)


def compare(problem: Problem, dtype: torch.dtype) -> None:
    problem = on_device(problem)
    oracle = evaluate(problem.double(), impl="recurrent")
    assert_matches(evaluate(problem, impl="triton"), oracle, dtype=dtype)


@pytest.mark.parametrize(("corner", "dtype"), RUNS)
def test_ssd(corner: str, dtype: torch.dtype) -> None:
    compare(ssd_problem(dtype=dtype, **CORNERS[corner]), dtype)


@pytest.mark.parametrize("corner", sorted(ATTENTION_CORNERS))
def test_linear_attention(corner: str) -> None:
    compare(attention_problem(**ATTENTION_CORNERS[corner]), torch.float32)


@pytest.mark.parametrize("tile", TILES)
def test_tiles(tile: str) -> None:
    compare(ssd_problem(batch=1, nheads=2, ngroups=1, states=True, **TILES[tile]), torch.float32)


@pytest.mark.parametrize("lengths", [None, [70, 0, 33, 1, 130]])
def test_split_sequences(lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualscan.ops.ssd import triton_scan

    monkeypatch.setattr(triton_scan, "_FAMILIES", {})
    monkeypatch.setattr(triton_scan, "_segment", lambda *_: 64)
    problem = ssd_problem(batch=1, seqlen=200, nheads=2, ngroups=1, lengths=lengths, D="scalar", states=True)
    compare(problem, torch.float32)


SLICED: dict[str, dict[str, Any]] = {
    "parts of a group": {"nheads": 5, "ngroups": 1, "D": "scalar", "dt_bias": True, "states": True},
    "parts of groups": {"nheads": 6, "ngroups": 2, "D": "vector", "states": True},
    "whole groups": {"nheads": 6, "ngroups": 3, "D": "scalar", "dt_bias": True},
    "groups of one": {"nheads": 3, "ngroups": 3},
    "packed": {"batch": 1, "nheads": 3, "ngroups": 1, "lengths": [40, 0, 33, 1], "states": True},
}


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.float16, marks=pytest.mark.slow_interpreted),
        *([torch.bfloat16] if CUDA else []),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", SLICED)
def test_backward_in_slices_of_heads(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_heads_at_once", lambda *_: 2)
    compare(ssd_problem(seqlen=70, dtype=dtype, **SLICED[name]), dtype)


@pytest.mark.parametrize(
    "problem",
    [
        partial(ssd_problem, D="scalar", dt_bias=True, states=True),
        pytest.param(partial(ssd_problem, D="vector"), marks=pytest.mark.slow_interpreted),
        pytest.param(partial(attention_problem, states=True), marks=pytest.mark.slow_interpreted),
    ],
    ids=["shared", "vector D", "log-decay per token"],
)
def test_backward_in_parts_of_the_batch(problem: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    """What all rows share has a gradient that is the sum of the parts'; the last part is smaller."""
    from dualscan.ops.ssd import triton_gradients

    ours, sizes, heads = on_device(problem(batch=3, seqlen=70)), [], triton_gradients._heads
    monkeypatch.setattr(configs, "rows_at_once", lambda *_: 2)
    monkeypatch.setattr(triton_gradients, "_heads", lambda i, *rest: sizes.append(len(i.x)) or heads(i, *rest))
    expected = evaluate(ours.double(), impl="recurrent")
    assert_matches(evaluate(ours, impl="triton", keep_states=False), expected, dtype=torch.float32)
    assert sizes == [2, 1]
    evaluate(ours, impl="triton")
    assert sizes[2:] == [3]


def test_slices_of_the_backward() -> None:
    from dualscan.ops.ssd.configs import _heads_at_once, head_slices, rows_at_once

    assert head_slices(80, 1, 32) == [(0, 32), (32, 64), (64, 80)]
    assert head_slices(6, 2, 2) == [(0, 2), (2, 3), (3, 5), (5, 6)]
    assert head_slices(128, 8, 64) == [(0, 64), (64, 128)]
    assert head_slices(6, 3, 5) == [(0, 4), (4, 6)]
    # All fit. Whole groups: as many as fill 264 places once, or as the memory holds where sequences are split.
    assert _heads_at_once(24, 24, 16, 2**23, 264) == 24
    assert _heads_at_once(128, 16, 4, 2**23, 264) == 64
    assert _heads_at_once(128, 16, 1, 2**24, 264) == 16
    # One group: all of it up to 2 GiB, then parts.
    assert _heads_at_once(80, 80, 8, 2**23, 264) == 80
    assert _heads_at_once(80, 80, 1, 2**26, 264) == 32
    assert _heads_at_once(80, 80, 1, 2**30, 264) == 8
    # Rows of the batch, of 16 and 32 MiB of states each.
    x, B = (torch.empty(4, 1024, n, k, device="meta") for n, k in ((16, 64), (1, 128)))
    assert [rows_at_once(x[:, :n], B[:, :n]) for n in (512, 1024)] == [2, 1]


def test_segments_fill_the_gpu() -> None:
    from dualscan.ops.ssd.triton_scan import SHORTEST_SEGMENT, _segment

    # Enough sequences and heads: a segment holds any of them whole. Too few: several, of whole super-chunks.
    assert _segment(2048, 640, 64, 1, 264) > 2048
    for every in (1, 4):
        for seqlen, programs in ((16384, 80), (4096, 24), (131072, 80), (100_001, 1)):
            segment = _segment(seqlen, programs, 64, every, 264)
            assert segment % (64 * every) == 0
            assert SHORTEST_SEGMENT <= segment <= seqlen // 2
    assert _segment(300, 1, 64, 1, 264) > 300
    assert _segment(300, 0, 64, 4, 264) > 300


def test_a_packed_plan_lives_as_long_as_its_boundaries() -> None:
    def table(bounds: Tensor) -> _triton.Plan:
        return _triton.plan(bounds, 1, 100, 32, 1, 128, bounds.device)

    bounds = torch.tensor([0, 40, 100], dtype=torch.int32, device=DEVICE)
    first = table(bounds)
    assert table(bounds) is first
    assert table(bounds.clone()) is not first
    bounds[1] = 70
    changed = table(bounds)
    assert changed.sequences.shape == first.sequences.shape
    assert changed.segments[:, 2].tolist() == [70, 100]
    assert first.segments[:, 2].tolist() == [40, 100]


@pytest.mark.parametrize("bounds", [None, [0, 150, 150, 151, 400]])
def test_edges_of_sequences(bounds: list[int] | None) -> None:
    packed = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    batch = 2 if bounds is None else 1
    plan = _triton.plan(packed, batch, 400, 32, 2, 128, torch.device("cpu"))
    lengths = [400, 400] if bounds is None else [end - start for start, end in itertools.pairwise(bounds)]
    for i, length in enumerate(lengths):
        own = plan.segments[plan.segments[:, 4] == i]
        assert (own[:, 2] - own[:, 1]).sum() == length
        real = own[own[:, 5] > 0] if len(own) > 1 else own
        assert (real[0, 5] & 1, real[-1, 5] & 2) == (1, 2)
        # Each sequence has one first and one last segment, and no other says that it is.
        assert (own[:, 5] & 1).sum() == 1
        assert (own[:, 5] & 2).sum() == 2
    if bounds is None:
        assert plan.before.shape[0] == plan.segments.shape[0] - batch == plan.after.shape[0]


def test_views_of_one_projection() -> None:
    problem = ssd_problem(batch=2, nheads=2, headdim=16, ngroups=1, d_state=16)
    t = problem.tensors
    joint = torch.cat([t[name].flatten(2) for name in ("x", "B", "C")], -1)
    x, B, C = joint.split([32, 16, 16], -1)
    views = problem.having(x=x.unflatten(-1, (2, 16)), B=B.unsqueeze(2), C=C.unsqueeze(2))
    assert not views.tensors["x"].is_contiguous()
    compare(views, torch.float32)
    # A broadcast gradient, as y.sum() gives, and transposed inputs.
    x = t["x"].transpose(-1, -2).contiguous().transpose(-1, -2)
    compare(replace(problem.having(x=x), dy=torch.ones(1).expand(problem.dy.shape)), torch.float32)


def test_alignment_is_no_secret() -> None:
    # The same sizes and strides at an odd address, then at an even one again: compiled kernels are kept by both.
    problem = ssd_problem(batch=1, seqlen=64, nheads=2, headdim=16, ngroups=1, d_state=16)
    x = problem.tensors["x"]
    on_gpu = on_device(problem)
    moved = torch.empty(x.numel() + 1, device=DEVICE)[1:].view(x.shape).copy_(x)
    assert moved.data_ptr() % 16
    oracle = evaluate(on_gpu.double(), impl="recurrent")
    for variant in (on_gpu, on_gpu.having(x=moved), on_gpu):
        assert_matches(evaluate(variant, impl="triton"), oracle, dtype=torch.float32)


@pytest.mark.parametrize("options", [{}, {"D": "vector", "z": True, "dt_bias": True, "dt_limit": (0.1, 0.9)}])
def test_one_token(options: dict[str, Any]) -> None:
    problem = on_device(ssd_problem(seqlen=1, headdim=40, d_state=24, states=True, **options))
    t = problem.double().tensors

    def run(t: dict[str, Tensor], impl: str) -> Any:
        per_token = {name: t[name][:, 0] for name in ("x", "dt", "B", "C", "z") if name in t}
        shared = {name: t[name] for name in ("A", "D", "dt_bias") if name in t}
        return ssd_step(t["initial_states"], **per_token, **shared, **problem.options, impl=impl)

    expected = run(t, "recurrent")
    for name, actual in run(problem.tensors, "triton")._asdict().items():
        assert_close(name, actual, getattr(expected, name), dtype=torch.float32)
    state = problem.tensors["initial_states"].requires_grad_()
    with pytest.raises(ValueError, match=r"ssd_step: impl='triton' .* has no gradient; use impl='auto'"):
        run({**problem.tensors, "initial_states": state}, "triton")


def test_repeats_bitwise() -> None:
    problem = on_device(ssd_problem(seqlen=70, states=True, D="scalar", dt_bias=True))
    first, second = evaluate(problem, impl="triton"), evaluate(problem, impl="triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_packed_equals_separate_bitwise() -> None:
    lengths = [33, 1, 40]
    whole = on_device(ssd_problem(lengths=lengths, nheads=2, ngroups=1, headdim=16, states=True))
    output = whole(impl="triton")
    start = 0
    for i, length in enumerate(lengths):
        own = {name: whole.tensors[name][:, start : start + length].clone() for name in ("x", "dt", "B", "C")}
        states = whole.tensors["initial_states"][i : i + 1]
        alone = ssd(**own, A=whole.tensors["A"], initial_states=states, impl="triton")
        assert torch.equal(alone.y, output.y[:, start : start + length])
        assert torch.equal(alone.final_states[0], output.final_states[i])
        start += length


def test_what_the_kernels_cannot_compute() -> None:
    x, dt, A = (
        torch.zeros(1, 2, 1, 4, device=DEVICE),
        torch.zeros(1, 2, 1, device=DEVICE),
        -torch.ones(1, device=DEVICE),
    )
    wide = torch.zeros(1, 2, 1, configs.MAX_D_STATE + 1, device=DEVICE)
    with pytest.raises(ValueError, match=r"ssd: impl='triton' cannot run on these inputs: d_state=257 is above 256"):
        ssd(x, dt, A, wide, wide, impl="triton")
    double = wide.double()
    with pytest.raises(ValueError, match=r"linear_attention: impl='triton' .* not torch.float64; use impl='auto'"):
        linear_attention(double, double, x.double(), impl="triton")


def test_kernels_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, dt, A = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1), -torch.ones(1)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run on cpu: .* NVIDIA GPU; use impl='auto'"):
        ssd(x, dt, A, x, x, impl="triton")
    # Without Triton, the message says which package is missing.
    monkeypatch.setattr(_triton, "_installed", lambda: False)
    assert "pip install triton" in str(_triton.obstacle(torch.device("cuda")))
