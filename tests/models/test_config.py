"""Configurations: validation, JSON, and the published sizes."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualscan.models.accounting import parameters
from dualscan.models.config import ModelConfig
from dualscan.models.presets import PRESETS, preset

GOOD: dict[str, Any] = {"d_model": 48, "pattern": "M*-M", "vocab_size": 50, "d_state": 16, "headdim": 12, "n_heads": 4}

# d_model, layers, parameters: the published Mamba-2 models.
PUBLISHED = {
    "mamba2_130m": (768, 24, 128_989_632),
    "mamba2_370m": (1024, 48, 368_346_624),
    "mamba2_780m": (1536, 48, 780_161_280),
    "mamba2_1_3b": (2048, 48, 1_343_757_312),
    "mamba2_2_7b": (2560, 64, 2_702_599_680),
    "mamba_130m": (768, 24, 129_135_360),
    "mamba_370m": (1024, 48, 371_516_416),
    "mamba_790m": (1536, 48, 793_204_224),
    "mamba_1_4b": (2048, 48, 1_372_178_432),
    "mamba_2_8b": (2560, 64, 2_768_345_600),
}


# Pattern counts (Mamba-2, attention, MLP) and billions of parameters.
HYBRIDS = {
    "mamba2_attention_2_7b": (58, 6, 0, 2.7),
    "mamba2_mlp_attention_2_7b": (28, 4, 32, 2.7),
    "mamba2_mlp_2_7b": (32, 0, 32, 2.7),
    "mamba2_hybrid_8b": (24, 4, 28, 8.66),
    "mamba2_8b": (56, 0, 0, 8.24),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_of_the_papers(name: str) -> None:
    config, (*counts, billions) = preset(name), HYBRIDS[name]
    assert [config.pattern.count(letter) for letter in "M*-"] == counts
    assert sum(counts) == config.n_layers
    assert abs(parameters(config).total / 1e9 - billions) < (0.01 if billions > 8 else 0.08)
    # Without positions, or with those of the published hybrid.
    assert (config.rope_theta is None) == (config.d_model == 4096)


def test_derived_sizes() -> None:
    config = ModelConfig(**GOOD)
    assert (config.d_inner, config.nheads, config.n_layers) == (96, 8, 4)
    assert config.layer_types == ("mamba2", "attention", "mlp", "mamba2")
    assert config.padded_vocab_size == 64
    assert ModelConfig(**{**GOOD, "vocab_size": 64}).padded_vocab_size == 64
    assert ModelConfig(**{**GOOD, "vocab_multiple": 1}).padded_vocab_size == 50
    assert config.attention_heads == 4
    assert ModelConfig(**{**GOOD, "n_heads": None, "d_model": 192}).attention_heads == 3


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config = preset(name)
    assert (config.d_model, config.n_layers) == PUBLISHED[name][:2]
    kind = name.split("_")[0]
    assert config.layer_types == (kind,) * config.n_layers
    assert (config.ngroups, config.expand, config.d_conv) == (1, 2, 4)
    assert (config.headdim, config.d_state) == ((64, 128) if kind == "mamba2" else (64, 16))
    assert (config.vocab_size, config.padded_vocab_size) == (50277, 50288 if kind == "mamba2" else 50280)
    assert config.tie_embeddings


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"d_model": 0}, ValueError, ["d_model=0", "at least 1"]),
        ({"d_model": 48.0}, TypeError, ["d_model=48.0", "whole number"]),
        ({"d_model": "48"}, TypeError, ["d_model='48'", "whole number"]),
        ({"vocab_size": -1}, ValueError, ["vocab_size=-1", "at least 1"]),
        ({"vocab_multiple": 0}, ValueError, ["vocab_multiple=0"]),
        ({"chunk_size": 0}, ValueError, ["chunk_size=0"]),
        ({"d_mlp": 0}, ValueError, ["d_mlp=0"]),
        ({"n_heads": 0}, ValueError, ["n_heads=0"]),
        ({"n_heads": True}, TypeError, ["n_heads=True"]),
        ({"n_heads": 5}, ValueError, ["n_heads=5", "d_model=48", "divisor"]),
        ({"n_kv_heads": 3}, ValueError, ["n_kv_heads=3", "n_heads=4", "divisor"]),
        ({"n_heads": 16, "rope_theta": 10.0}, ValueError, ["head_dim=3", "even"]),
        ({"headdim": 13}, ValueError, ["headdim=13", "d_inner=96", "such as 32"]),
        ({"ngroups": 3}, ValueError, ["ngroups=3", "nheads=8"]),
        ({"head_pattern": "mqv"}, ValueError, ["unknown head pattern 'mqv'", "multi-query"]),
        ({"head_pattern": 3}, ValueError, ["unknown head pattern 3"]),
        ({"head_pattern": "mqa", "ngroups": 2}, ValueError, ["ngroups=2", "'grouped-value'"]),
        ({"feature_map": "gelu"}, ValueError, ["unknown feature map 'gelu'", "silu"]),
        ({"feature_map": None}, ValueError, ["unknown feature map 'None'"]),
        ({"d_conv": 9}, ValueError, ["d_conv=9", "1 to 8"]),
        ({"pattern": ""}, ValueError, ["pattern=''", "MMMM"]),
        ({"pattern": 4}, ValueError, ["pattern=4", "MMMM"]),
        ({"pattern": "MMX"}, ValueError, ["pattern='MMX'", "'X'", "M mamba2", "* attention", "- mlp"]),
        ({"dt_limit": (2.0, 1.0)}, ValueError, ["dt_limit=(2.0, 1.0)", "low <= high"]),
        ({"dt_limit": None}, ValueError, ["dt_limit=None", "(0.0, inf)"]),
        ({"norm_eps": 0.0}, ValueError, ["norm_eps=0.0", "positive"]),
        ({"norm_eps": math.nan}, ValueError, ["norm_eps=nan"]),
        ({"rope_theta": -5.0}, ValueError, ["rope_theta=-5.0"]),
        ({"embedding_std": -1.0}, ValueError, ["embedding_std=-1.0"]),
        ({"logits_scale": math.inf}, ValueError, ["logits_scale=inf", "finite"]),
        ({"pattern": "ME", "n_experts": 2, "d_expert": 3}, ValueError, ["'ME'", "experts_per_token"]),
        ({"pattern": "MS"}, ValueError, ["'MS'", "adapter_rank"]),
        ({"pattern": "P", "branch_scales": (1.0,)}, ValueError, ["branch_scales", "4 finite numbers"]),
        ({"mlp_activation": "tanh"}, ValueError, ["'tanh'", "swiglu"]),
    ],
)
def test_bad_values(changes: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        ModelConfig(**{**GOOD, **changes})
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_only_the_layers_that_exist_are_checked() -> None:
    assert ModelConfig(**{**GOOD, "pattern": "*-", "headdim": 13}).n_layers == 2
    assert ModelConfig(**{**GOOD, "pattern": "MM", "n_heads": 5}).n_layers == 2


def test_it_is_a_value() -> None:
    config = ModelConfig(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3  # pyrefly: ignore[read-only]
    assert config == ModelConfig(**GOOD)
    assert hash(config) == hash(ModelConfig(**GOOD))


configs = st.builds(
    ModelConfig,
    d_model=st.sampled_from([32, 64]),
    pattern=st.text("M*-", min_size=1, max_size=6),
    vocab_size=st.integers(1, 1000),
    headdim=st.sampled_from([8, 16]),
    ngroups=st.sampled_from([1, 2]),
    dt_limit=st.tuples(st.floats(0, 1), st.floats(1, math.inf)),
    chunk_size=st.none() | st.integers(1, 300),
    n_heads=st.none() | st.sampled_from([1, 4]),
    rope_theta=st.none() | st.floats(1, 1e6),
    tie_embeddings=st.booleans(),
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(configs)
def test_json_round_trip(config: ModelConfig) -> None:
    # Strict JSON: an infinite limit must not be written as Infinity.
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert ModelConfig.from_dict(json.loads(text)) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name: str) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(preset(name).to_dict()))) == PRESETS[name]


def test_unknown_and_missing_settings() -> None:
    with pytest.raises(ValueError, match=r"unknown model setting 'd_modle'; did you mean 'd_model'"):
        ModelConfig.from_dict({**GOOD, "d_modle": 3})
    with pytest.raises(ValueError, match=r"unknown model setting 'zzz'; the fields are d_model, pattern"):
        ModelConfig.from_dict({**GOOD, "zzz": 3})
    for name in ("d_model", "pattern", "vocab_size"):
        with pytest.raises(ValueError, match=f"no '{name}'; it needs d_model, pattern and vocab_size"):
            ModelConfig.from_dict({key: value for key, value in GOOD.items() if key != name})
    with pytest.raises(ValueError, match=r"dt_limit=3 must be \(low, high\)"):
        ModelConfig.from_dict({**GOOD, "dt_limit": 3})


def test_presets_by_name() -> None:
    assert preset("tiny", vocab_size=999) == dataclasses.replace(PRESETS["tiny"], vocab_size=999)
    assert preset("tiny", dt_limit=(0.0, math.inf)) == PRESETS["tiny"]
    with pytest.raises(
        ValueError, match=r"unknown preset 'mamba2-130m'; the presets are .*tiny.* Did you mean 'mamba2_130m'"
    ):
        preset("mamba2-130m")
    with pytest.raises(ValueError, match=r"unknown model setting 'layers'"):
        preset("tiny", layers=3)
    with pytest.raises(ValueError, match=r"headdim=5"):
        preset("tiny", headdim=5)
