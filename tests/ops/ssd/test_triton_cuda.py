"""What only a GPU shows: the Hopper kernels, graphs, compilation, streams, and tensors of more than 2^31 elements."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dualscan.ops.ssd import ssd
from tests.ops.ssd.test_triton import elsewhere, on_device
from tests.strategies import assert_matches, evaluate, ssd_problem

pytestmark = pytest.mark.cuda
# Whole chunks of 64 tokens and 64 columns: what the Hopper kernels take.
EVEN: dict[str, Any] = {"headdim": 64, "d_state": 128, "ngroups": 1, "seqlen": 256}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"D": "scalar", "dt_bias": True, "states": True},
        {"D": "vector", "states": True},
        {"headdim": 128, "d_state": 64, "ngroups": 2, "dt_bias": True, "D": "scalar"},
        {"batch": 1, "seqlen": 4096, "states": True},
        {"decay": 1e4},
        {"decay": 1e-6},
        {"d_state": 256, "D": "scalar", "states": True},
        {"d_state": 256, "batch": 1, "seqlen": 2000, "ngroups": 2},
        {"seqlen": 333, "D": "vector", "states": True},
        {"lengths": [70, 0, 1, 500, 64, 33], "D": "scalar", "dt_bias": True, "states": True},
        {"lengths": [70, 900, 1], "d_state": 256, "states": True},
    ],
)
def test_even_shapes(options: dict[str, Any], dtype: torch.dtype) -> None:
    problem = on_device(ssd_problem(dtype=dtype, **{**EVEN, **options}))
    oracle = evaluate(problem.double(), impl="chunked")
    assert_matches(evaluate(problem, impl="triton"), oracle, dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"nheads": 5, "ngroups": 1, "D": "scalar", "dt_bias": True, "states": True},
        {"nheads": 6, "ngroups": 2, "states": True},
        {"nheads": 6, "ngroups": 3, "d_state": 64, "headdim": 128, "D": "scalar"},
        {"nheads": 4, "ngroups": 1, "D": "vector"},
        {"batch": 1, "seqlen": 2048, "nheads": 4, "ngroups": 1, "states": True},
    ],
)
def test_backward_in_slices_of_heads(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from dualscan.ops.ssd import configs

    monkeypatch.setattr(configs, "_heads_at_once", lambda *_: 2)
    problem = on_device(ssd_problem(dtype=torch.bfloat16, **(EVEN | options)))
    expected = evaluate(problem.double(), impl="recurrent")
    for keep in (True, False):
        assert_matches(evaluate(problem, impl="triton", keep_states=keep), expected, dtype=torch.bfloat16)


def test_backward_in_parts_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualscan.ops.ssd import configs

    monkeypatch.setattr(configs, "SCRATCH_OF_ROWS", 1)
    problem = on_device(ssd_problem(dtype=torch.bfloat16, D="scalar", dt_bias=True, states=True, **EVEN))
    got, again = (evaluate(problem, impl="triton", keep_states=False) for _ in range(2))
    assert_matches(got, evaluate(problem.double(), impl="recurrent"), dtype=torch.bfloat16)
    assert all(torch.equal(got[name], again[name]) for name in got)


def test_hopper_and_plain_kernels_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualscan.ops.ssd import configs, triton_scan

    problem = on_device(ssd_problem(dtype=torch.bfloat16, D="scalar", states=True, **EVEN))
    fast, again = evaluate(problem, impl="triton"), evaluate(problem, impl="triton")
    monkeypatch.setattr(triton_scan, "_FAMILIES", {})
    monkeypatch.setattr(configs, "on_hopper", lambda _: False)
    plain = evaluate(problem, impl="triton")
    for name in plain:
        assert torch.equal(fast[name], again[name]), name
    assert_matches(fast, {name: t.double() for name, t in plain.items()}, dtype=torch.bfloat16)


def test_graph_capture_and_streams() -> None:
    problem = on_device(ssd_problem(dtype=torch.bfloat16, D="scalar", dt_bias=True, **EVEN))
    expected = evaluate(problem, impl="triton")
    on_side, captured = elsewhere(problem)
    for name in expected:
        assert torch.equal(on_side[name], expected[name]), name
        assert torch.equal(captured[name], expected[name]), name


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ssd, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (128, 192):
        problem = on_device(ssd_problem(dtype=torch.bfloat16, D="scalar", dt_bias=True, **{**EVEN, "seqlen": seqlen}))
        expected = evaluate(problem)
        result = evaluate(replace(problem, face=compiled))
        for name in expected:
            assert torch.equal(result[name], expected[name]), name


def test_more_than_two_to_the_31_elements() -> None:
    nheads, headdim, seqlen, tail = 80, 64, 420_032, 2048
    assert seqlen * nheads * headdim > 2**31
    x = torch.randn(1, seqlen, nheads, headdim, device="cuda", dtype=torch.bfloat16)
    B, C = torch.randn(2, 1, seqlen, 1, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    dt, A = torch.ones(1, seqlen, nheads, device="cuda"), -torch.ones(nheads, device="cuda")
    y = ssd(x, dt, A, B, C, impl="triton").y[:, -tail // 2 :]
    # With these decays nothing older than the tail's first half is left.
    last = ssd(x[:, -tail:], dt[:, -tail:], A, B[:, -tail:], C[:, -tail:], impl="triton").y[:, -tail // 2 :]
    assert_matches({"y": y}, {"y": last.double()}, dtype=torch.bfloat16)
