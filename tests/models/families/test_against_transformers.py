"""Every family against transformers' own model: logits, states, batches of different lengths, gradients, files."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import dualscan
from dualscan.models.lm import MambaLM
from tests.models.families.cases import CASES, saved, tokens
from tests.oracle import relative_error

LOGITS, GRADIENTS = 1e-5, 1e-4  # relative, float32


class Pair(NamedTuple):
    """A model of transformers, the folder that it was saved in, and what was loaded from there."""

    theirs: Any
    ours: MambaLM
    folder: Path

    def error(self, actual: Tensor, ids: Tensor) -> float:
        """Of our logits against one pass of theirs, columns of padding left out."""
        with torch.inference_mode():
            expected = self.theirs(ids).logits
        return relative_error(actual[..., : expected.shape[-1]], expected)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.family}-{case.name}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("theirs")
    theirs = saved(request.param, folder)
    return Pair(theirs, dualscan.load(folder), folder)


def test_logits(pair: Pair) -> None:
    ids = tokens(2, 19)
    with torch.inference_mode():
        assert pair.error(pair.ours(ids).logits, ids) <= LOGITS


def test_prefill_in_two_pieces_and_steps(pair: Pair) -> None:
    """Against one pass of theirs: cached steps of theirs leave out a clamp of Δ that one pass applies."""
    ids, pieces, state = tokens(2, 17), [], None
    with torch.inference_mode():
        for piece in ids.split([6, 7, 1, 1, 1, 1], dim=1):
            logits, state = pair.ours(piece, state=state)
            pieces.append(logits)
    assert pair.error(torch.cat(pieces, dim=1), ids) <= LOGITS


def test_generation_of_different_lengths(pair: Pair) -> None:
    """Greedy, a batch of prompts, each as theirs alone would choose."""
    prompts = [tokens(1, n)[0] for n in (5, 1, 9)]
    made = pair.ours.generate(prompts, max_tokens=6, temperature=0.0).tokens
    for prompt, row in zip(prompts, made, strict=True):
        ids = torch.cat((prompt, row))
        with torch.inference_mode():
            logits = pair.theirs(ids[None]).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == row.tolist()


def test_gradients(pair: Pair, tmp_path: Path) -> None:
    theirs, ours = copy.deepcopy(pair.theirs), copy.deepcopy(pair.ours)
    ids, targets = tokens(2, 12), tokens(2, 12).flip(1)
    F.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten()).backward()
    ours.loss(ids, targets).backward()
    # Saved in place of the weights, so that every tensor of theirs has its counterpart.
    with torch.no_grad():
        for p in (*ours.parameters(), *theirs.parameters()):
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        for buffer in (b for name, b in theirs.named_buffers() if name.endswith("correction_bias")):
            buffer.zero_()
    ours.save(tmp_path / "ours", format="source")
    theirs.save_pretrained(tmp_path / "theirs")
    actual, expected = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) <= GRADIENTS, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_identical(pair: Pair, dtype: torch.dtype, tmp_path: Path) -> None:
    """Theirs -> ours -> our own format -> theirs: the same tensors, bit for bit, and the same settings."""
    copy.deepcopy(pair.theirs).to(dtype).save_pretrained(tmp_path / "theirs")
    dualscan.load(tmp_path / "theirs").save(tmp_path / "ours")
    dualscan.load(tmp_path / "ours").save(tmp_path / "back", format="source")
    before, after = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "back"))
    assert before.keys() == after.keys()
    for name, t in before.items():
        assert after[name].dtype == t.dtype, name
        assert torch.equal(after[name], t), name
    left, right = (dualscan.load(tmp_path / who) for who in ("theirs", "back"))
    assert left.source == right.source
    assert left.config == right.config


def test_a_step_of_training_goes_back_to_transformers(pair: Pair, tmp_path: Path) -> None:
    ours, ids = copy.deepcopy(pair.ours), tokens(2, 8)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours.loss(ids, ids).backward()
    optimizer.step()
    ours.save(tmp_path, format="source")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        logits = ours(ids).logits
        assert relative_error(logits[..., : theirs.config.vocab_size], theirs(ids).logits) <= LOGITS
    assert not torch.equal(logits, pair.ours(ids).logits)


def test_shards(pair: Pair, tmp_path: Path) -> None:
    pair.theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, shards = pair.ours.state_dict(), dualscan.load(tmp_path).state_dict()
    assert whole.keys() == shards.keys()
    assert all(torch.equal(shards[name], t) for name, t in whole.items())
