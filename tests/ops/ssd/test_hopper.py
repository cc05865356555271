"""The Hopper kernels against the float64 recurrence, in the emulator of Gluon."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import gluon
from tests.gluon import compiled
from tests.strategies import assert_matches, evaluate, ssd_problem

FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
# What the Hopper kernels take: 64 columns, states of 64, 128 or 256. A super-chunk has two chunks of 64 tokens here.
EVERY = 2
BASE: dict[str, Any] = {"batch": 1, "seqlen": 192, "nheads": 1, "ngroups": 1, "headdim": 64, "d_state": 64}
EVERYTHING: dict[str, Any] = {"D": "scalar", "dt_bias": True, "states": True}
CASES: dict[str, dict[str, Any]] = {
    "one chunk": {"seqlen": 64, "d_state": 128},
    "several chunks": {"nheads": 2, "d_state": 128, **EVERYTHING},
    "batch": {"batch": 2, "seqlen": 128},
    # The gradient kernel's programs take all of them, one after the other, through two slots.
    "several heads a program": {"nheads": 5, "seqlen": 256, **EVERYTHING},
    "vector D": {"D": "vector", "states": True},
    "groups": {"nheads": 4, "ngroups": 2, "seqlen": 128, **EVERYTHING},
    "two blocks": {"headdim": 128, "seqlen": 128, "D": "vector", "dt_bias": True},
    "wide state": {"d_state": 256, "states": True},
    "a sequence ends inside a chunk": {"seqlen": 150, "batch": 2, **EVERYTHING},
    "wide state, and ends inside a chunk": {"d_state": 256, "seqlen": 100},
    "shorter than a chunk": {"seqlen": 5, "D": "vector"},
    "packed": {"lengths": [70, 0, 1, 130], "D": "scalar", "states": True},
    "fast decay": {"decay": 1e4},
    "slow decay": {"decay": 1e-6},
}
KERNELS = {"scan_hopper_kernel", "gradient_hopper_kernel", "finish_kernel"}


@pytest.fixture(autouse=True)
def _every(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualscan.ops.ssd import configs

    monkeypatch.setattr(configs, "HOPPER_EVERY", EVERY)


def compare(dtype: torch.dtype, options: dict[str, Any], **others: Any) -> None:
    problem = ssd_problem(dtype=dtype, **{**BASE, **options})
    expected = evaluate(problem.double(), impl="recurrent")
    assert_matches(evaluate(problem, impl="triton", **others), expected, dtype=dtype)


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str, hopper: list[str]) -> None:
    compare(BFLOAT16, CASES[case])
    assert set(hopper) >= KERNELS


@pytest.mark.parametrize("case", ["several chunks", "packed"])
def test_float16(case: str, hopper: list[str]) -> None:
    compare(FLOAT16, CASES[case])
    assert set(hopper) >= KERNELS


@pytest.mark.parametrize("lengths", [None, [150, 0, 20, 200]], ids=str)
def test_split_sequences(lengths: list[int] | None, hopper: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dualscan.ops.ssd import triton_scan

    monkeypatch.setattr(triton_scan, "_segment", lambda *_: 128)
    compare(BFLOAT16, {"seqlen": 330, "states": True, "lengths": lengths})
    assert "combine_kernel" in hopper


@pytest.mark.parametrize("options", [{"nheads": 3, **EVERYTHING}, {"nheads": 4, "ngroups": 2}], ids=str)
def test_backward_in_slices_of_heads(
    options: dict[str, Any], hopper: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the forward keeps no states: there the backward takes so many heads at a time as its memory holds."""
    from dualscan.ops.ssd import configs

    monkeypatch.setattr(configs, "_heads_at_once", lambda *_: 2)
    compare(BFLOAT16, {"seqlen": 130, **options}, keep_states=False)
    assert hopper.count("gradient_hopper_kernel") == 2


def test_backward_in_parts_of_the_batch(hopper: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dualscan.ops.ssd import configs

    monkeypatch.setattr(configs, "SCRATCH_OF_ROWS", 1)
    compare(BFLOAT16, {"batch": 2, "nheads": 2, "seqlen": 130, **EVERYTHING}, keep_states=False)
    assert hopper.count("gradient_hopper_kernel") == 2


def test_parts_of_a_group(hopper: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dualscan.ops.ssd import triton_gradients

    # As on a GPU that one program a group does not fill.
    monkeypatch.setattr(triton_gradients, "_head_parts", lambda *_: 2)
    compare(BFLOAT16, {"nheads": 4, "seqlen": 128, **EVERYTHING})
    assert set(hopper) >= KERNELS


def test_nothing_passes_from_sequence_to_sequence(hopper: list[str]) -> None:
    """Chunks reach into the next sequence: what is not finite there stays there."""
    problem = ssd_problem(dtype=BFLOAT16, **{**BASE, "lengths": [70, 30]})
    tensors = {name: t.clone() for name, t in problem.tensors.items()}
    dy = problem.dy.clone()
    for t in (tensors["x"], tensors["B"], tensors["C"], tensors["dt"], dy):
        t[:, 70:] = float("nan")
    poisoned = evaluate(replace(problem, tensors=tensors, dy=dy), impl="triton")
    clean = evaluate(problem, impl="triton")
    for name in ("y", "dx", "ddt", "dB", "dC"):
        assert torch.equal(poisoned[name][:, :70], clean[name][:, :70]), name
    assert torch.equal(poisoned["final_states"][0], clean["final_states"][0])


@pytest.mark.parametrize("seqlen", [40, 130])
def test_uneven_inputs_are_copied(seqlen: int, hopper: list[str]) -> None:
    """Else the forward would keep states, or seem to, that the backward does not know."""
    problem = ssd_problem(dtype=BFLOAT16, **{**BASE, "seqlen": seqlen, "nheads": 2})
    x, B = problem.tensors["x"], problem.tensors["B"]
    wide = torch.stack([x, x], 3).flatten(2, 3)[:, :, ::2]
    odd = torch.empty(B.numel() + 1, dtype=B.dtype)[1:].view(B.shape).copy_(B)
    assert wide.stride(2) != x.stride(2)
    assert odd.data_ptr() % 16
    got, expected = (evaluate(p, impl="triton") for p in (problem.having(x=wide, B=odd), problem))
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name
    assert set(hopper) >= KERNELS


def test_states_are_kept_for_a_backward_alone(hopper: list[str]) -> None:
    from dualscan.ops.ssd import configs

    problem = ssd_problem(dtype=BFLOAT16, **{**BASE, "seqlen": 300})
    x, B = problem.tensors["x"], problem.tensors["B"]
    assert configs.saved_states(x, B, None) == (3, 1, 64, 64)
    evaluate(problem, impl="triton")
    assert hopper.count("scan_hopper_kernel") == 2


def test_kept_states_are_rounded_once(hopper: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not their inputs: where a head forgets fast, A's gradient would have most of its error from there."""
    from dualscan.ops.ssd import triton_scan

    monkeypatch.setattr(triton_scan, "_segment", lambda *_: 256)
    length = 64 * EVERY
    problem = ssd_problem(dtype=BFLOAT16, **{**BASE, "seqlen": 4 * length, "nheads": 2})
    t = problem.tensors | {"dt": torch.full_like(problem.tensors["dt"], 0.5), "A": torch.tensor([-1.0, -8.0])}
    x, dt, A, B, C = (t[name] for name in ("x", "dt", "A", "B", "C"))
    *_, kept = triton_scan.forward(x, dt, A, B, C, None, None, None, None, False, 0.0, float("inf"), True)
    x, dt, A, B = (a.double() for a in (x, dt, A, B))
    state = torch.zeros(2, 64, 64, dtype=torch.float64)
    for token in range(3 * length):
        state = (dt[0, token] * A).exp()[:, None, None] * state
        state += (dt[0, token][:, None] * x[0, token])[..., None] * B[0, token, 0]
        if (token + 1) % length == 0:
            rounded = state.mT.bfloat16()
            assert (kept[(token + 1) // length] == rounded).double().mean() > 0.99
    assert "combine_kernel" in hopper


# Two programs share a multiprocessor; what registers do not hold is read again from a cache that they leave little of:
# 48 bytes with Triton 3.6, 80 with 3.8.
MOST_SHARED, MOST_STACK = 113 * 1024, 96


@pytest.mark.slow
def test_compiles(hopper: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    launches: dict[str, dict[str, Any]] = {}

    def record(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
        if kernel.fn.__name__.endswith("_hopper_kernel"):
            launch = compiled.signature(kernel, arguments, **constants)
            launches[json.dumps(launch)] = launch

    monkeypatch.setattr(gluon, "run", record)
    options = {**BASE, "d_state": 128, "D": "scalar", "states": True, "nheads": 16}
    evaluate(ssd_problem(dtype=BFLOAT16, **options), impl="triton")
    usage = dict(zip(launches, compiled.compiled(list(launches.values())), strict=True))
    assert len(usage) == 3  # forward, dx, and the parameters' gradients
    for launch, used in usage.items():
        assert used["shared"] <= MOST_SHARED, (launch, used)
        assert used["stack"] <= MOST_STACK, (launch, used)
