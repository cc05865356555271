"""Folders that `DualscanForCausalLM.save_pretrained` wrote: loaded, and written, without transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dualscan
from dualscan.interop import DualscanForCausalLM, register_with_transformers
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from tests.models.test_weights import same, write_config

SIZES: dict[str, Any] = {"d_model": 32, "vocab_size": 37, "d_state": 8, "headdim": 16, "n_heads": 2, "adapter_rank": 4}
CASES: dict[str, dict[str, Any]] = {
    "mamba2": {"pattern": "MM", "ngroups": 2, "mamba_bias": True},
    "hybrid, untied": {"pattern": "mM*-", "rope_theta": 100.0, "tie_embeddings": False, "dt_limit": (0.01, 0.5)},
    "experts, shared, clamp": {
        "pattern": "PESS",
        "n_experts": 4,
        "experts_per_token": 2,
        "d_expert": 8,
        "router": "sigmoid",
        "branch_scales": (0.5, 2.0, 1.5, 0.7),
        "dt_limit": (0.01, float("inf")),
    },
}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register_with_transformers()


def wrapped(case: str) -> DualscanForCausalLM:
    torch.manual_seed(0)
    model = MambaLM(ModelConfig(**SIZES, **CASES[case])).eval()
    return DualscanForCausalLM.from_model(model, eos_token_id=1, pad_token_id=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [False, True])
def test_there_and_back(case: str, dtype: torch.dtype, shards: bool, tmp_path: Path) -> None:
    """Whole or in shards: the same model, and the same tensors and settings when it goes back."""
    theirs = wrapped(case).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", **({"max_shard_size": "8KB"} if shards else {}))
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2 * shards
    ours, ids = dualscan.load(tmp_path / "theirs"), torch.randint(37, (2, 9))
    same(ours, theirs.model)
    assert ours.config == theirs.model.config
    assert torch.equal(ours(ids).logits[..., :37], theirs(ids).logits)
    ours.save(tmp_path / "ours")
    dualscan.load(tmp_path / "ours").save(tmp_path / "back", format="source")
    after, before = load_file(tmp_path / "back" / "model.safetensors"), theirs.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) and after[name].dtype == t.dtype for name, t in before.items())
    values = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("theirs", "back")]
    assert values[0] == values[1]
    assert values[0]["eos_token_id"] == 1


@pytest.mark.parametrize("case", CASES)
def test_models_made_here_go_there(case: str, tmp_path: Path) -> None:
    """Any model does, whatever its layers."""
    model = wrapped(case).model.bfloat16()
    model.save(tmp_path, format="dualscan_hf")
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.randint(37, (2, 9))
    assert type(theirs) is DualscanForCausalLM
    assert theirs.dtype == torch.bfloat16
    same(theirs.model, model)
    assert torch.equal(theirs(ids).logits, model(ids).logits[..., :37])
    same(dualscan.load(tmp_path), model)


def test_settings_that_are_not_there_are_defaults(tmp_path: Path) -> None:
    """As `AutoModelForCausalLM` reads them, also under the names that transformers has for every model."""
    theirs = wrapped("hybrid, untied")
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("conv_bias", "norm_eps", "router"):
        del values[name]
    values["hidden_size"], values["tie_word_embeddings"] = values.pop("d_model"), values.pop("tie_embeddings")
    write_config(tmp_path, values)
    assert dualscan.load(tmp_path).config == AutoModelForCausalLM.from_pretrained(tmp_path).model.config
    same(dualscan.load(tmp_path), theirs.model)


def test_messages(tmp_path: Path) -> None:
    wrapped("mamba2").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for changes, words in (
        ({"headdim": 7}, r"config\.json: .*headdim=7 does not divide"),
        ({"pattern": "M"}, r"model\.safetensors does not fit its config\.json: it has the unknown 'model\.layers\.1"),
    ):
        write_config(tmp_path, {**values, **changes})
        with pytest.raises(ValueError, match=words):
            dualscan.load(tmp_path)
