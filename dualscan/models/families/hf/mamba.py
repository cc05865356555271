"""Mamba-2 and Mamba as transformers stores them: `model_type` "mamba2", among them Mamba-Codestral, "mamba", and TII's
"falcon_mamba", which is Mamba with norms inside."""

import dataclasses
from typing import Any

from dualscan.models.config import ModelConfig
from dualscan.models.families.family import Family
from dualscan.models.families.layout import Layout
from dualscan.models.families.settings import Settings

# As transformers itself reads them: the name of the first conversions.
_ALIASES = {"backbone.embedding.weight": "backbone.embeddings.weight"}


def _mamba2_config(settings: Settings) -> ModelConfig:
    settings.only("hidden_act", "silu", lacks="another activation")
    width, heads, headdim = settings("hidden_size"), settings("num_heads"), settings("head_dim")
    expand = settings("expand", 2)
    if heads * headdim != expand * width:
        raise ValueError(
            f"the mamba2 configuration contradicts itself: num_heads {heads} x head_dim {headdim} is not expand "
            f"{expand} x hidden_size {width}."
        )
    return ModelConfig(
        d_model=width,
        pattern="M" * settings("num_hidden_layers"),
        vocab_size=settings("vocab_size"),
        vocab_multiple=1,
        d_state=settings("state_size"),
        headdim=headdim,
        expand=expand,
        ngroups=settings("n_groups", 8),
        d_conv=settings("conv_kernel", 4),
        dt_limit=settings.limits("time_step_limit"),
        mamba_bias=settings("use_bias", False),
        conv_bias=settings("use_conv_bias", True),
        norm_groups=settings("norm_groups", None),
        norm_eps=settings("layer_norm_epsilon", 1e-5),
        tie_embeddings=settings("tie_word_embeddings", False),
    )


def _mamba2_to_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "vocab_size": config.padded_vocab_size,
        "state_size": config.d_state,
        "num_heads": config.nheads,
        "head_dim": config.headdim,
        "expand": config.expand,
        "n_groups": config.ngroups,
        "conv_kernel": config.d_conv,
        "time_step_limit": [float(limit) for limit in config.dt_limit],
        "use_bias": config.mamba_bias,
        "use_conv_bias": config.conv_bias,
        "layer_norm_epsilon": float(config.norm_eps),
        "residual_in_fp32": True,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        **({} if config.norm_groups in (None, config.ngroups) else {"norm_groups": config.norm_groups}),
    }


def _mamba_config(settings: Settings) -> ModelConfig:
    settings.only("hidden_act", "silu", lacks="another activation")
    rank = settings("time_step_rank", "auto")
    return ModelConfig(
        d_model=settings("hidden_size"),
        pattern="m" * settings("num_hidden_layers"),
        vocab_size=settings("vocab_size"),
        vocab_multiple=1,
        d_state=settings("state_size"),
        expand=settings("expand", 2),
        d_conv=settings("conv_kernel", 4),
        dt_rank=None if rank == "auto" else rank,
        mamba_bias=settings("use_bias", False),
        conv_bias=settings("use_conv_bias", True),
        norm_eps=settings("layer_norm_epsilon", 1e-5),
        tie_embeddings=settings("tie_word_embeddings", True),
    )


def _falcon_mamba_config(settings: Settings) -> ModelConfig:
    norms = {"inner_norms": True, "inner_norm_weights": False, "inner_norm_eps": settings("mixer_rms_eps", 1e-6)}
    return dataclasses.replace(_mamba_config(settings), **norms)


def _falcon_mamba_to_config(config: ModelConfig) -> dict[str, Any]:
    eps = config.norm_eps if config.inner_norm_eps is None else config.inner_norm_eps
    names = {"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba"}
    return _mamba_to_config(config) | names | {"mixer_rms_eps": float(eps)}


def _mamba_to_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "vocab_size": config.padded_vocab_size,
        "state_size": config.d_state,
        "expand": config.expand,
        "intermediate_size": config.d_inner,
        "conv_kernel": config.d_conv,
        "time_step_rank": config.dt_rank or "auto",
        "use_bias": config.mamba_bias,
        "use_conv_bias": config.conv_bias,
        "layer_norm_epsilon": float(config.norm_eps),
        "residual_in_fp32": True,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
    }


def _layout(config: ModelConfig) -> Layout:
    del config
    return Layout(
        names={"embedding": "backbone.embeddings", "layers": "backbone.layers", "norm_f": "backbone.norm_f"},
    )


MAMBA2 = Family(
    name="mamba2",
    checkpoints="mistralai/Mamba-Codestral-7B-v0.1",
    config=_mamba2_config,
    to_config=_mamba2_to_config,
    takes="layers M",
    layout=_layout,
    aliases=_ALIASES,
    differences=(
        "the gated norm treats each of n_groups groups by itself, as in mamba_ssm and transformers 5; transformers 4 "
        "normalised all channels together, which `load(..., norm_groups=1)` computes. Cached steps of transformers "
        "leave out the clamp of time_step_limit; here they apply it."
    ),
)

MAMBA = Family(
    name="mamba",
    checkpoints="state-spaces/mamba-130m-hf to mamba-2.8b-hf",
    config=_mamba_config,
    to_config=_mamba_to_config,
    takes="layers m",
    layout=_layout,
    aliases=_ALIASES,
)

FALCON_MAMBA = Family(
    name="falcon_mamba",
    checkpoints="tiiuae/falcon-mamba-7b, falcon-mamba-7b-instruct",
    config=_falcon_mamba_config,
    to_config=_falcon_mamba_to_config,
    takes="layers m, normalised inside without weights",
    layout=_layout,
    aliases=_ALIASES,
)
