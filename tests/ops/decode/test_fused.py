"""A Mamba-2 block in four launches, against float64 and the form of six: in the interpreter, on a GPU as it is."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualscan.nn.block import Block
from dualscan.nn.mamba2 import Mamba2
from dualscan.nn.mlp import MLP
from dualscan.nn.step import describe
from tests.ops.decode.states import called, double, start
from tests.oracle import assert_close

pytest.importorskip("triton")
from dualscan.ops.decode import triton_fused, triton_step

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [] if CUDA else [pytest.mark.usefixtures("interpreter")]
# The interpreter has no products in bfloat16.
DTYPES = [torch.bfloat16] if CUDA else [torch.float32, torch.float16]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"ngroups": 2, "norm_groups": 1},
    "short conv": {"d_conv": 2},
    "narrow heads": {"headdim": 64, "d_state": 32},
    "several programs a head": {"d_state": 256},
}
SLOW: dict[str, dict[str, Any]] = {"uneven heads": {"headdim": 48, "d_inner": 1536}}
OTHER_FORM: dict[str, dict[str, Any]] = {
    "norm groups": {"norm_groups": 2},
    "norm first": {"norm_before_gate": True},
    "limit": {"dt_limit": (0.01, 0.05)},
    "bias": {"bias": True},
    "no conv bias": {"conv_bias": False},
    "no conv": {"d_conv": 1},
    "narrow heads": {"headdim": 8},
    "odd state": {"d_state": 24},
    "small state": {"d_state": 8},
    "large state": {"d_state": 512},
    "odd width": {"d_model": 120},
    "odd inner width": {"d_inner": 640},
}


@pytest.fixture(autouse=True)
def dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_fused, "DTYPES", DTYPES)


def stack(dtype: torch.dtype, *options: dict[str, Any] | None) -> nn.ModuleList:
    """Blocks of a model, Mamba-2 with the given options or, without, an MLP."""
    blocks = []
    for given in options:
        settings = {"d_model": 128, "d_inner": 512, "headdim": 128, "d_state": 16} | (given or {})
        width = settings.pop("d_model")
        blocks.append(Block(width, MLP(width, 40) if given is None else Mamba2(width, **settings)))
    for block in blocks:
        torch.nn.init.uniform_(block.norm.weight, 0.5, 1.5)
        if isinstance(block.mixer, Mamba2):
            torch.nn.init.normal_(block.mixer.D)
            torch.nn.init.uniform_(block.mixer.get_parameter("norm.weight"), 0.5, 1.5)
    return nn.ModuleList(blocks).to(DEVICE, dtype)


@torch.no_grad()
def step(blocks: nn.ModuleList, h: Tensor, states: Sequence[Any]) -> Tensor:
    """One token; changes the states."""
    stream, waiting = h, None
    for block, state in zip(blocks, states, strict=True):
        if state is None:
            stream, waiting = block(triton_step.settle(stream, waiting).unsqueeze(1))[0][:, 0], None
        else:
            stream, waiting = triton_step.step(stream, waiting, *describe(block.mixer, block.norm), *state)
    return triton_step.settle(stream, waiting)


def taken(blocks: nn.ModuleList, states: Sequence[Any]) -> list[bool]:
    pairs = [(b, s) for b, s in zip(blocks, states, strict=True) if s is not None]
    return [triton_fused.takes(*describe(block.mixer, block.norm), *state) for block, state in pairs]


# A program is slow in the interpreter: no more cases than say something.
CASES = [
    *((variant, DTYPES[-1], 1, torch.float32) for variant in VARIANTS),
    ("plain", DTYPES[0], 3, torch.float32),
    *(("groups", dtype, 2, torch.bfloat16) for dtype in DTYPES),
    pytest.param("plain", DTYPES[0], 32 if CUDA else 17, torch.float32, marks=pytest.mark.slow),
    pytest.param("uneven heads", DTYPES[0], 1, torch.float32, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("variant", "dtype", "batch", "state_dtype"), CASES, ids=str)
@torch.no_grad()
def test_equals_both(
    variant: str, dtype: torch.dtype, batch: int, state_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens: what the first left, the second reads."""
    options = (VARIANTS | SLOW)[variant]
    blocks = stack(dtype, options, options)
    exact = copy.deepcopy(blocks).double()
    states = start(blocks, dtype, batch, state_dtype)
    assert all(taken(blocks, states))
    other, wide = copy.deepcopy(states), double(states)
    h = torch.randn(2, batch, 128, device=DEVICE)
    got = [step(blocks, row, states) for row in h]
    with monkeypatch.context() as six:
        six.setattr(triton_fused, "takes", lambda *_: False)
        theirs = [step(blocks, row, other) for row in h]
    expected = called(exact, h.double(), wide)
    # A state rounded to bfloat16 leaves more of an error than the matrices' dtype.
    coarse = dtype if state_dtype == torch.float32 else torch.bfloat16
    for ours, six, right in zip(got, theirs, expected, strict=True):
        assert ours.dtype == torch.float32
        assert_close("h", ours, right, dtype=coarse, yardstick=six)
    for ours, six, right in zip(states, other, wide, strict=True):
        assert_close("conv", ours.conv, right.conv, dtype=coarse, yardstick=six.conv)
        assert_close("ssm", ours.ssm, right.ssm, dtype=coarse, yardstick=six.ssm)


@pytest.mark.parametrize("variant", OTHER_FORM)
def test_other_layers_take_the_other_form(variant: str) -> None:
    blocks = stack(DTYPES[0], OTHER_FORM[variant])
    assert taken(blocks, start(blocks, DTYPES[0], 2, torch.float32)) == [False]


@torch.no_grad()
def test_forms_and_other_blocks_follow_each_other() -> None:
    dtype = DTYPES[0]
    blocks = stack(dtype, {}, {"norm_groups": 2}, {}, None, {}, None, {"bias": True})
    states = start(blocks, dtype, 2, torch.float32)
    assert taken(blocks, states) == [True, False, True, True, False]
    h, wide = torch.randn(2, 128, device=DEVICE), double(states)
    got, expected = step(blocks, h, states), h.double().unsqueeze(1)
    for i, block in enumerate(copy.deepcopy(blocks).double()):
        expected, wide[i] = block(expected, wide[i])
    assert_close("h", got, expected[:, 0], dtype=dtype)
    for ours, right in zip(states, wide, strict=True):
        if ours is not None:
            assert_close("ssm", ours.ssm, right.ssm, dtype=dtype)


def test_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers of other sizes cannot show."""
    dtype = DTYPES[0]
    blocks = stack(dtype, {})
    layer, sizes = describe(blocks[0].mixer, blocks[0].norm)

    def takes(batch: int = 2, state_dtype: torch.dtype = torch.float32, **changed: Any) -> bool:
        ((conv, ssm),) = start(blocks, changed.pop("conv", dtype), batch, state_dtype)
        return triton_fused.takes(layer._replace(**changed), sizes, conv, ssm)

    assert takes()
    assert takes(triton_fused.MOST_ROWS)
    assert not takes(triton_fused.MOST_ROWS + 1)
    assert not takes(0)
    assert takes(state_dtype=torch.bfloat16)
    assert not takes(state_dtype=torch.float16)
    assert not takes(conv=torch.float64)
    assert not takes(out_weight=layer.out_weight.double())
    assert not takes(A_log=layer.A_log.double())
    assert not takes(before=None)
    for name in ("in_weight", "out_weight"):
        assert not takes(**{name: getattr(layer, name).t().contiguous().t()})
    assert not takes(norm_weight=torch.ones(1024, device=DEVICE)[::2])
    monkeypatch.setattr(triton_fused, "DTYPES", ())
    assert not takes()


def test_float16_and_float32_take_the_other_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        blocks = stack(dtype, {})
        assert taken(blocks, start(blocks, dtype, 1, torch.float32)) == [dtype == torch.bfloat16]


@torch.no_grad()
def test_steps_repeat_bitwise() -> None:
    blocks = stack(DTYPES[0], {}, {})
    states = start(blocks, DTYPES[0], 3, torch.bfloat16)
    again, h = copy.deepcopy(states), torch.randn(3, 128, device=DEVICE)
    given = h.clone()
    assert torch.equal(step(blocks, h, states), step(blocks, h, again))
    assert torch.equal(h, given), "the residual stream was modified"
    for one, other in zip(states, again, strict=True):
        assert all(map(torch.equal, one, other))
