"""NVIDIA's Nemotron-H as transformers stores it: blocks of Mamba-2, attention without positions, an MLP or experts."""

from typing import Any

from dualscan.models.config import ModelConfig
from dualscan.models.families.family import Family
from dualscan.models.families.hf import blocks
from dualscan.models.families.layout import Layout
from dualscan.models.families.settings import Settings

_LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}


def _config(settings: Settings) -> ModelConfig:
    settings.only("mamba_hidden_act", "silu", lacks="another activation of Mamba-2")
    settings.only("mlp_hidden_act", "relu2", "silu", "gelu", lacks="another activation of the MLP")
    settings.only("mlp_hidden_act", "relu2", "gelu", lacks="an MLP with SiLU and without a gate")
    settings.only("moe_latent_size", None, default=None, lacks="experts in a latent space")
    settings.only("sliding_window", None, default=None, lacks="attention in a window")
    pattern = settings("hybrid_override_pattern", None)
    if pattern is None:
        types = blocks.kinds(settings, "layers_block_type")
        if not set(types) <= _LETTERS.keys():
            raise ValueError(f"the nemotron_h configuration has layers_block_type={types}; expected {list(_LETTERS)}.")
        pattern = "".join(_LETTERS[kind] for kind in types)
    if not set(pattern) <= set(_LETTERS.values()):
        raise ValueError(
            f"the nemotron_h configuration has hybrid_override_pattern={pattern!r}; expected layers M, *, - and E."
        )
    heads = settings("num_attention_heads")
    return ModelConfig(
        d_model=settings("hidden_size"),
        pattern=pattern,
        vocab_size=settings("vocab_size"),
        vocab_multiple=1,
        d_state=settings("ssm_state_size"),
        headdim=settings("mamba_head_dim"),
        d_ssm=settings("mamba_num_heads") * settings("mamba_head_dim"),
        ngroups=settings("n_groups", 8),
        d_conv=settings("conv_kernel", 4),
        **blocks.lower_limit(settings),
        mamba_bias=settings("use_bias", False),
        conv_bias=settings("use_conv_bias", True),
        n_heads=heads,
        n_kv_heads=settings("num_key_value_heads", None) or heads,
        head_dim=settings("head_dim", None) or settings("attention_head_dim"),
        d_mlp=settings("intermediate_size"),
        mlp_activation=settings("mlp_hidden_act", "relu2"),
        mlp_bias=settings("mlp_bias", False),
        **_experts(settings) if "E" in pattern else {},
        norm_eps=settings("layer_norm_epsilon", 1e-5),
        tie_embeddings=settings("tie_word_embeddings", False),
    )


def _to_config(config: ModelConfig) -> dict[str, Any]:
    activation = {"gelu": "gelu"}.get(config.mlp_activation, "relu2")
    attention = blocks.attention_values(config)
    del attention["attention_bias"]  # which has no effect there
    values = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hidden_size": config.d_model,
        "hybrid_override_pattern": "".join(x if x in _LETTERS.values() else "M" for x in config.pattern),
        "num_hidden_layers": config.n_layers,
        "vocab_size": config.padded_vocab_size,
        "ssm_state_size": config.d_state,
        "mamba_num_heads": config.nheads,
        "mamba_head_dim": config.headdim,
        "mamba_hidden_act": "silu",
        "expand": config.expand,
        "n_groups": config.ngroups,
        "conv_kernel": config.d_conv,
        **blocks.lower_limit_values(config),
        "use_bias": config.mamba_bias,
        "use_conv_bias": config.conv_bias,
        **attention,
        "intermediate_size": config.mlp_width,
        "mlp_hidden_act": activation,
        "mlp_bias": config.mlp_bias,
        "layer_norm_epsilon": float(config.norm_eps),
        "tie_word_embeddings": config.tie_embeddings,
    }
    return values | _expert_values(config) if "E" in config.pattern else values


def _experts(settings: Settings) -> dict[str, Any]:
    return {
        "n_experts": settings("n_routed_experts"),
        "experts_per_token": settings("num_experts_per_tok"),
        "d_expert": settings("moe_intermediate_size"),
        "d_shared": settings("moe_shared_expert_intermediate_size"),
        "router": "sigmoid",
        "router_groups": settings("n_group", 1),
        "router_groups_used": settings("topk_group", 1),
        "router_normalize": settings("norm_topk_prob", True),
        "router_scale": float(settings("routed_scaling_factor", 1.0)),
    }


def _expert_values(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_routed_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.d_expert,
        # It has a shared MLP in any case.
        "moe_shared_expert_intermediate_size": config.d_shared or 1,
        "n_group": config.router_groups or 1,
        "topk_group": config.router_groups_used or 1,
        "norm_topk_prob": config.router_normalize,
        "routed_scaling_factor": float(config.router_scale),
    }


def _layout(config: ModelConfig) -> Layout:
    names = {"embedding": "backbone.embeddings", "layers": "backbone.layers", "norm_f": "backbone.norm_f"}
    stacked = {}
    for i, kind in enumerate(config.layer_types):
        here, there = f"layers.{i}.mixer", f"backbone.layers.{i}.mixer"
        if kind == "attention":
            names[f"{here}.out_proj"] = f"{there}.o_proj"
        elif kind == "mlp":
            names[f"{here}.out_proj"] = f"{there}.down_proj"
        elif kind == "moe":
            names |= {
                f"{here}.router": f"{there}.gate",
                f"{here}.router.bias": f"{there}.gate.e_score_correction_bias",
                f"{here}.shared": f"{there}.shared_experts",
                f"{here}.shared.out_proj": f"{there}.shared_experts.down_proj",
            }
            experts = range(config.n_experts or 0)
            stacked[f"{here}.up_proj"] = [f"{there}.experts.{e}.up_proj" for e in experts]
            stacked[f"{here}.out_proj"] = [f"{there}.experts.{e}.down_proj" for e in experts]
    return Layout(names=names, stacked=stacked)


NEMOTRON_H = Family(
    name="nemotron_h",
    checkpoints="nvidia/Nemotron-H-8B-Base-8K, nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    config=_config,
    to_config=_to_config,
    head_when_tied=True,
    takes="layers M, *, - and E in any order",
    layout=_layout,
    differences=(
        "transformers clamps Δ from below at time_step_min over a sequence, whatever time_step_limit says, and not in "
        "cached steps; here it is clamped in both. time_step_min=0 in config.json switches it off."
    ),
)
