"""States kept in bfloat16 from token to token: what they change, where they come from and where they go."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dualscan.generate.engine import generate, prefill, stream
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from dualscan.nn.block import keep_in
from dualscan.nn.mamba2 import Mamba2State
from tests.oracle import CAPS, relative_error

SIZES: dict[str, Any] = {"d_model": 32, "vocab_size": 37, "d_state": 16, "headdim": 16, "tie_embeddings": False}


def model(pattern: str = "MM", **options: Any) -> MambaLM:
    torch.manual_seed(1)
    return MambaLM(ModelConfig(pattern=pattern, **SIZES, **options))


def ssm_dtypes(state: Any) -> list[torch.dtype]:
    return [layer.ssm.dtype for layer in state if isinstance(layer, Mamba2State)]


def prompts(*lengths: int) -> list[Tensor]:
    return [torch.randint(0, 37, (length,)) for length in lengths]


@torch.inference_mode()
def steps(lm: MambaLM, state: Any, tokens: Tensor, **options: Any) -> tuple[Tensor, Any]:
    logits = []
    for token in tokens.split(1, dim=1):
        out, state = lm(token, state=state, **options)
        logits.append(out)
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("lengths", [(9, 9), (3, 14, 1)], ids=["equal", "packed"])
def test_a_prompt_leaves_rounded_states(lengths: tuple[int, ...]) -> None:
    lm, rows = model("M-M"), prompts(*lengths)
    logits, wide = prefill(lm, rows)
    same, state = prefill(lm, rows, state_dtype=torch.bfloat16)
    assert torch.equal(logits, same)
    assert ssm_dtypes(state) == [torch.bfloat16] * 2
    for before, after in zip(wide, state, strict=True):
        if before is not None:
            assert torch.equal(before.ssm.bfloat16(), after.ssm)
            assert torch.equal(before.conv, after.conv)


# Rows that the CPU's kernel takes, and more; in place and not.
@pytest.mark.parametrize("reuse_state", [False, True])
@pytest.mark.parametrize("batch", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_computes_in_float32_and_rounds(dtype: torch.dtype, batch: int, reuse_state: bool) -> None:
    lm, rows = model("M").to(dtype), prompts(*[8] * batch)
    _, state = prefill(lm, rows, state_dtype=torch.bfloat16)
    tokens = torch.randint(0, 37, (batch, 1))
    wide_logits, wide = steps(lm, keep_in(torch.float32, copy.deepcopy(state)), tokens)
    logits, after = steps(lm, state, tokens, reuse_state=reuse_state)
    assert torch.equal(logits, wide_logits), "a layer's output must not see the rounding of its next state"
    assert torch.equal(after[0].ssm, wide[0].ssm.bfloat16())


def test_the_kernel_and_the_operations_round_alike() -> None:
    lm = model()
    _, state = prefill(lm, prompts(8, 8), state_dtype=torch.bfloat16)
    tokens = torch.randint(0, 37, (2, 12))
    logits, after = steps(lm, state, tokens)
    lm64 = copy.deepcopy(lm).double()  # no kernel takes float64
    same, same_after = steps(lm64, state, tokens)
    assert ssm_dtypes(same_after) == [torch.bfloat16] * 2
    # One rounding in a hundred falls on the other side after the other sums.
    assert relative_error(logits, same) < CAPS[torch.bfloat16][0] / 10
    for one, other in zip(after, same_after, strict=True):
        assert relative_error(one.ssm, other.ssm) < CAPS[torch.bfloat16][0] / 10


def test_later_tokens_continue_a_rounded_state() -> None:
    """A piece of several tokens, a packed one and one under gradients take it and give one back."""
    lm = model()
    _, state = prefill(lm, prompts(8, 8), state_dtype=torch.bfloat16)
    tokens = torch.randint(0, 37, (2, 5))
    with torch.inference_mode():
        expected = lm(tokens, state=keep_in(torch.float32, state))
        got = lm(tokens, state=state)
        ends = torch.tensor([0, 5, 10], dtype=torch.int32)
        packed = lm(tokens.flatten()[None], state=state, cu_seqlens=ends)
    graded = lm(tokens[:, :1], state=copy.deepcopy(state))
    assert torch.equal(got.logits, expected.logits)
    for out in (got, packed):
        assert ssm_dtypes(out.state) == [torch.bfloat16] * 2
        for layer, wide in zip(out.state, expected.state, strict=True):
            assert relative_error(layer.ssm, wide.ssm) < CAPS[torch.bfloat16][0]
    assert graded.logits.requires_grad
    assert ssm_dtypes(graded.state) == [torch.bfloat16] * 2


def test_a_step_may_change_the_dtype() -> None:
    lm = model()
    _, state = prefill(lm, prompts(8, 8))
    tokens = torch.randint(0, 37, (2, 1))
    for _ in range(2):  # the states of a step that reused them know where they are
        _, state = steps(lm, state, tokens, reuse_state=True)
    _, state = steps(lm, state, tokens, reuse_state=True, state_dtype=torch.bfloat16)
    assert ssm_dtypes(state) == [torch.bfloat16] * 2
    _, state = steps(lm, state, tokens, reuse_state=True, state_dtype=torch.float32)
    assert ssm_dtypes(state) == [torch.float32] * 2


@pytest.mark.parametrize("options", [{}, {"ngroups": 2}, {"norm_groups": 2}], ids=str)
def test_logits_stay_close_over_many_tokens(options: dict[str, Any]) -> None:
    lm = model(**options)
    rows, tokens = prompts(8, 8), torch.randint(0, 37, (2, 200))
    exact, _ = steps(copy.deepcopy(lm).double(), prefill(copy.deepcopy(lm).double(), rows)[1], tokens)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        logits, _ = steps(lm, prefill(lm, rows, state_dtype=dtype)[1], tokens)
        found[dtype] = relative_error(logits[:, -50:], exact[:, -50:])
    assert found[torch.float32] < CAPS[torch.float32][0]
    assert found[torch.bfloat16] < CAPS[torch.bfloat16][0]


def test_other_layers_keep_their_states() -> None:
    lm = model("M*mM", n_heads=2)
    _, state = prefill(lm, prompts(4, 4), state_dtype=torch.bfloat16)
    assert ssm_dtypes(state) == [torch.bfloat16] * 2
    assert state[2].ssm.dtype == torch.float32
    out = generate(lm, prompts(4, 6), max_tokens=5, temperature=0, state_dtype=torch.bfloat16)
    assert out.tokens.shape == (2, 5)


def test_generation_continues_with_rounded_states() -> None:
    lm, rows = model(), prompts(5, 9)
    _, state = prefill(lm, rows, state_dtype=torch.bfloat16)
    made = torch.stack(list(stream(lm, rows, max_tokens=6, seed=3, state_dtype=torch.bfloat16)), 1)
    assert torch.equal(made, generate(lm, rows, max_tokens=6, seed=3, state_dtype=torch.bfloat16).tokens)
    assert ssm_dtypes(steps(lm, state, made)[1]) == [torch.bfloat16] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8], ids=str)
def test_other_dtypes_are_named(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"state_dtype={dtype}; SSM states are kept in torch.float32 or"):
        generate(model(), prompts(3), max_tokens=2, state_dtype=dtype)
