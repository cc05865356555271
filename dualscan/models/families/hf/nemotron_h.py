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
        # The model there clamps Δ from below only, at time_step_min, whatever time_step_limit says.
        dt_limit=(settings("time_step_min", 0.001), float("inf")),
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
    layout=_layout,
    differences=(
        "transformers clamps Δ from below at time_step_min over a sequence, whatever time_step_limit says, and not in "
        "cached steps; here it is clamped in both. time_step_min=0 in config.json switches it off."
    ),
)
