"""What bad input is told: the value given, what is allowed, and the fix."""

import math
from typing import Any

import pytest
import torch

from dualscan.ops.ssd import linear_attention, ssd, ssd_step

BATCH, SEQLEN, NHEADS, HEADDIM, NGROUPS, D_STATE = 2, 6, 4, 8, 2, 16

SHAPES: dict[str, tuple[int, ...]] = {
    "x": (BATCH, SEQLEN, NHEADS, HEADDIM),
    "dt": (BATCH, SEQLEN, NHEADS),
    "A": (NHEADS,),
    "B": (BATCH, SEQLEN, NGROUPS, D_STATE),
    "C": (BATCH, SEQLEN, NGROUPS, D_STATE),
}
STEP_SHAPES: dict[str, tuple[int, ...]] = {
    "state": (BATCH, NHEADS, HEADDIM, D_STATE),
    "x": (BATCH, NHEADS, HEADDIM),
    "dt": (BATCH, NHEADS),
    "A": (NHEADS,),
    "B": (BATCH, NGROUPS, D_STATE),
    "C": (BATCH, NGROUPS, D_STATE),
}
ATTENTION_SHAPES: dict[str, tuple[int, ...]] = {
    "q": (BATCH, SEQLEN, NGROUPS, D_STATE),
    "k": (BATCH, SEQLEN, NGROUPS, D_STATE),
    "v": (BATCH, SEQLEN, NHEADS, HEADDIM),
}
FACES = {
    "ssd": (ssd, SHAPES),
    "ssd_step": (ssd_step, STEP_SHAPES),
    "linear_attention": (linear_attention, ATTENTION_SHAPES),
}


def call(name: str, **changes: Any) -> Any:
    """A good call of an operator with some arguments replaced."""
    function, shapes = FACES[name]
    arguments = {argument: torch.ones(shape) for argument, shape in shapes.items()}
    return function(**{**arguments, **changes})


def bounds(*values: int, dtype: torch.dtype = torch.int32, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


ones, f16, meta = torch.ones, torch.float16, "meta"
one_row = {name: ones(1, *shape[1:]) if len(shape) > 1 else ones(shape) for name, shape in SHAPES.items()}

SHAPE_CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("ssd", {"x": ones(2, 6, 32)}, ["x has shape (2, 6, 32)", "(batch, seqlen, nheads, headdim)"]),
    ("ssd", {"dt": ones(2, 6, 5)}, ["dt has shape (2, 6, 5)", "batch=2, seqlen=6, nheads=4"]),
    ("ssd", {"dt": ones(2, 6)}, ["dt has shape (2, 6)", "nheads=4"]),
    ("ssd", {"A": ones(4, 16)}, ["A has shape (4, 16)", "nheads=4"]),
    ("ssd", {"B": ones(2, 6, 16)}, ["B has shape (2, 6, 16)", "ngroups, d_state"]),
    ("ssd", {"B": ones(2, 7, 2, 16)}, ["B has shape (2, 7, 2, 16)", "seqlen=6"]),
    ("ssd", {"C": ones(2, 6, 1, 16)}, ["C has shape (2, 6, 1, 16)", "ngroups=2"]),
    ("ssd", {"C": ones(2, 6, 2, 8)}, ["C has shape (2, 6, 2, 8)", "d_state=16"]),
    ("ssd", {"B": ones(2, 6, 3, 16), "C": ones(2, 6, 3, 16)}, ["ngroups=3", "nheads=4", "use a divisor"]),
    ("ssd", {"B": ones(2, 6, 0, 16), "C": ones(2, 6, 0, 16)}, ["ngroups=0", "nheads=4"]),
    ("ssd", {"D": ones(5)}, ["D has shape (5,)", "nheads=4"]),
    ("ssd", {"D": ones(4, 9)}, ["D has shape (4, 9)", "headdim=8"]),
    ("ssd", {"D": ones(4, 8, 1)}, ["D has shape (4, 8, 1)", "nheads=4"]),
    ("ssd", {"z": ones(2, 6, 4, 7)}, ["z has shape (2, 6, 4, 7)", "headdim=8"]),
    ("ssd", {"dt_bias": ones(3)}, ["dt_bias has shape (3,)", "nheads=4"]),
    ("ssd", {"initial_states": ones(2, 4, 16, 8)}, ["initial_states has shape (2, 4, 16, 8)", "d_state=16"]),
    ("ssd", {"initial_states": ones(3, 4, 8, 16)}, ["initial_states has shape (3, 4, 8, 16)", "batch=2"]),
    (
        "ssd",
        {**one_row, "cu_seqlens": bounds(0, 2, 6), "initial_states": ones(1, 4, 8, 16)},
        ["initial_states has shape (1, 4, 8, 16)", "nseq=2"],
    ),
    ("ssd_step", {"state": ones(2, 4, 8, 15)}, ["state has shape (2, 4, 8, 15)", "d_state=16"]),
    ("ssd_step", {"x": ones(2, 1, 4, 8)}, ["x has shape (2, 1, 4, 8)", "batch, nheads, headdim"]),
    ("ssd_step", {"dt": ones(2)}, ["dt has shape (2,)", "nheads=4"]),
    ("ssd_step", {"B": ones(2, 3, 16), "C": ones(2, 3, 16)}, ["ngroups=3", "nheads=4"]),
    ("ssd_step", {"z": ones(2, 1, 4, 8)}, ["z has shape (2, 1, 4, 8)", "batch=2, nheads=4, headdim=8"]),
    ("linear_attention", {"v": ones(2, 6, 4)}, ["v has shape (2, 6, 4)", "(batch, seqlen, nheads, headdim)"]),
    ("linear_attention", {"k": ones(2, 5, 2, 16)}, ["k has shape (2, 5, 2, 16)", "seqlen=6"]),
    ("linear_attention", {"q": ones(2, 6, 2, 4)}, ["q has shape (2, 6, 2, 4)", "d_state=16"]),
    ("linear_attention", {"log_decay": ones(2, 6, 2)}, ["log_decay has shape (2, 6, 2)", "nheads=4"]),
    (
        "linear_attention",
        {"normalize": True, "initial_states": ones(2, 4, 8, 16)},
        ["initial_states has shape (2, 4, 8, 16)", "headdim=9"],
    ),
]

VALUE_CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("ssd", {"chunk_size": 0}, ["chunk_size=0", "positive", "None"]),
    ("ssd", {"chunk_size": -3}, ["chunk_size=-3", "positive"]),
    ("linear_attention", {"chunk_size": 0}, ["linear_attention", "chunk_size=0"]),
    ("ssd", {"impl": "fast"}, ["impl='fast'", "'auto'", "'chunked'", "'recurrent'", "'quadratic'"]),
    ("ssd", {"impl": None}, ["impl=None", "'auto'"]),
    ("ssd_step", {"impl": "chunked"}, ["ssd_step", "impl='chunked'", "'recurrent'"]),
    ("ssd", {"dt_limit": (1.0, 0.5)}, ["dt_limit=(1.0, 0.5)", "low <= high", "(0.0, inf)"]),
    ("ssd", {"dt_limit": (-1.0, 0.5)}, ["dt_limit=(-1.0, 0.5)", "0 <= low"]),
    ("ssd", {"dt_limit": (math.nan, 1.0)}, ["dt_limit=(nan, 1.0)"]),
    ("ssd", {"dt_limit": (0.1,)}, ["dt_limit=(0.1,)", "(low, high)"]),
    ("ssd", {"dt_limit": None}, ["dt_limit=None", "(low, high)"]),
    ("ssd_step", {"dt_limit": (2.0, 1.0)}, ["ssd_step", "dt_limit=(2.0, 1.0)"]),
    ("ssd", {"cu_seqlens": bounds(0, 3, 6)}, ["batch=2", "batch 1", "concatenate"]),
    ("ssd", {**one_row, "cu_seqlens": bounds(0, 4, 2, 6)}, ["must not decrease", "cu_seqlens[1]=4", "cu_seqlens[2]=2"]),
    ("ssd", {**one_row, "cu_seqlens": bounds(0, 3, 5)}, ["from 0 to 5", "seqlen=6"]),
    ("ssd", {**one_row, "cu_seqlens": bounds(1, 6)}, ["from 1 to 6", "0 to seqlen=6"]),
    ("ssd", {**one_row, "cu_seqlens": bounds(0, 6).view(1, 2)}, ["cu_seqlens has shape (1, 2)", "(nseq + 1,)"]),
    ("ssd", {"B": ones(SHAPES["B"], device=meta)}, ["B is on meta", "x on cpu", ".to(x.device)"]),
    ("ssd", {"dt": ones(SHAPES["dt"], device=meta)}, ["dt is on meta", "x on cpu"]),
    ("ssd", {"A": ones(4, device=meta)}, ["A is on meta", "x on cpu"]),
    ("ssd", {"z": ones(SHAPES["x"], device=meta)}, ["z is on meta", "x on cpu"]),
    ("ssd", {"initial_states": ones(2, 4, 8, 16, device=meta)}, ["initial_states is on meta", "x on cpu"]),
    ("ssd", {**one_row, "cu_seqlens": bounds(0, 6, device=meta)}, ["cu_seqlens is on meta", "cpu"]),
    ("ssd_step", {"state": ones(STEP_SHAPES["state"], device=meta)}, ["state is on meta", "x on cpu"]),
    (
        "linear_attention",
        {"k": ones(ATTENTION_SHAPES["k"], device=meta)},
        ["k is on meta", "v on cpu", ".to(v.device)"],
    ),
]

TYPE_CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("ssd", {"x": [1.0]}, ["x must be a tensor", "list"]),
    ("ssd", {"A": -1.0}, ["A must be a tensor", "float"]),
    ("linear_attention", {"v": 3.0, "normalize": True}, ["v must be a tensor", "float"]),
    ("ssd", {"x": ones(SHAPES["x"], dtype=torch.int64)}, ["x has dtype torch.int64", "bfloat16"]),
    ("ssd", {"B": ones(SHAPES["B"], dtype=f16)}, ["B has dtype torch.float16", "x torch.float32", "cast"]),
    ("ssd", {"dt": ones(SHAPES["dt"], dtype=torch.int64)}, ["dt has dtype torch.int64", "floating point"]),
    ("ssd", {"A": ones(4, dtype=torch.bfloat16)}, ["A has dtype torch.bfloat16", "float32"]),
    ("ssd", {"D": ones(4, dtype=torch.int64)}, ["D has dtype torch.int64", "floating point"]),
    ("ssd", {"z": ones(SHAPES["x"], dtype=f16)}, ["z has dtype torch.float16", "x torch.float32"]),
    ("ssd", {"initial_states": ones(2, 4, 8, 16, dtype=f16)}, ["initial_states has dtype torch.float16", "float32"]),
    ("ssd", {"initial_states": ones(2, 4, 8, 16).double()}, ["initial_states has dtype torch.float64", "float32"]),
    ("ssd", {**one_row, "cu_seqlens": bounds(0, 6, dtype=torch.int64)}, ["torch.int64", "torch.int32", ".to("]),
    ("ssd", {**one_row, "cu_seqlens": [0, 6]}, ["cu_seqlens must be an int32 tensor", "list"]),
    ("ssd", {"chunk_size": 2.5}, ["chunk_size=2.5", "integer"]),
    ("ssd_step", {"state": ones(STEP_SHAPES["state"], dtype=f16)}, ["state has dtype torch.float16", "float32"]),
    ("ssd_step", {"C": ones(STEP_SHAPES["C"], dtype=f16)}, ["C has dtype torch.float16", "x torch.float32"]),
    (
        "linear_attention",
        {"q": ones(ATTENTION_SHAPES["q"], dtype=f16)},
        ["q has dtype torch.float16", "v torch.float32"],
    ),
]


def check(error: type[Exception], name: str, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        call(name, **changes)
    message = str(raised.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(("name", "changes", "words"), SHAPE_CASES + VALUE_CASES)
def test_bad_values(name: str, changes: dict[str, Any], words: list[str]) -> None:
    check(ValueError, name, changes, words)


@pytest.mark.parametrize(("name", "changes", "words"), TYPE_CASES)
def test_bad_types(name: str, changes: dict[str, Any], words: list[str]) -> None:
    check(TypeError, name, changes, words)


@pytest.mark.parametrize("name", FACES)
def test_the_good_call_is_good(name: str) -> None:
    assert call(name).y.isfinite().all()
