"""One token through blocks as a GPU takes it, against the operators: in the interpreter, on a GPU as it is."""

import copy
from typing import Any

import pytest
import torch

from dualscan.nn import block as block_module
from dualscan.nn.block import Block, step_blocks
from dualscan.nn.mamba2 import Mamba2, Mamba2State
from dualscan.nn.mlp import MLP
from tests.nn import test_step
from tests.ops.decode.states import double, start
from tests.oracle import assert_close

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytest.importorskip("triton")
pytestmark = [] if CUDA else [pytest.mark.usefixtures("interpreter")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]

VARIANTS: dict[str, dict[str, Any]] = {**test_step.VARIANTS, "odd state": {"d_state": 11}}


def in_place(blocks: torch.nn.ModuleList, h: torch.Tensor, states: Any) -> Any:
    """Without a GPU the way that a step takes there is taken all the same."""
    if CUDA:
        return step_blocks(blocks, h, states, reuse_state=True)
    return block_module._step_on_gpu(blocks, h, states)


def stack(dtype: torch.dtype, **options: Any) -> tuple[torch.nn.ModuleList, torch.nn.ModuleList]:
    """Two Mamba-2 blocks around an MLP, in a dtype, and the same in float64."""
    options = {"d_state": 16, "headdim": 8} | options
    mixers = [Mamba2(24, **options), MLP(24, 40), Mamba2(24, **options)]
    blocks = torch.nn.ModuleList(Block(24, mixer) for mixer in mixers)
    for mixer in (mixers[0], mixers[2]):
        torch.nn.init.normal_(mixer.get_parameter("D"))
        torch.nn.init.uniform_(mixer.get_parameter("norm.weight"), 0.5, 1.5)
    blocks = blocks.to(DEVICE, dtype)
    return blocks, copy.deepcopy(blocks).double()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_in_place_step_equals_operators(variant: str, dtype: torch.dtype, batch: int) -> None:
    blocks, exact = stack(dtype, **VARIANTS[variant])
    h = torch.randn(batch, 1, 24, device=DEVICE)
    states = start(blocks, dtype, batch)
    wide = double(states)
    given = [h.clone(), *(t for state in states if state is not None for t in state)]
    expected_h, expected = h.double(), []
    same_h, same = h, []
    for block, state, block64, state64 in zip(blocks, states, exact, wide, strict=True):
        expected_h, state64 = block64(expected_h, state64)
        same_h, state = block(same_h, state)
        expected.append(state64)
        same.append(state)
    got, after = in_place(blocks, h, states)
    assert torch.equal(h, given[0]), "the residual stream was modified"
    assert got.dtype == torch.float32
    assert_close("h", got.cpu(), expected_h.cpu(), dtype=dtype, yardstick=same_h.cpu())
    for old, new, operators, state64 in zip(states, after, same, expected, strict=True):
        if new is None:
            continue
        for name in Mamba2State._fields:
            assert getattr(new, name).data_ptr() == getattr(old, name).data_ptr() or not getattr(old, name).numel()
            ours, theirs = getattr(new, name).cpu(), getattr(operators, name).cpu()
            assert_close(name, ours, getattr(state64, name).cpu(), dtype=dtype, yardstick=theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_states_in_bfloat16_are_computed_with_in_float32(dtype: torch.dtype) -> None:
    blocks, _ = stack(dtype)
    states = start(blocks, dtype, 2, torch.bfloat16)
    h = torch.randn(2, 1, 24, device=DEVICE)
    wide, wide_after = in_place(blocks, h, block_module.keep_in(torch.float32, copy.deepcopy(states)))
    got, after = in_place(blocks, h, states)
    assert torch.equal(got, wide)
    for old, new, exact in zip(states, after, wide_after, strict=True):
        if new is not None:
            assert new.ssm is old.ssm
            # To nearest on a GPU; the interpreter cuts.
            rounding = torch.finfo(torch.bfloat16).eps * (0.5 if CUDA else 1) * exact.ssm.abs()
            assert ((new.ssm.float() - exact.ssm).abs() <= rounding).all()


@torch.no_grad()
def test_states_in_another_order_are_copied() -> None:
    blocks, _ = stack(torch.float32)
    state: list[Any] = []
    for block in blocks:
        mixer: Any = block.mixer
        if isinstance(mixer, MLP):
            state.append(None)
            continue
        conv = torch.randn(2, mixer.conv1d.in_channels, 3, device=DEVICE)
        state.append(Mamba2State(conv, torch.randn(2, 16, 8, mixer.nheads, device=DEVICE).permute(0, 3, 2, 1)))
    h = torch.randn(2, 1, 24, device=DEVICE)
    expected = h
    for block, block_state in zip(blocks, state, strict=True):
        expected, _ = block(expected, block_state)
    got, after = in_place(blocks, h, state)
    assert_close("h", got.cpu(), expected.double().cpu(), dtype=torch.float32)
    assert after[0].conv.transpose(1, 2).is_contiguous()
    assert after[0].ssm.is_contiguous()


@torch.no_grad()
def test_a_model_takes_the_short_form(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualscan.ops.decode import triton_fused

    monkeypatch.setattr(triton_fused, "DTYPES", (torch.bfloat16 if CUDA else torch.float32,))
    taken, mix = [], triton_fused.mix
    monkeypatch.setattr(triton_fused, "mix", lambda *args: taken.append(mix(*args)) or taken[-1])
    mixers = [Mamba2(128, d_inner=512, headdim=128, d_state=16), MLP(128, 40), Mamba2(128, d_inner=512, headdim=128)]
    blocks = torch.nn.ModuleList(Block(128, mixer) for mixer in mixers).to(DEVICE, triton_fused.DTYPES[0])
    h, states = torch.randn(2, 1, 128, device=DEVICE), []
    for block in blocks:
        states.append(None if isinstance(block.mixer, MLP) else block(h)[1])
    expected = h
    for block, state in zip(blocks, copy.deepcopy(states), strict=True):
        expected, _ = block(expected, state)
    got, after = in_place(blocks, h, states)
    assert len(taken) == 2
    assert_close("h", got.cpu(), expected.double().cpu(), dtype=triton_fused.DTYPES[0])
    assert [new.ssm is old.ssm for new, old in zip(after, states, strict=True) if old is not None] == [True] * 2
