"""This package's own models as transformers stores them: what `DualscanForCausalLM.save_pretrained` writes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dualscan.models.config import ModelConfig
from dualscan.models.families.family import Family
from dualscan.models.families.layout import Layout
from dualscan.models.families.settings import Settings
from dualscan.models.presets import preset

MODEL_TYPE = "dualscan"
# What transformers calls them in every model; it reads both spellings and writes ours.
ALIASES = {"hidden_size": "d_model", "tie_word_embeddings": "tie_embeddings"}


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` among the values of a transformers configuration.

    Args:
        values: by the names of `ModelConfig`, and others. Settings that are not there are those of the preset
            mamba2_130m.

    Raises:
        ValueError: as `ModelConfig`.
        TypeError: as `ModelConfig`.
    """
    values = {ALIASES.get(name, name): value for name, value in values.items()}
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    given = {name: values[name] for name in names if name in values}
    return ModelConfig.from_dict({**preset("mamba2_130m").to_dict(), **given})


def _config(settings: Settings) -> ModelConfig:
    return model_config(settings.values)


def _to_config(config: ModelConfig) -> dict[str, Any]:
    return {"architectures": ["DualscanForCausalLM"], "model_type": MODEL_TYPE, **config.to_dict()}


def _layout(config: ModelConfig) -> Layout:
    del config
    return Layout(names={name: f"model.{name}" for name in ("embedding", "layers", "norm_f", "lm_head")})


DUALSCAN_HF = Family(
    name="dualscan_hf",
    checkpoints="what `DualscanForCausalLM.save_pretrained` wrote",
    config=_config,
    to_config=_to_config,
    takes="every model",
    layout=_layout,
)
