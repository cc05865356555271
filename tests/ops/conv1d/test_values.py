"""The convolution against brute force over the corners of its contract, values and every gradient; its properties."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualscan.ops import _pointwise
from dualscan.ops.conv1d import causal_conv1d
from tests.ops.conv1d.problem import assert_matches_brute_force, evaluate, problem
from tests.oracle import assert_close
from tests.strategies import packed

CORNERS: dict[str, dict[str, Any]] = {
    "everything": {},
    "plain": {"bias": False, "states": False, "activation": None},
    "no state": {"states": False},
    "no bias": {"bias": False},
    "swish": {"activation": "swish"},
    "width 1": {"width": 1},
    "width 1, packed": {"width": 1, "lengths": [2, 0, 3]},
    "width 8": {"width": 8, "seqlen": 20},
    "shorter than the filter": {"seqlen": 2},
    "one token": {"seqlen": 1},
    "one token, no state": {"seqlen": 1, "states": False},
    "as long as the state": {"seqlen": 3},
    "as long as the filter": {"seqlen": 4},
    "no tokens": {"seqlen": 0},
    "no batch": {"batch": 0},
    "one channel": {"channels": 1},
    "packed": {"lengths": [4, 1, 0, 2, 9, 3]},
    "packed, no state": {"lengths": [4, 1, 0, 2, 9, 3], "states": False},
    "packed, all one token": {"lengths": [1, 1, 1]},
    "packed, all empty": {"lengths": [0, 0]},
    "packed, no sequences": {"lengths": []},
    "packed, one sequence": {"lengths": [7]},
    "packed, wide filter": {"lengths": [4, 1, 0, 2, 9, 3], "width": 8},
}


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("corner", CORNERS.values(), ids=CORNERS)
def test_matches_brute_force(corner: dict[str, Any], impl: str):
    assert_matches_brute_force(problem(**corner), impl=impl)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("lengths", [None, [6, 1, 4]], ids=["batch", "packed"])
def test_every_width(width: int, lengths: list[int] | None):
    assert_matches_brute_force(problem(width=width, lengths=lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("corner", CORNERS.values(), ids=CORNERS)
def test_kernels_match_brute_force(corner: dict[str, Any], dtype: torch.dtype):
    assert_matches_brute_force(problem(**corner, dtype=dtype), impl="numba")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("corner", [{"seqlen": 50}, {"seqlen": 1}, {"lengths": [30, 2, 0, 18]}], ids=str)
def test_lower_precision_accumulates_in_float32(dtype: torch.dtype, corner: dict[str, Any]):
    assert_matches_brute_force(problem(channels=24, dtype=dtype, **corner))


def test_float32_parameters_serve_bfloat16_inputs():
    mixed = problem(channels=24, dtype=torch.bfloat16)
    for name in ("weight", "bias"):
        mixed.tensors[name] = mixed.tensors[name].float()
    assert_matches_brute_force(mixed)


@pytest.mark.parametrize("lengths", [None, [20, 1, 0, 19, 30]], ids=["batch", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_blocks_do_not_matter(lengths: list[int] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Blocks of 16 tokens, of which the last is cut, against one block; sums over blocks may round differently."""
    whole = problem(seqlen=70, lengths=lengths, dtype=dtype)
    at_once = evaluate(lambda p: p(), whole)
    monkeypatch.setattr(_pointwise, "CPU_BLOCK", 1)
    in_blocks = evaluate(lambda p: p(), whole)
    for name in ("y", "final_states", "dx", "dinitial_states"):
        assert torch.equal(in_blocks[name], at_once[name]), name
    assert_matches_brute_force(whole)


def _column_slice(t: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*t.shape[:2], t.shape[2] + 7), float("nan"), dtype=t.dtype)
    wide[..., 3:-4] = t
    return wide[..., 3:-4]


LAYOUTS = {
    "a column slice": _column_slice,
    "channels first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other token": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("seqlen", [1, 9])
def test_strides_do_not_matter(layout: Any, seqlen: int):
    straight = problem(seqlen=seqlen)
    expected = evaluate(lambda p: p(), straight)
    strided = problem(seqlen=seqlen)
    for name in straight.tensors:
        strided.tensors[name] = straight.tensors[name]
    strided.tensors["x"] = layout(straight.tensors["x"])
    strided.tensors["weight"] = straight.tensors["weight"].t().contiguous().t()
    assert strided.tensors["x"].shape == straight.tensors["x"].shape
    out = strided()
    for name in ("y", "final_states"):
        assert_close(name, getattr(out, name), expected[name], dtype=torch.float64)
    x = strided.tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(strided(), x, (straight.dy, straight.dfinal))
    assert_close("dx", dx, expected["dx"], dtype=torch.float64, gradient=True)


def test_an_expanded_gradient():
    p = problem()
    x = p.tensors["x"].requires_grad_()
    (expected,) = torch.autograd.grad(p().y, x, torch.ones_like(p.dy))
    assert torch.equal(torch.autograd.grad(p().y.sum(), x)[0], expected)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=6),
    width=st.integers(1, 8),
    channels=st.sampled_from([1, 3, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from([None, "silu"]),
    states=st.booleans(),
)
def test_packed_is_each_sequence_alone_bitwise(lengths, width, channels, dtype, activation, states):
    options = {"width": width, "channels": channels, "activation": activation, "states": states, "dtype": dtype}
    together = problem(lengths=lengths, **options)
    actual = evaluate(lambda p: p(), together)
    start = 0
    for i, length in enumerate(lengths):
        alone, end = problem(batch=1, seqlen=length, **options), start + length
        alone.dy.copy_(together.dy[:, start:end])
        alone.dfinal.copy_(together.dfinal[i : i + 1])
        for name, t in together.tensors.items():
            part = {"x": (slice(None), slice(start, end)), "initial_states": slice(i, i + 1)}.get(name, ...)
            alone.tensors[name] = t[part]
        expected = evaluate(lambda p: p(), alone)
        assert torch.equal(actual["y"][:, start:end], expected["y"])
        assert torch.equal(actual["dx"][:, start:end], expected["dx"])
        assert torch.equal(actual["final_states"][i : i + 1], expected["final_states"])
        if states:
            assert torch.equal(actual["dinitial_states"][i : i + 1], expected["dinitial_states"])
        start = end


@settings(deadline=None, max_examples=40)
@given(seqlen=st.integers(0, 24), cut=st.integers(0, 24), width=st.integers(1, 8), states=st.booleans())
def test_split_anywhere_is_the_whole(seqlen, cut, width, states):
    whole = problem(seqlen=seqlen, width=width, states=states)
    expected = whole()
    rest = {k: t for k, t in whole.tensors.items() if k not in ("x", "initial_states")}
    x, cut = whole.tensors["x"], min(cut, seqlen)
    first = causal_conv1d(x[:, :cut], **rest, activation="silu", initial_states=whole.tensors.get("initial_states"))
    second = causal_conv1d(x[:, cut:], **rest, activation="silu", initial_states=first.final_states)
    assert torch.equal(second.final_states, expected.final_states)
    assert_close("y", torch.cat((first.y, second.y), dim=1), expected.y, dtype=torch.float64)


def test_step_by_step_is_the_whole():
    whole = problem(seqlen=12, dtype=torch.float32)
    state, steps = whole.tensors["initial_states"], []
    for token in whole.tensors["x"].split(1, dim=1):
        y, state = causal_conv1d(
            token, whole.tensors["weight"], whole.tensors["bias"], activation="silu", initial_states=state
        )
        steps.append(y)
    assert torch.equal(state, whole().final_states)
    assert_close("y", torch.cat(steps, dim=1), whole().y, dtype=torch.float32)


def test_is_causal_and_stays_inside_its_sequence():
    """The gradient with respect to anything later, or of another sequence, is exactly zero."""
    p = problem(lengths=[6, 5])
    x = p.tensors["x"].requires_grad_()
    for t in range(11):
        (dx,) = torch.autograd.grad(p().y[0, t].sum(), x)
        reached = dx[0].abs().amax(1).nonzero().flatten().tolist()
        assert reached == list(range(max(t - 3, 0 if t < 6 else 6), t + 1))


def test_the_state_is_a_value():
    p = problem(seqlen=1)
    before = p.tensors["initial_states"].clone()
    final = p().final_states
    final.zero_()
    assert torch.equal(p.tensors["initial_states"], before)
    assert torch.equal(p.map(torch.clone)().final_states[..., -1], p.tensors["x"][:, 0])


def test_large_inputs_saturate():
    x = torch.tensor([[[-1e4, 1e4]]]).requires_grad_()
    y = causal_conv1d(x, torch.ones(2, 1), activation="silu").y
    assert y.flatten().tolist() == [0.0, 1e4]
    assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == [0.0, 1.0]


@pytest.mark.cuda
@pytest.mark.parametrize("corner", [{}, {"seqlen": 1}, {"lengths": [4, 1, 0, 2, 9, 3]}], ids=str)
def test_the_portable_form_on_cuda(corner: dict[str, Any]):
    p = problem(dtype=torch.float32, **corner)
    expected = evaluate(lambda q: q(), p)
    there = p.map(torch.Tensor.cuda)
    if p.cu_seqlens is not None:
        there = type(there)(there.tensors, there.dy, there.dfinal, there.activation, packed(corner["lengths"]).cuda())
    for name, value in evaluate(lambda q: q(impl="chunked"), there).items():
        assert_close(name, value.cpu(), expected[name], dtype=torch.float32, gradient=name.startswith("d"))
