"""What bad input is told: the value given, what is allowed, and the fix."""

from typing import Any

import pytest
import torch
from torch import ones

from dualscan.ops.selective_scan import selective_scan, selective_scan_step

SHAPES = {"x": (2, 6, 8), "dt": (2, 6, 8), "A": (8, 4), "B": (2, 6, 4), "C": (2, 6, 4)}
STEP_SHAPES = {"state": (2, 8, 4), "x": (2, 8), "dt": (2, 8), "A": (8, 4), "B": (2, 4), "C": (2, 4)}


def call(step: bool, **changes: Any) -> Any:
    """A good call with some arguments replaced."""
    shapes = STEP_SHAPES if step else SHAPES
    arguments = {name: ones(shape) for name, shape in shapes.items()}
    return (selective_scan_step if step else selective_scan)(**{**arguments, **changes})


def bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


two_groups = {"B": ones(2, 6, 2, 4), "C": ones(2, 6, 2, 4)}

VALUE_CASES: list[tuple[bool, dict[str, Any], list[str]]] = [
    (False, {"x": ones(2, 6, 2, 4)}, ["x has shape (2, 6, 2, 4)", "(batch, seqlen, channels)"]),
    (False, {"dt": ones(2, 6)}, ["dt has shape (2, 6)", "batch=2, seqlen=6, channels=8"]),
    (False, {"A": ones(8)}, ["A has shape (8,)", "(channels=8, d_state)"]),
    (False, {"A": ones(7, 4)}, ["A has shape (7, 4)", "channels=8"]),
    (False, {"B": ones(2, 6, 5)}, ["B has shape (2, 6, 1, 5)", "d_state=4"]),
    (False, {"C": ones(2, 7, 4)}, ["C has shape (2, 7, 1, 4)", "seqlen=6"]),
    (False, {"C": ones(2, 6, 2, 4)}, ["C has shape (2, 6, 2, 4)", "ngroups=1"]),
    (False, {"B": ones(2, 6, 3, 4), "C": ones(2, 6, 3, 4)}, ["ngroups=3", "channels=8", "use a divisor"]),
    (False, {"B": ones(2, 6, 0, 4), "C": ones(2, 6, 0, 4)}, ["ngroups=0", "channels=8"]),
    (False, {"D": ones(8, 1)}, ["D has shape (8, 1)", "channels=8"]),
    (False, {"z": ones(2, 6, 7)}, ["z has shape (2, 6, 7)", "channels=8"]),
    (False, {"dt_bias": ones(3)}, ["dt_bias has shape (3,)", "channels=8"]),
    (False, {"initial_states": ones(2, 4, 8)}, ["initial_states has shape (2, 4, 8)", "channels=8, d_state=4"]),
    (False, {"initial_states": ones(3, 8, 4)}, ["initial_states has shape (3, 8, 4)", "batch=2"]),
    (False, {"cu_seqlens": bounds(0, 6)}, ["batch=2 with cu_seqlens", "batch 1"]),
    (False, {"impl": "quadratic"}, ["selective_scan: impl='quadratic' does not exist", "'recurrent'"]),
    (False, {"B": torch.ones(2, 6, 4, device="meta")}, ["B is on meta", ".to(x.device)"]),
    (True, {"state": ones(2, 8, 5)}, ["state has shape (2, 8, 5)", "d_state=4"]),
    (True, {"x": ones(2, 1, 8)}, ["x has shape (2, 1, 8)", "(batch, channels)"]),
    (True, {"B": ones(3, 4)}, ["B has shape (3, 1, 4)", "batch=2"]),
    (True, {"B": ones(2, 3, 4), "C": ones(2, 3, 4)}, ["ngroups=3", "channels=8"]),
    (True, {"impl": "chunked"}, ["selective_scan_step: impl='chunked' does not exist"]),
]

TYPE_CASES: list[tuple[bool, dict[str, Any], list[str]]] = [
    (False, {"x": [1.0]}, ["x must be a tensor", "list"]),
    (False, {"B": None}, ["B must be a tensor", "NoneType"]),
    (False, {"x": ones(2, 6, 8, dtype=torch.int64)}, ["x has dtype torch.int64", "float32"]),
    (False, {"C": ones(2, 6, 4, dtype=torch.float16)}, ["C has dtype torch.float16", "x torch.float32", "cast"]),
    (False, {"z": ones(2, 6, 8, dtype=torch.bfloat16)}, ["z has dtype torch.bfloat16", "they must agree"]),
    (False, {"A": ones(8, 4, dtype=torch.bfloat16)}, ["A has dtype torch.bfloat16", "keep it float32"]),
    (False, {"dt": ones(2, 6, 8, dtype=torch.int32)}, ["dt has dtype torch.int32", "floating point"]),
    (False, {"initial_states": ones(2, 8, 4, dtype=torch.float16)}, ["initial_states", "states are float32"]),
    (True, {"state": ones(2, 8, 4, dtype=torch.bfloat16)}, ["state has dtype torch.bfloat16", "states are float32"]),
]


@pytest.mark.parametrize(("step", "changes", "words"), VALUE_CASES)
def test_values(step: bool, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        call(step, **changes)
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("step", "changes", "words"), TYPE_CASES)
def test_types(step: bool, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(TypeError) as raised:
        call(step, **changes)
    for word in words:
        assert word in str(raised.value)


def test_good_calls_pass() -> None:
    assert call(False).y.shape == call(False, **two_groups).y.shape == (2, 6, 8)
    assert call(True).y.shape == call(True, B=ones(2, 2, 4), C=ones(2, 2, 4)).y.shape == (2, 8)
