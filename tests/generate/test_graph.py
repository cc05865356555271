"""Decoding replayed from a CUDA graph gives what decoding step by step gives."""

import copy
from typing import Any

import pytest
import torch

from dualscan.generate import graph
from dualscan.generate.engine import prefill, stream
from dualscan.generate.graph import Stepper
from dualscan.generate.sampling import Sampling
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from dualscan.nn.block import keep_in
from tests.oracle import assert_close

GREEDY = Sampling(temperature=0)


def model(pattern: str, device: str, **sizes: Any) -> MambaLM:
    """With an output projection of its own: the embedding makes a token the likeliest to follow itself."""
    torch.manual_seed(1)
    sizes = {"d_model": 64, "vocab_size": 37, "d_state": 16, "headdim": 16, "tie_embeddings": False} | sizes
    return MambaLM(ModelConfig(pattern=pattern, **sizes)).to(device)


def test_a_cpu_records_nothing() -> None:
    lm = model("MM", "cpu")
    tokens = torch.randint(0, 37, (2, 5))
    with torch.inference_mode():
        _, state = prefill(lm, tokens)
        stepper = Stepper(lm, state, 100)
        logits = stepper(tokens[:, 0])
        assert not stepper.recorded
        _, state = prefill(lm, tokens)
        assert torch.equal(logits, lm(tokens[:, :1], state=state).logits[:, -1])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pattern", "recorded"), [("MM", True), ("M-M-", True), ("mM", True), ("M*M", False)])
def test_replayed_steps_equal_steps(
    pattern: str, recorded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model(pattern, "cuda").to(dtype)
    prompts = [torch.randint(0, 37, (length,)) for length in (5, 9, 1)]
    with torch.inference_mode():
        _, state = prefill(lm, prompts)
        stepper = Stepper(lm, state, 100)
        token = torch.zeros(3, dtype=torch.int64, device="cuda")
        stepper(token)
        assert stepper.recorded == recorded
    replayed = list(stream(lm, prompts, max_tokens=40, sampling=GREEDY))
    monkeypatch.setattr(graph, "LEAST_STEPS", 1000)
    stepped = list(stream(lm, prompts, max_tokens=40, sampling=GREEDY))
    assert torch.equal(torch.stack(replayed), torch.stack(stepped))
    # A text that goes on and on, so that a state that is not carried on would show.
    assert torch.stack(stepped).unique(dim=0).shape[0] > 30


@pytest.mark.cuda
def test_two_generations_side_by_side() -> None:
    lm = model("MM", "cuda")
    one, two = torch.randint(0, 37, (1, 8)), torch.randint(0, 37, (1, 8))
    expected = [list(stream(lm, prompt, max_tokens=30, sampling=GREEDY)) for prompt in (one, two)]
    pairs = zip(*(stream(lm, prompt, max_tokens=30, sampling=GREEDY) for prompt in (one, two)), strict=True)
    for place, pair in enumerate(pairs):
        assert [int(token) for token in pair] == [int(tokens[place]) for tokens in expected]


@pytest.mark.cuda
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 32, 33])
@pytest.mark.parametrize(
    ("pattern", "options"), [("MMM", {"tie_embeddings": True}), ("M-MM", {"ngroups": 2, "norm_groups": 1})], ids=str
)
@torch.inference_mode()
def test_replayed_steps_are_exact(
    pattern: str, options: dict[str, Any], batch: int, state_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sizes that the form of four launches takes, but for 33 rows, after packed prompts; from two rows on states
    are written once every few tokens, here more than twice."""
    triton_fused = pytest.importorskip("dualscan.ops.decode.triton_fused")
    monkeypatch.setattr(triton_fused, "DEFERRED_ROWS", 2)
    lm = model(pattern, "cuda", d_model=256, headdim=64, **options).bfloat16()
    exact = copy.deepcopy(lm).double()
    prompts = [torch.randint(0, 37, (1 + row % 7,)) for row in range(batch)]
    _, state = prefill(lm, prompts, state_dtype=state_dtype)
    wide, eager = (keep_in(dtype, copy.deepcopy(state)) for dtype in (torch.float32, None))
    stepper, results = Stepper(lm, state, 100), []
    for token in torch.randint(0, 37, (2 * triton_fused.KEPT + 5, batch), device="cuda"):
        expected, wide = exact(token[:, None], state=wide)
        stepped, eager = lm(token[:, None], state=eager, reuse_state=True)
        results.append((stepper(token).clone(), expected[:, -1], stepped[:, -1]))
    assert stepper.recorded
    late = [isinstance(layer, triton_fused.Deferred) for layer in stepper._state if layer is not None]
    assert late == [batch in (2, 32)] * 3
    replayed, right, eagerly = map(torch.stack, zip(*results, strict=True))
    assert_close("logits", replayed, right, dtype=torch.bfloat16, yardstick=eagerly)
