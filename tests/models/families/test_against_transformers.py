"""Every family against transformers' own model: logits, states, batches of different lengths, gradients, files."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import dualscan
from tests.models.families.cases import CASES, Case, load, saved, tokens
from tests.oracle import relative_error

LOGITS, GRADIENTS = 1e-5, 1e-4  # relative, float32
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.name}")


@EACH
def test_logits(case: Case, tmp_path: Path) -> None:
    theirs, ours = load(case, tmp_path)
    ids = tokens(2, 19)
    with torch.inference_mode():
        assert relative_error(ours(ids).logits[..., : theirs.config.vocab_size], theirs(ids).logits) <= LOGITS


@EACH
def test_prefill_in_two_pieces_and_steps(case: Case, tmp_path: Path) -> None:
    """Against one pass of theirs: cached steps of theirs leave out a clamp of Δ that one pass applies."""
    theirs, ours = load(case, tmp_path)
    ids = tokens(2, 17)
    with torch.inference_mode():
        expected = theirs(ids).logits
        pieces, state = [], None
        for piece in ids.split([6, 7, 1, 1, 1, 1], dim=1):
            logits, state = ours(piece, state=state)
            pieces.append(logits)
    assert relative_error(torch.cat(pieces, dim=1)[..., : expected.shape[-1]], expected) <= LOGITS


@EACH
def test_generation_of_different_lengths(case: Case, tmp_path: Path) -> None:
    """Greedy, a batch of prompts, each as theirs alone would choose."""
    theirs, ours = load(case, tmp_path)
    prompts = [tokens(1, n)[0] for n in (5, 1, 9)]
    made = ours.generate(prompts, max_tokens=6, temperature=0.0).tokens
    for prompt, row in zip(prompts, made, strict=True):
        ids = torch.cat((prompt, row))
        with torch.inference_mode():
            assert theirs(ids[None]).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == row.tolist()


@EACH
def test_gradients(case: Case, tmp_path: Path) -> None:
    theirs, ours = load(case, tmp_path)
    ids, targets = tokens(2, 12), tokens(2, 12).flip(1)
    logits = theirs(ids).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    ours.loss(ids, targets).backward()
    # Ours in the family's layout, so that every tensor of theirs has its counterpart.
    with torch.no_grad():
        for p in (*ours.parameters(), *theirs.parameters()):
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    ours.save(tmp_path / "ours", format="source")
    theirs.save_pretrained(tmp_path / "theirs")
    actual, expected = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) <= GRADIENTS, name


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_identical(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    """Theirs -> ours -> our own format -> theirs: the same tensors, bit for bit, and the same settings."""
    saved(case, tmp_path / "theirs").to(dtype).save_pretrained(tmp_path / "theirs")
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


@EACH
def test_shards(case: Case, tmp_path: Path) -> None:
    saved(case, tmp_path / "whole")
    saved(case, tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = (dualscan.load(tmp_path / name).state_dict() for name in ("whole", "shards"))
    assert all(torch.equal(shards[name], t) for name, t in whole.items())
