"""The kernels against the float64 recurrence: in Triton's interpreter, on a GPU as they are."""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from dualscan.ops import _dispatch, _triton
from dualscan.ops.selective_scan import OPERATOR, STEP_OPERATOR, configs, library, selective_scan, selective_scan_step
from tests.ops.selective_scan.problems import CORNERS, scan_problem
from tests.ops.selective_scan.test_boundary import arguments
from tests.oracle import assert_close
from tests.strategies import Problem, assert_matches, evaluate, packed

FORWARD = torch.ops.dualscan.selective_scan_kernel_fwd.default
BACKWARD = torch.ops.dualscan.selective_scan_kernel_bwd.default
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [] if CUDA else [pytest.mark.usefixtures("interpreter")]
# The interpreter is slow: there the corners are small, and float16 takes those that reach every branch.
SMALL: dict[str, dict[str, Any]] = {
    "everything": {"seqlen": 11, "batch": 1},
    "everything packed": {"lengths": [1, 0, 10, 4], "channels": 5},
    "groups": {"seqlen": 5, "batch": 1, "channels": 6},
    "a group a channel": {"seqlen": 3, "channels": 2, "ngroups": 2},
    "odd sizes": {"seqlen": 9, "batch": 1},
    "equal packs": {"lengths": [5, 5], "channels": 4},
    "one pack": {"lengths": [7], "channels": 4},
}
FEW = ["everything", "everything packed"]
# What segments change; on a GPU they take every corner.
CUT = [
    *FEW,
    "plain",
    "groups",
    "odd sizes",
    "equal packs",
    "one token",
    "no tokens",
    "no batch",
    "no packs",
    "fast decay",
]
RUNS = [("whole", name, torch.float32) for name in CORNERS]
RUNS += [("split", name, torch.float32) for name in (CORNERS if CUDA else CUT)]
for dtype in (torch.float16, torch.bfloat16)[: 1 + CUDA]:
    RUNS += [(tiles, name, dtype) for tiles in ("whole", "split") for name in (CORNERS if CUDA else FEW)]


@pytest.fixture(autouse=True)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences in segments of one tile or whole; in the interpreter with few tokens a tile, for its time's sake."""
    rows = {} if CUDA else {"rows": 4}
    if not CUDA:
        monkeypatch.setattr(configs, "KEPT", 8)
    whole = getattr(request, "param", "split") == "whole"
    split = {"resident": 0.001} if whole else {"resident": 10**9, "least": 1}
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(configs, name, replace(getattr(configs, name), **rows, **split))


whole_and_split = pytest.mark.parametrize("tiles", ["whole", "split"], indirect=True)


def on_device(problem: Problem) -> Problem:
    tensors = {name: t.to(DEVICE) for name, t in problem.tensors.items()}
    options = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in problem.options.items()}
    return replace(
        problem, tensors=tensors, dy=problem.dy.to(DEVICE), dfinal=problem.dfinal.to(DEVICE), options=options
    )


def compare(problem: Problem, dtype: torch.dtype) -> None:
    oracle = evaluate(problem.double(), impl="recurrent")
    # A gradient of one number may be right by luck, which is nothing to measure others by.
    lone = any(t.numel() == 1 for t in oracle.values())
    yardstick = None if lone else evaluate(problem, impl="recurrent")
    result = {name: t.cpu() for name, t in evaluate(on_device(problem), impl="triton").items()}
    assert_matches(result, oracle, dtype=dtype, yardstick=yardstick)


@pytest.mark.parametrize(("tiles", "corner", "dtype"), RUNS, indirect=["tiles"])
def test_corners(corner: str, dtype: torch.dtype) -> None:
    small = {"d_state": 3, "batch": 1, "seqlen": 9, "channels": 5}
    sizes = CORNERS[corner] if CUDA else {**small, **CORNERS[corner], **SMALL.get(corner, {})}
    compare(scan_problem(dtype=dtype, **sizes), dtype)


@pytest.mark.parametrize(("rows", "warps"), [pytest.param(4, 1, marks=pytest.mark.slow_interpreted), (8, 2)])
def test_other_tiles(rows: int, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens at a time are more states at a time."""
    monkeypatch.setattr(configs, "KEPT", 16)
    for name in ("FORWARD", "BACKWARD"):
        tile = replace(getattr(configs, name), rows=rows, warps=warps, channels=32 * warps)
        monkeypatch.setattr(configs, name, tile)
    given = dict.fromkeys(("D", "z", "dt_bias", "states"), True)
    compare(scan_problem(batch=1, seqlen=33, channels=4, d_state=3, **given), torch.float32)
    compare(scan_problem(lengths=[17, 0, 15], channels=33, d_state=1, **given), torch.float32)


@pytest.mark.parametrize("through", ["y", "final_states"])
def test_gradients_through_one_result(through: str) -> None:
    problem = scan_problem(batch=1, seqlen=6, channels=4, d_state=2, z=True, states=True)
    oracle = evaluate(problem.double(), through=(through,), impl="recurrent")
    result = evaluate(on_device(problem), through=(through,), impl="triton")
    assert_matches({name: t.cpu() for name, t in result.items()}, oracle, dtype=torch.float32)


def test_views_and_mixed_dtypes() -> None:
    """Slices of one projection are read where they are; Δ keeps its own dtype."""
    problem = scan_problem(seqlen=6, D=True, z=True, dt_bias=True, states=True)
    wide = torch.randn(2, 6, 64)
    views = {"x": wide[..., 1:7], "z": wide[..., 7:13], "B": wide[..., 13:17], "C": wide[..., 20:24]}
    views["dt"] = wide[..., 30:36].half()
    views["A"] = problem.tensors["A"].t().contiguous().t()
    # What Δ and its gradient are rounded to.
    compare(problem.having(**views), torch.float16)


def test_runs_repeat_to_the_bit_and_leave_inputs_alone() -> None:
    problem = on_device(scan_problem(batch=1, seqlen=5, channels=5, D=True, z=True, dt_bias=True, states=True))
    before = {name: t.clone() for name, t in problem.tensors.items()}
    first, second = evaluate(problem, impl="triton"), evaluate(problem, impl="triton")
    for name, t in first.items():
        assert torch.equal(t, second[name]), name
    for name, t in before.items():
        assert torch.equal(problem.tensors[name], t), name


@pytest.mark.parametrize("ngroups", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step(dtype: torch.dtype, ngroups: int | None) -> None:
    given = dict.fromkeys(("D", "z", "dt_bias"), ngroups is None)
    problem = on_device(scan_problem(seqlen=1, d_state=5, ngroups=ngroups, dtype=dtype, states=True, **given))
    t = problem.tensors
    token = {name: t[name][:, 0] for name in ("x", "dt", "B", "C", "z") if name in t}
    shared = {name: t.get(name) for name in ("A", "D", "dt_bias")}
    before = t["initial_states"].clone()
    run = partial(selective_scan_step, t["initial_states"], **token, **shared, dt_softplus=ngroups is None)
    actual, expected = run(impl="triton"), problem.double()(impl="recurrent")
    assert_close("y", actual.y, expected.y[:, 0], dtype=dtype)
    assert_close("state", actual.final_states, expected.final_states, dtype=torch.float32)
    assert torch.equal(before, t["initial_states"])
    inputs = [t["initial_states"], *(token[name] for name in ("x", "dt")), t["A"], token["B"], token["C"]]
    inputs[4:] = [c if c.ndim == 3 else c.unsqueeze(1) for c in inputs[4:]]
    torch.library.opcheck(library.step_kernel, [*inputs, None, None, None, True])
    with pytest.raises(
        ValueError, match="impl='triton' cannot run on these inputs: the kernel of one token has no grad"
    ):
        run(impl="triton", A=t["A"].clone().requires_grad_())


@pytest.mark.parametrize("which", ["bare", pytest.param("packed", marks=pytest.mark.slow_interpreted)])
def test_opcheck(which: str) -> None:
    plain = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in arguments(which, seqlen=3)]
    leaves = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in plain]
    for keep in (True, False):
        torch.library.opcheck(FORWARD, [*leaves, keep])
        y, states, kept = FORWARD(*plain, keep)
        torch.library.opcheck(BACKWARD, [y, states, kept, *plain, keep])


@pytest.mark.parametrize("lengths", [None, [5, 0, 7]])
def test_compiles_to_one_graph(lengths: list[int] | None) -> None:
    torch._dynamo.reset()
    problem = on_device(scan_problem(batch=1, seqlen=12, channels=3, d_state=2, lengths=lengths, D=True, z=True))
    whole = torch.compile(partial(selective_scan, impl="triton"), fullgraph=True, backend="aot_eager")
    result = evaluate(replace(problem, face=whole))
    for name, expected in evaluate(problem, impl="triton").items():
        assert torch.equal(result[name], expected), name


def test_float64_is_refused() -> None:
    problem = scan_problem(seqlen=3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run on these inputs: .*float64.*impl='auto'"):
        on_device(problem)(impl="triton")


def test_auto_takes_the_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    for capability, taken in (((9, 0), ["triton", "triton"]), ((7, 5), ["chunked", "recurrent"])):
        monkeypatch.setattr(_triton, "capability", lambda device, known=capability: known)
        assert [_dispatch.choose(operator, "auto", gpu) for operator in (OPERATOR, STEP_OPERATOR)] == taken


def test_states_are_kept_for_a_gradient_only() -> None:
    shapes = []
    for requires in (False, True):
        tensors = on_device(scan_problem(lengths=[9, 3], D=True)).tensors
        x = tensors["x"].requires_grad_(requires)
        result = selective_scan(**tensors | {"x": x}, cu_seqlens=packed([9, 3]).to(DEVICE), impl="triton")
        shapes.append([t.shape for t in saved(result.y)])
    assert not shapes[0]
    assert configs.kept_states(x, tensors["A"], packed([9, 3])) in shapes[1]


def saved(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the graph keeps of a call."""
    node: Any = y.grad_fn
    return () if node is None else tuple(t for t in node.saved_tensors if t is not None)


@whole_and_split
@pytest.mark.cuda
def test_large_sizes_on_the_device() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = scan_problem(
            seqlen=700, channels=192, d_state=16, dtype=dtype, D=True, z=True, dt_bias=True, states=True
        )
        expected = on_device(problem.double())(impl="chunked")
        with warnings.catch_warnings(action="error"):  # no slow path is announced
            actual = on_device(problem)()
        assert_close("y", actual.y, expected.y, dtype=dtype)
        assert_close("states", actual.final_states, expected.final_states, dtype=torch.float32)
