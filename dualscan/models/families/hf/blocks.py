"""Families of transformers whose layers are a mixer followed by an MLP: Bamba, Granite 4, Falcon-H1, Jamba.

A layer there is two residual blocks here.
"""

import math
from typing import Any

from dualscan.models.config import ModelConfig
from dualscan.models.families.layout import Layout
from dualscan.models.families.settings import Settings

# Families that clamp Δ from below at time_step_min also take its logarithm: what stands for 0.
_LEAST = 1e-38
# The names of attention's and the MLP's last matrix, under which they are called out_proj here.
ATTENTION_OUT, MLP_OUT = "o_proj", "down_proj"


def kinds(settings: Settings, name: str) -> list[str]:
    """The layer types of a configuration in today's words: "linear_attention", "full_attention", and others."""
    old = {"mamba": "linear_attention", "mamba2": "linear_attention", "attention": "full_attention"}
    return [old.get(kind, kind) for kind in settings(name)]


def mamba2(settings: Settings) -> dict[str, Any]:
    """The Mamba-2 fields of families that name them `mamba_*`."""
    width, expand, heads = settings("hidden_size"), settings("mamba_expand", 2), settings("mamba_n_heads")
    inner = settings("mamba_d_ssm", None) or expand * width
    headdim = settings("mamba_d_head", "auto")
    headdim = inner // heads if headdim == "auto" else headdim
    if heads * headdim != inner:
        raise ValueError(
            f"the {settings.family} configuration contradicts itself: mamba_n_heads {heads} x mamba_d_head {headdim} "
            f"is not the inner width {inner}."
        )
    return {
        "d_state": settings("mamba_d_state"),
        "headdim": headdim,
        "expand": expand,
        "ngroups": settings("mamba_n_groups", 1),
        "d_conv": settings("mamba_d_conv", 4),
        "dt_limit": settings.limits("time_step_limit"),
        "mamba_bias": settings("mamba_proj_bias", False),
        "conv_bias": settings("mamba_conv_bias", True),
    }


def mamba2_values(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `mamba2`."""
    return {
        "mamba_d_state": config.d_state,
        # A width of its own (d_ssm) is not among these settings.
        "mamba_n_heads": config.expand * config.d_model // config.headdim,
        "mamba_d_head": config.headdim,
        "mamba_expand": config.expand,
        "mamba_n_groups": config.ngroups,
        "mamba_d_conv": config.d_conv,
        "time_step_limit": [float(limit) for limit in config.dt_limit],
        "mamba_proj_bias": config.mamba_bias,
        "mamba_conv_bias": config.conv_bias,
    }


def lower_limit(settings: Settings) -> dict[str, Any]:
    """The clamp of Δ of families that have it from below only, at `time_step_min`, whatever `time_step_limit` says."""
    least = settings("time_step_min", 0.001)
    return {"dt_limit": (0.0 if least <= _LEAST else least, math.inf)}


def lower_limit_values(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `lower_limit`."""
    return {"time_step_min": float(config.dt_limit[0]) or _LEAST}


def attention(settings: Settings) -> dict[str, Any]:
    """The attention fields, without positions."""
    heads = settings("num_attention_heads")
    return {
        "n_heads": heads,
        "n_kv_heads": settings("num_key_value_heads", None) or heads,
        "head_dim": settings("head_dim", None) or settings("hidden_size") // heads,
        "attention_bias": settings("attention_bias", False),
    }


def attention_values(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `attention`."""
    heads = config.attention_heads
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": config.n_kv_heads or heads,
        "head_dim": config.head_dim or config.d_model // heads,
        "attention_bias": config.attention_bias,
    }


def rotary(settings: Settings, *, share: float = 1.0) -> dict[str, Any]:
    """The fields of rotary positions; `share` of a head's channels is rotated.

    Since version 5, transformers keeps them in `rope_parameters`; before, in `rope_theta` and `rope_scaling`.
    """
    rope = settings.section("rope_parameters")
    rope.only("rope_type", "default", lacks="a scaling of rotary positions")
    settings.only("rope_scaling", None, {"rope_type": "default"}, default=None, lacks="a scaling of rotary positions")
    head_dim = settings("head_dim", None) or settings("hidden_size") // settings("num_attention_heads")
    theta = rope("rope_theta", None) or settings("rope_theta", 10000.0)
    share = rope("partial_rotary_factor", share)
    return {"rope_theta": float(theta), "rotary_dim": None if share == 1.0 else int(head_dim * share)}


def rotary_values(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `rotary` for whole heads; without positions, what stands for the default."""
    theta = float(config.rope_theta or 10000.0)
    return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def whole(settings: Settings, *, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """The fields of the model around its layers."""
    settings.only("hidden_act", "silu", lacks="another activation")
    return {
        "d_model": settings("hidden_size"),
        "vocab_size": settings("vocab_size"),
        "vocab_multiple": 1,
        "norm_eps": settings(eps, 1e-5),
        "tie_embeddings": settings("tie_word_embeddings", False),
    }


def whole_values(config: ModelConfig, *, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """The inverse of `whole`."""
    return {
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "vocab_size": config.padded_vocab_size,
        eps: float(config.norm_eps),
        "tie_word_embeddings": config.tie_embeddings,
    }


def pairs(mixers: list[str], *, mlp: str, norms: tuple[str, str], final: str) -> Layout:
    """The names where every layer is a mixer's block and then an MLP's.

    Args:
        mixers: what the mixer of every layer is called there: "mamba" or "self_attn".
        mlp: what the MLP is called there.
        norms: what the two norms of a layer are called there.
        final: what the last norm is called there.
    """
    names = {"embedding": "model.embed_tokens", "norm_f": f"model.{final}"}
    for i, mixer in enumerate(mixers):
        there, first, second = f"model.layers.{i}", f"layers.{2 * i}", f"layers.{2 * i + 1}"
        names |= {
            f"{first}.norm": f"{there}.{norms[0]}",
            f"{first}.mixer": f"{there}.{mixer}",
            f"{second}.norm": f"{there}.{norms[1]}",
            f"{second}.mixer": f"{there}.{mlp}",
            f"{second}.mixer.out_proj": f"{there}.{mlp}.{MLP_OUT}",
        }
        if mixer == "self_attn":
            names[f"{first}.mixer.out_proj"] = f"{there}.{mixer}.{ATTENTION_OUT}"
    return Layout(names=names)
