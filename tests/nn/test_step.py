"""The lean one-token step, as a kernel and as PyTorch operations, equals the step through the operators.

The other tests compare the operators with everything else.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import nn

from dualscan.nn.block import Block, step_blocks
from dualscan.nn.mamba2 import Mamba2, Mamba2State
from dualscan.nn.mlp import MLP
from dualscan.nn.precision import project
from dualscan.ops.decode import MOST_ROWS
from tests.oracle import assert_close

VARIANTS = {
    "plain": {},
    "groups": {"ngroups": 2},
    "bias": {"bias": True, "conv_bias": False},
    "norm first": {"norm_before_gate": True},
    "norm groups": {"norm_groups": 4},
    "limit": {"dt_limit": (0.01, 0.05)},
    "wide conv": {"d_conv": 7},
    "no conv": {"d_conv": 1},
}


@pytest.mark.parametrize("batch", [1, 3, MOST_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_lean_step_equals_operators(variant: str, dtype: torch.dtype, batch: int) -> None:
    exact = Mamba2(32, d_state=12, headdim=8, **VARIANTS[variant]).double()
    torch.nn.init.normal_(exact.D)
    layer = Mamba2(32, d_state=12, headdim=8, **VARIANTS[variant])
    layer.load_state_dict(exact.state_dict())
    layer = layer.to(dtype)
    exact.load_state_dict(layer.state_dict())
    u = torch.randn(batch, 6, 32, dtype=dtype)
    with torch.no_grad():
        _, state = layer(u[:, :5])
        before = [t.clone() for t in state]
        y, after = layer(u[:, 5:], state)
    assert all(torch.equal(t, b) for t, b in zip(state, before, strict=True)), "the state was modified"
    same, same_after = layer(u[:, 5:], state)
    expected, expected_after = exact(u[:, 5:].double(), Mamba2State(*(t.double() for t in state)))
    assert_close("y", y, expected, dtype=dtype, yardstick=same)
    for name in Mamba2State._fields:
        ours, operators = getattr(after, name), getattr(same_after, name)
        assert ours.dtype == operators.dtype
        assert_close(name, ours, getattr(expected_after, name), dtype=dtype, yardstick=operators)


def test_step_of_another_batch_is_refused() -> None:
    layer = Mamba2(32, d_state=8, headdim=8)
    with torch.no_grad():
        _, state = layer(torch.randn(2, 3, 32))
        with pytest.raises(ValueError, match=r"u has batch 3, the state 2"):
            layer(torch.randn(3, 1, 32), state)


def test_step_under_autocast_keeps_the_state_in_float32() -> None:
    layer = Mamba2(32, d_state=8, headdim=8)
    with torch.no_grad():
        _, state = layer(torch.randn(1, 3, 32))
        with torch.autocast("cpu", torch.bfloat16):
            _, after = layer(torch.randn(1, 1, 32), state)
    assert after.ssm.dtype == torch.float32
    assert math.isfinite(after.ssm.sum().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, MOST_ROWS + 1])
def test_the_block_steps_as_its_parts(dtype: torch.dtype, batch: int) -> None:
    block = Block(32, Mamba2(32, d_state=12, headdim=8), norm_eps=1e-3).to(dtype)
    torch.nn.init.normal_(block.norm.weight)

    def step(block, state, **options):
        out, (after,) = step_blocks(nn.ModuleList([block]), h[:, 5:], [state], **options)
        return out, after

    h = torch.randn(batch, 6, 32)
    with torch.no_grad():
        _, state = block(h[:, :5])
        out, after = step(block, state)
        kept = Mamba2State(*(t.clone() for t in state))
        again, after_again = step(block, kept, reuse_state=True)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(after, after_again, strict=True))
    assert (after_again.ssm.data_ptr() == kept.ssm.data_ptr()) == (batch <= MOST_ROWS)
    operators, operators_after = block(h[:, 5:], state)
    exact = copy.deepcopy(block).double()
    expected, expected_after = exact(h[:, 5:].double(), Mamba2State(*(t.double() for t in state)))
    assert out.dtype == torch.float32
    assert_close("out", out, expected, dtype=dtype, yardstick=operators)
    for name in Mamba2State._fields:
        yardstick = getattr(operators_after, name)
        assert_close(name, getattr(after, name), getattr(expected_after, name), dtype=dtype, yardstick=yardstick)


def stack(pattern: str, dtype: torch.dtype) -> nn.ModuleList:
    mixers = {"M": lambda: Mamba2(32, d_state=12, headdim=8, ngroups=2), "-": lambda: MLP(32, 48)}
    blocks = nn.ModuleList(Block(32, mixers[letter](), norm_eps=1e-3) for letter in pattern)
    for block in blocks:
        nn.init.normal_(block.get_parameter("norm.weight"))
    return blocks.to(dtype)


@torch.no_grad()
def decode(blocks: nn.ModuleList, h: torch.Tensor, **options) -> tuple[list[torch.Tensor], Sequence[Any]]:
    """The residual stream of each token after the first, and the last states."""
    states, first = [], h[:, :1]
    for block in blocks:
        first, state = block(first)
        states.append(state)
    outs = []
    for token in h[:, 1:].split(1, dim=1):
        out, states = step_blocks(blocks, token, states, **options)
        outs.append(out)
    return outs, states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["MMM", "M-MM-", "MM-M"])
@pytest.mark.parametrize("reuse_state", [False, True])
def test_a_stack_steps_as_it_reads_the_sequence(pattern: str, dtype: torch.dtype, reuse_state: bool) -> None:
    blocks, h = stack(pattern, dtype), torch.randn(2, 9, 32)
    outs, states = decode(blocks, h, reuse_state=reuse_state)
    exact, parallel, reference = copy.deepcopy(blocks).double(), h, h.double()
    for block, exact_block, state in zip(blocks, exact, states, strict=True):
        parallel, after = block(parallel)
        reference, exact_after = exact_block(reference)
        if isinstance(state, Mamba2State):
            assert_close("ssm", state.ssm, exact_after.ssm, dtype=dtype, yardstick=after.ssm)
            assert_close("conv", state.conv, exact_after.conv, dtype=dtype, yardstick=after.conv)
    assert_close("out", torch.cat(outs, 1), reference[:, 1:], dtype=dtype, yardstick=parallel[:, 1:])


def test_a_copy_of_reused_states_is_independent() -> None:
    blocks, h = stack("MM", torch.float32), torch.randn(1, 4, 32)
    _, states = decode(blocks, h, reuse_state=True)
    with torch.no_grad():
        copied = copy.deepcopy(states)
        kept = [state.ssm.clone() for state in states]
        first, after = step_blocks(blocks, h[:, :1], copied, reuse_state=True)
        assert all(torch.equal(state.ssm, before) for state, before in zip(states, kept, strict=True))
        second, same = step_blocks(blocks, h[:, :1], states, reuse_state=True)
    assert torch.equal(first, second)
    assert same is states
    assert all(torch.equal(a.ssm, b.ssm) and torch.equal(a.conv, b.conv) for a, b in zip(after, same, strict=True))


def change_weight(block: Block) -> None:
    weight = block.get_parameter("mixer.in_proj.weight")
    weight.data = weight.data * 2


def replace_parameter(block: Block) -> None:
    weight = nn.Parameter(torch.randn_like(block.get_parameter("mixer.conv1d.weight")))
    block.get_submodule("mixer.conv1d").register_parameter("weight", weight)


def replace_mixer(block: Block) -> None:
    block.mixer = Mamba2(32, d_state=12, headdim=8, ngroups=2)


def update_in_place(block: Block) -> None:
    nn.init.normal_(block.get_parameter("mixer.A_log"))


def change_setting(block: Block) -> None:
    block.mixer.dt_limit = (0.5, 0.6)


def hook_mixer(block: Block) -> None:
    block.mixer.register_forward_hook(lambda module, inputs, output: (output[0] * 2, output[1]))


def hook_block(block: Block) -> None:
    block.register_forward_hook(lambda module, inputs, output: (output[0] * 2, output[1]))


def lower_precision(block: Block) -> None:
    block.bfloat16()


CHANGES = [
    *(change_weight, replace_parameter, update_in_place, change_setting, hook_mixer, hook_block, replace_mixer),
    lower_precision,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_planned_anew(change) -> None:
    blocks, h = stack("MMM", torch.float32), torch.randn(1, 4, 32)
    before, _ = decode(blocks, h)
    change(cast(Block, blocks[1]))
    after, _ = decode(blocks, h)
    fresh, _ = decode(copy.deepcopy(blocks), h)
    assert not torch.equal(before[-1], after[-1])
    torch.testing.assert_close(after[-1], fresh[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 37), (2, 1, 64), (MOST_ROWS + 1, 16), (0, 16)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_projections_of_few_rows(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    layer = torch.nn.Linear(shape[-1], 23, bias=bias).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        y = project(x, layer.weight, layer.bias)
        exact = torch.nn.functional.linear(
            x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
        )
    assert y.dtype == dtype
    assert_close("y", y, exact, dtype=dtype, yardstick=layer(x))
