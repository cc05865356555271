"""The kernels against the float64 recurrence: in Triton's interpreter, on a GPU as they are."""

from dataclasses import replace

import pytest
import torch

from dualscan.ops.selective_scan import configs
from tests.ops.selective_scan.problems import CORNERS, scan_problem
from tests.oracle import assert_close
from tests.strategies import Problem, assert_matches, evaluate

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [] if CUDA else [pytest.mark.usefixtures("interpreter")]
# The interpreter is slow: there float16 takes the corners that reach every branch.
FEW = ["everything", "everything packed", "groups"]
RUNS = [(name, torch.float32) for name in CORNERS]
RUNS += [(name, dtype) for dtype in (torch.float16, torch.bfloat16)[: 1 + CUDA] for name in (CORNERS if CUDA else FEW)]


@pytest.fixture(params=["cut", "whole"] if CUDA else ["cut"], autouse=True)
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few tokens and channels, so that small inputs have edges inside; or as they are."""
    pytest.importorskip("triton")
    from dualscan.ops.selective_scan import triton_scan

    if request.param == "cut":
        monkeypatch.setattr(triton_scan, "FORWARD", replace(configs.FORWARD, channels=4, rows=4))
        monkeypatch.setattr(triton_scan, "BACKWARD", replace(configs.BACKWARD, channels=4, rows=4, kept=2))


def on_device(problem: Problem) -> Problem:
    tensors = {name: t.to(DEVICE) for name, t in problem.tensors.items()}
    options = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in problem.options.items()}
    return replace(
        problem, tensors=tensors, dy=problem.dy.to(DEVICE), dfinal=problem.dfinal.to(DEVICE), options=options
    )


def compare(problem: Problem, dtype: torch.dtype) -> None:
    oracle = evaluate(problem.double(), impl="recurrent")
    yardstick = evaluate(problem, impl="recurrent")
    result = {name: t.cpu() for name, t in evaluate(on_device(problem), impl="triton").items()}
    assert_matches(result, oracle, dtype=dtype, yardstick=yardstick)


@pytest.mark.parametrize(("corner", "dtype"), RUNS)
def test_corners(corner: str, dtype: torch.dtype) -> None:
    sizes = {"seqlen": 11, "channels": 5} if "seqlen" not in CORNERS[corner] else {}
    if "lengths" in CORNERS[corner] or CORNERS[corner].get("ngroups", 1) != 1:
        sizes = {}
    compare(scan_problem(dtype=dtype, **{"d_state": 3, "batch": 1, **sizes, **CORNERS[corner]}), dtype)


@pytest.mark.parametrize("through", ["y", "final_states"])
def test_gradients_through_one_result(through: str) -> None:
    problem = scan_problem(seqlen=6, z=True, states=True)
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
    problem = on_device(scan_problem(seqlen=9, D=True, z=True, dt_bias=True, states=True))
    before = {name: t.clone() for name, t in problem.tensors.items()}
    first, second = evaluate(problem, impl="triton"), evaluate(problem, impl="triton")
    for name, t in first.items():
        assert torch.equal(t, second[name]), name
    for name, t in before.items():
        assert torch.equal(problem.tensors[name], t), name


def test_float64_is_refused() -> None:
    problem = scan_problem(seqlen=3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run on these inputs: .*float64.*impl='auto'"):
        on_device(problem)(impl="triton")


@pytest.mark.cuda
def test_large_sizes_on_the_device() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = scan_problem(
            seqlen=700, channels=192, d_state=16, dtype=dtype, D=True, z=True, dt_bias=True, states=True
        )
        expected = on_device(problem.double())(impl="chunked")
        actual = on_device(problem)(impl="triton")
        assert_close("y", actual.y, expected.y, dtype=dtype)
        assert_close("states", actual.final_states, expected.final_states, dtype=torch.float32)
