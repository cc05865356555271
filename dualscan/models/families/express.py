"""One of our models in another program's format: a `config.json` for it, proven by reading it back."""

import math
from typing import Any

import torch

from dualscan.models.config import ModelConfig
from dualscan.models.families import NAMES
from dualscan.models.families import family as family_of
from dualscan.models.families.family import Family
from dualscan.models.families.settings import Settings
from dualscan.models.lm import MambaLM
from dualscan.nn.mamba import Mamba

# At initialisation only, or a matter of speed.
_FREE = {"embedding_std", "chunk_size"}


def express(family: Family, config: ModelConfig) -> dict[str, Any]:
    """A family's `config.json` for a configuration of ours.

    Raises:
        ValueError: the family cannot express it; names the first setting that it would change.
    """
    values = family.to_config(config)
    cannot = f"the format {family.name} cannot express this model:"
    try:
        back = family.config(Settings(family.name, values))
    except ValueError as error:
        raise ValueError(f"{cannot} {error}") from error
    changed = _changed(config, back)
    if changed is not None:
        takes = f" {family.name} takes {family.takes}." if changed == "pattern" else ""
        raise ValueError(
            f"{cannot} {changed}={getattr(config, changed)!r} would become {getattr(back, changed)!r};{takes} "
            "'dualscan' and 'dualscan_hf' take every model."
        )
    return values


def fitting(config: ModelConfig) -> list[str]:
    """The names of the families that can express a model."""
    names = []
    for name in NAMES:
        try:
            express(family_of(name), config)
        except ValueError:
            continue
        names.append(name)
    return names


def _changed(config: ModelConfig, back: ModelConfig) -> str | None:
    """The first setting that differs, unless it names the default or nothing in the model asks for it."""
    if config == back:
        return None
    before, after = _explicit(config), _explicit(back)
    described = _described(before)
    for name, value in before.items():
        if name in _FREE or _close(value, after[name]):
            continue
        if name in ("vocab_size", "vocab_multiple") and config.padded_vocab_size == back.padded_vocab_size:
            continue
        try:
            same = _described({**before, name: after[name]}) == described
        except ValueError:
            same = False
        if not same:
            return name
    return None


def _explicit(config: ModelConfig) -> dict[str, Any]:
    """The settings of a model, with what None stands for where that is a number."""
    values, heads = config.to_dict(), config.attention_heads
    # The transformer that layers S share reads the embedding beside the residual stream.
    head_dim = config.head_dim or max(1, config.d_model * (2 if "S" in config.pattern else 1) // heads)
    defaults = {
        "d_ssm": config.d_inner,
        "norm_groups": config.ngroups,
        "projection_scales": (1.0,) * 5,
        "branch_scales": (1.0,) * 4,
        "n_heads": heads,
        "n_kv_heads": heads,
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5,
        "rotary_dim": head_dim,
        "d_mlp": config.mlp_width,
        "dt_rank": Mamba.default_dt_rank(config.d_model),
        "inner_norm_eps": config.norm_eps,
        "router_groups": 1,
        "router_groups_used": 1,
        "n_shared": 1,
    }
    return values | {name: default for name, default in defaults.items() if values[name] is None}


def _close(a: Any, b: Any) -> bool:
    """Equal but for the rounding of a factor that the other program keeps as its inverse, say."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_close, a, b))
    return math.isclose(a, b, rel_tol=1e-12) if isinstance(a, float) and isinstance(b, float) else a == b


def _described(settings: dict[str, Any]) -> list[Any]:
    """Everything that a model computes with, but for the numbers: attributes and shapes of all its modules."""
    with torch.device("meta"):
        model = MambaLM(ModelConfig.from_dict(settings))
    plain = (int, float, str, bool, tuple, type(None))
    return [
        (name, type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain) and k[0] != "_"})
        for name, module in model.named_modules()
    ] + [(name, t.shape) for name, t in model.state_dict().items()]
