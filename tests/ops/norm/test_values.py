"""The norms against their definition, row by row and group by group in float64; values, gradients and properties."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualscan.ops import _pointwise
from dualscan.ops.norm import gated_rms_norm, rms_norm
from dualscan.ops.norm.reference import rms_norm_reference
from tests.oracle import assert_close

EPS = 1e-3


def by_hand(
    x: Tensor, weight: Tensor, z: Tensor | None = None, group: int = 0, norm_before_gate: bool = False
) -> Tensor:
    """One scalar mean and one division for every row and group."""
    group = group or x.shape[-1]
    flat, gates = x.reshape(-1, x.shape[-1]), None if z is None else z.reshape(-1, x.shape[-1])
    rows = [torch.zeros(0, x.shape[-1], dtype=x.dtype, device=x.device)]
    for i, row in enumerate(flat):
        gate = torch.ones_like(row) if gates is None else gates[i] / (1 + torch.exp(-gates[i]))
        value = row if norm_before_gate else row * gate
        parts = [part / (sum(c * c for c in part) / group + EPS) ** 0.5 for part in value.split(group)]
        normed = torch.cat(parts) * weight
        rows.append((normed * gate if norm_before_gate else normed)[None])
    return torch.cat(rows).view(x.shape)


CORNERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"gate": True},
    "gated after": {"gate": True, "norm_before_gate": True},
    "groups": {"gate": True, "group": 4},
    "groups, gated after": {"gate": True, "group": 4, "norm_before_gate": True},
    "groups of one": {"gate": True, "group": 1},
    "one row": {"shape": (1, 1, 12), "gate": True},
    "one dimension": {"shape": (12,)},
    "one dimension, groups": {"shape": (12,), "gate": True, "group": 3},
    "one channel": {"shape": (5, 1), "gate": True},
    "no rows": {"shape": (2, 0, 12), "gate": True, "group": 4},
    "no rows, plain": {"shape": (0, 12)},
}


def problem(
    shape: tuple[int, ...] = (3, 4, 12), gate: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs by argument name, and a cotangent."""
    tensors = {"x": torch.randn(shape), "weight": torch.randn(shape[-1])}
    if gate:
        tensors["z"] = torch.randn(shape)
    return {name: t.to(dtype) for name, t in tensors.items()}, torch.randn(shape).to(dtype)


def run(tensors: dict[str, Tensor], group: int = 0, norm_before_gate: bool = False) -> Tensor:
    if "z" not in tensors:
        return rms_norm(**tensors, eps=EPS)
    return gated_rms_norm(**tensors, group_size=group or None, norm_before_gate=norm_before_gate, eps=EPS)


def evaluate(fn: Callable[..., Tensor], tensors: dict[str, Tensor], dy: Tensor, **options: Any) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = fn(leaves, **options)
    # Zero times each leaf: without rows the definition does not depend on anything.
    loss = (y * dy).sum() + sum((0 * t).sum() for t in leaves.values())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}


def assert_is_right(tensors: dict[str, Tensor], dy: Tensor, **options: Any) -> None:
    exact = {name: t.double() for name, t in tensors.items()}
    expected = evaluate(lambda t, **o: by_hand(**t, **o), exact, dy.double(), **options)
    for name, value in evaluate(run, tensors, dy, **options).items():
        assert value.dtype == (tensors[name[1:]].dtype if name != "y" else tensors["x"].dtype), name
        assert_close(name, value, expected[name], dtype=tensors["x"].dtype, gradient=name != "y")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("corner", CORNERS.values(), ids=CORNERS)
def test_matches_the_definition(corner: dict[str, Any], dtype: torch.dtype):
    sizes = {name: corner[name] for name in ("shape", "gate") if name in corner}
    options = {name: corner[name] for name in ("group", "norm_before_gate") if name in corner}
    assert_is_right(*problem(**sizes, dtype=dtype), **options)


@pytest.mark.parametrize("corner", CORNERS.values(), ids=CORNERS)
def test_the_reference_matches_the_definition(corner: dict[str, Any]):
    tensors, _ = problem(**{name: corner[name] for name in ("shape", "gate") if name in corner})
    group, before = corner.get("group", 0), corner.get("norm_before_gate", False)
    actual = rms_norm_reference(
        tensors["x"], tensors.get("z"), tensors["weight"], group or tensors["x"].shape[-1], before, EPS
    )
    expected = by_hand(**tensors, group=group, norm_before_gate=before)
    assert_close("reference", actual, expected, dtype=torch.float64)


def test_float32_weights_serve_bfloat16_inputs():
    tensors, dy = problem(gate=True, dtype=torch.bfloat16)
    tensors["weight"] = torch.randn(12)
    assert_is_right(tensors, dy, group=4)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_blocks_do_not_matter(gate: bool, group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Blocks of 16 rows, of which the last is cut, against one block; the weight's sum may round differently."""
    tensors, dy = problem((5, 7, 12), gate, dtype)
    group = group if gate else 0
    at_once = evaluate(run, tensors, dy, group=group)
    monkeypatch.setattr(_pointwise, "CPU_BLOCK", 1)
    in_blocks = evaluate(run, tensors, dy, group=group)
    for name in at_once.keys() - {"dweight"}:
        assert torch.equal(in_blocks[name], at_once[name]), name
    assert_is_right(tensors, dy, group=group)


LAYOUTS = {
    "a column slice": lambda t: torch.cat((t, t), dim=-1)[..., : t.shape[-1]],
    "channels first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("group", [0, 4])
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor], group: int):
    tensors, dy = problem(gate=True)
    expected = evaluate(run, tensors, dy, group=group)
    strided = {name: layout(t) if t.ndim == 3 else t for name, t in tensors.items()}
    for name, value in evaluate(run, strided, layout(dy), group=group).items():
        assert_close(name, value, expected[name], dtype=torch.float64, gradient=name != "y")
    assert run(strided, group=group).is_contiguous()


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 20),
    cut=st.integers(0, 20),
    d=st.sampled_from([1, 6, 33, 96]),
    gate=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_does_not_depend_on_its_neighbours(rows, cut, d, gate, dtype):
    """Bit for bit: any part of the rows gives that part of the result, and of the gradients."""
    tensors, dy = problem((rows, d), gate, dtype)
    whole, cut = evaluate(run, tensors, dy), min(cut, rows)
    for part in (slice(0, cut), slice(cut, rows)):
        some = evaluate(run, {name: t[part] if t.ndim == 2 else t for name, t in tensors.items()}, dy[part])
        for name in some.keys() - {"dweight"}:
            assert torch.equal(some[name], whole[name][part]), name


@given(scale=st.floats(1e-3, 1e3))
def test_is_blind_to_scale(scale: float):
    x, weight = torch.randn(4, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    assert_close("scaled", rms_norm(x * scale, weight, eps=0.0), rms_norm(x, weight, eps=0.0), dtype=torch.float64)


def test_a_row_of_zeros_stays_zero():
    x = torch.zeros(2, 12, requires_grad=True)
    y = rms_norm(x, torch.ones(12))
    assert torch.equal(y, torch.zeros(2, 12))
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


def test_a_shut_and_a_wide_open_gate():
    x, z = torch.tensor([[1.0, 1.0]]), torch.tensor([[-1e4, 1e4]], requires_grad=True)
    y = gated_rms_norm(x, z, torch.ones(2), norm_before_gate=True, eps=0.0)
    (dz,) = torch.autograd.grad(y.sum(), z)
    assert_close("y", y, torch.tensor([[0.0, 1e4]]), dtype=torch.float32)
    assert_close("dz", dz, torch.tensor([[0.0, 1.0]]), dtype=torch.float32, gradient=True)


@pytest.mark.cuda
@pytest.mark.parametrize("gate", [False, True])
def test_agrees_on_cuda(gate: bool):
    tensors, dy = problem(gate=gate, dtype=torch.float32)
    expected = evaluate(run, tensors, dy)
    for name, value in evaluate(run, {k: t.cuda() for k, t in tensors.items()}, dy.cuda()).items():
        assert_close(name, value.cpu(), expected[name], dtype=torch.float32, gradient=name != "y")
