"""Models made here in the formats of other programs: the same logits there, the same model when they come back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dualscan
from dualscan.models import families
from dualscan.models.config import ModelConfig
from dualscan.models.families.express import express, fitting
from dualscan.models.lm import MambaLM
from tests.models.test_weights import same
from tests.oracle import relative_error

SIZES: dict[str, Any] = {"d_model": 24, "vocab_size": 37, "d_state": 8, "headdim": 8, "n_heads": 3}
FREE: dict[str, Any] = {"headdim": 12, "expand": 3, "d_state": 4, "n_kv_heads": 1, "head_dim": 12, "mamba_bias": True}
EXPERTS: dict[str, Any] = {"n_experts": 4, "experts_per_token": 2, "d_expert": 12}
# Family -> models of ours, by what differs from the defaults.
TAKEN: dict[str, list[dict[str, Any]]] = {
    "mamba2": [{"pattern": "MM"}, {"pattern": "MMM", "ngroups": 2, "norm_eps": 1e-6, "dt_limit": (0.0, 0.1)}],
    "mamba": [{"pattern": "mm"}, {"pattern": "mmm", "dt_rank": 3, "conv_bias": False, "tie_embeddings": False}],
    "falcon_mamba": [
        {"pattern": "mm", "inner_norms": True, "inner_norm_weights": False},
        {"pattern": "m", "inner_norms": True, "inner_norm_weights": False, "inner_norm_eps": 0.1, "norm_eps": 0.01},
    ],
    "bamba": [
        {"pattern": "M-*-M-", "rope_theta": 1e4},
        {**FREE, "pattern": "*-M-", "rope_theta": 500.0, "rotary_dim": 4, "d_mlp": 20, "mlp_bias": True, "ngroups": 3},
        {"pattern": "M-M-", "dt_limit": (0.01, 0.05), "tie_embeddings": False, "norm_eps": 1e-3},
    ],
    "nemotron_h": [
        {"pattern": "MM*-M", "mlp_activation": "relu2"},
        {**FREE, "pattern": "-M*", "mlp_activation": "gelu", "mlp_bias": True, "ngroups": 3},
        {**EXPERTS, "pattern": "ME*E", "d_shared": 20, "router": "sigmoid", "mlp_activation": "relu2"},
        {"pattern": "M*", "d_ssm": 40, "dt_limit": (0.05, float("inf")), "tie_embeddings": False},
    ],
    "granitemoehybrid": [
        {"pattern": "M-*-M-"},
        {**FREE, "pattern": "*-M-", "rope_theta": 500.0, "attention_scale": 0.3, "attention_bias": True},
        {**EXPERTS, "pattern": "MEME*E", "d_shared": 20},
        {"pattern": "M-*-", "embedding_scale": 3.0, "residual_scale": 0.3, "logits_scale": 0.7, "dt_limit": (0.01, 1)},
    ],
    "falcon_h1": [
        {"pattern": "P-P-", "rope_theta": 1e4},
        {
            **FREE,
            "pattern": "P-",
            "rope_theta": 500.0,
            "d_ssm": 36,
            "attention_scale": 0.2,
            "branch_scales": (0.5, 2.0, 1.5, 0.7),
            "projection_scales": (0.9, 0.8, 1.1, 0.7, 0.6),
            "mlp_scale": 0.6,
            "gate_scale": 0.8,
            "embedding_scale": 2.0,
            "logits_scale": 0.3,
        },
        {"pattern": "P-P-", "rope_theta": 1e4, "gated_norm": False, "tie_embeddings": False},
    ],
    "zamba2": [
        {
            "pattern": "MSMSS",
            "adapter_rank": 3,
            "mlp_activation": "geglu",
            "attention_scale": 0.5 / 2**0.5,
            "attention_adapters": adapters,
            "n_shared": 2,
            **others,
        }
        for adapters, others in ((False, {"n_kv_heads": 1}), (True, {"rope_theta": 500.0, "d_mlp": 20, "ngroups": 2}))
    ],
    "jamba": [
        {"pattern": "m-*-m-*-", "inner_norms": True},
        {"pattern": "m-*-m-m-", "inner_norms": True, "tie_embeddings": False, "dt_rank": 3, "n_kv_heads": 1},
        {**EXPERTS, "pattern": "m-mEm-*E", "inner_norms": True, "router": "softmax_topk", "d_mlp": 12},
        {**EXPERTS, "pattern": "mE", "inner_norms": True, "router": "softmax_topk", "mamba_bias": True},
    ],
}
CASES = [(name, changes) for name, models in TAKEN.items() for changes in models]


def made(changes: dict[str, Any]) -> MambaLM:
    """A model with weights far from the linear regime, also where they are zeros or ones at first."""
    torch.manual_seed(0)
    model = MambaLM(ModelConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "A_log" not in name:
                p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize(("family", "changes"), CASES, ids=lambda x: x if isinstance(x, str) else x["pattern"])
def test_logits_there_and_the_way_back(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model, ids = made(changes), torch.randint(37, (2, 19))
    model.save(tmp_path, format=family)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert theirs.config.model_type == family
    with torch.inference_mode():
        logits = model(ids).logits
        # Their hybrids have no caches without attention.
        assert relative_error(logits, theirs(ids, use_cache=False).logits) <= 1e-5
        back = dualscan.load(tmp_path)
        same(back, model)
        assert relative_error(back(ids).logits, logits) <= 1e-6


# Format asked for, model, the setting that does not fit and what would become of it.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mamba2", {"pattern": "MM*-"}, "pattern='MM*-' would become 'MMMM'"),
    ("mamba2", {"pattern": "MM", "gated_norm": False}, "gated_norm=False would become True"),
    ("mamba2", {"pattern": "MM", "head_pattern": "multi-query"}, "head_pattern='multi-query' would become"),
    ("mamba", {"pattern": "MM"}, "pattern='MM' would become 'mm'"),
    ("mamba", {"pattern": "mm", "inner_norms": True}, "inner_norms=True would become False"),
    ("falcon_mamba", {"pattern": "mm"}, "inner_norms=False would become True"),
    ("falcon_mamba", {"pattern": "mm", "inner_norms": True}, "inner_norm_weights=True would become False"),
    ("bamba", {"pattern": "M*-M-"}, "pattern='M*-M-' would become 'M-*-M-'"),
    ("bamba", {"pattern": "M-*-"}, "rope_theta=None would become 10000.0"),
    ("bamba", {"pattern": "M-*-", "rope_theta": 1e4, "mlp_activation": "relu2"}, "mlp_activation='relu2' would"),
    ("bamba", {"pattern": "M-*-", "rope_theta": 1e4, "attention_scale": 0.5}, "attention_scale=0.5 would become None"),
    ("bamba", {"pattern": "M-", "d_ssm": 40}, "d_ssm=40 would become None"),
    ("nemotron_h", {"pattern": "mM*"}, "pattern='mM*' would become 'MM*'"),
    ("nemotron_h", {"pattern": "M-"}, "mlp_activation='swiglu' would become 'relu2'"),
    ("nemotron_h", {"pattern": "M*", "attention_bias": True}, "attention_bias=True would become False"),
    ("nemotron_h", {"pattern": "M*", "dt_limit": (0.0, 0.1)}, "dt_limit=(0.0, 0.1) would become (0.0, inf)"),
    ("nemotron_h", {**EXPERTS, "pattern": "ME", "router": "sigmoid", "mlp_activation": "relu2"}, "d_shared=None would"),
    ("granitemoehybrid", {**EXPERTS, "pattern": "ME*-", "d_shared": 8}, "pattern='ME*-' would become 'ME*E'"),
    ("granitemoehybrid", {**EXPERTS, "pattern": "ME", "d_shared": 8, "router": "sigmoid"}, "router='sigmoid' would"),
    ("granitemoehybrid", {"pattern": "M-*-", "rope_theta": 1e4, "rotary_dim": 4}, "rotary_dim=4 would become None"),
    ("granitemoehybrid", {"pattern": "M-*-", "mlp_scale": 0.5}, "mlp_scale=0.5 would become 1.0"),
    ("falcon_h1", {"pattern": "PP"}, "pattern='PP' would become 'P-P-'"),
    ("falcon_h1", {"pattern": "P-", "rope_theta": 1e4, "residual_scale": 0.5}, "residual_scale=0.5 would become 1.0"),
    ("zamba2", {"pattern": "MS", "adapter_rank": 3}, "attention_scale=None would become"),
    ("zamba2", {"pattern": "M", "tie_embeddings": False}, "tie_embeddings=False would become True"),
    ("jamba", {"pattern": "m-*-*-m-*-", "inner_norms": True}, "pattern='m-*-*-m-*-' would become 'm-m-m-m-m-'"),
    ("jamba", {"pattern": "m-*-", "inner_norms": True, "inner_norm_eps": 0.1}, "inner_norm_eps=0.1 would become None"),
    ("jamba", {"pattern": "m-*-"}, "inner_norms=False would become True"),
    (
        "jamba",
        {**EXPERTS, "pattern": "m-mE", "inner_norms": True, "router": "softmax_topk", "d_mlp": 20},
        "d_expert=12 would become 20",
    ),
    ("mamba_ssm", {"pattern": "M-M"}, "pattern='M-M' would become 'M-M-'"),
    ("mamba_ssm", {"pattern": "M-", "d_mlp": 100}, "d_mlp=100 would become 128"),
    ("mamba_ssm", {"pattern": "M", "norm_eps": 1e-6}, "norm_eps=1e-06 would become 1e-05"),
]


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED)
def test_what_does_not_fit_is_named(family: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = made(changes)
    with pytest.raises(ValueError) as raised:
        model.save(tmp_path / "there", format=family)
    assert f"the format {family} cannot express this model: {words}" in str(raised.value)
    assert "'dualscan' and 'dualscan_hf' take every model" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "there").exists()
    if words.startswith("pattern="):
        assert families.family(family).takes in str(raised.value)


def test_settings_that_nothing_asks_for_do_not_matter() -> None:
    """A model of Mamba-2 alone has no MLPs, and none of attention's settings: what can take it is listed."""
    free = {"d_mlp": 100, "mlp_activation": "gelu", "rope_theta": 3.0, "attention_bias": True, "dt_rank": 1}
    config = ModelConfig(**SIZES, pattern="MM", **free, inner_norms=True, n_experts=3, chunk_size=8)
    assert fitting(config) == ["mamba_ssm", "mamba2", "nemotron_h", "zamba2", "dualscan_hf"]


@pytest.mark.parametrize("number", [1, 3])
def test_whole_numbers_are_numbers(number: int, tmp_path: Path) -> None:
    """transformers wants 1.0 where a user of ours may say 1."""
    limits = {"dt_limit": (0, number), "rope_theta": 100 * number}
    for pattern, family in (("M-*-", "granitemoehybrid"), ("M-*-", "bamba"), ("P-", "falcon_h1"), ("MM", "mamba2")):
        factors = {"embedding_scale": number, "logits_scale": number} if family == "falcon_h1" else {}
        made({"pattern": pattern, **limits, **factors}).save(tmp_path / family, format=family)
        AutoModelForCausalLM.from_pretrained(tmp_path / family)
        assert express(families.family(family), dualscan.load(tmp_path / family).config)


def test_nobody_ends_a_text_at_another_programs_token(tmp_path: Path) -> None:
    """Families have numbers of their own for the end of a text, which mean something else to a model made here."""
    made({"pattern": "M*-", "mlp_activation": "relu2"}).save(tmp_path, format="nemotron_h")
    config = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
