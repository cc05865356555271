"""AI21's Jamba as transformers stores it: Mamba or attention, then an MLP or experts."""

from typing import Any

from dualscan.models.config import ModelConfig
from dualscan.models.families.family import Family
from dualscan.models.families.hf import blocks
from dualscan.models.families.layout import Layout
from dualscan.models.families.settings import Settings


def _config(settings: Settings) -> ModelConfig:
    experts, rank = settings("num_experts", 16), settings("mamba_dt_rank", "auto")
    period, offset = settings("attn_layer_period", 8), settings("attn_layer_offset", 4)
    expert_period, expert_offset = settings("expert_layer_period", 2), settings("expert_layer_offset", 1)
    letters = []
    for i in range(settings("num_hidden_layers")):
        letters.append("*" if i % period == offset else "m")
        letters.append("E" if experts > 1 and i % expert_period == expert_offset else "-")
    width = settings("intermediate_size")
    return ModelConfig(
        pattern="".join(letters),
        **blocks.whole(settings),
        d_state=settings("mamba_d_state", 16),
        expand=settings("mamba_expand", 2),
        d_conv=settings("mamba_d_conv", 4),
        dt_rank=None if rank == "auto" else rank,
        inner_norms=True,
        mamba_bias=settings("mamba_proj_bias", False),
        conv_bias=settings("mamba_conv_bias", True),
        **blocks.attention(settings),
        d_mlp=width,
        n_experts=experts if "E" in letters else None,
        experts_per_token=settings("num_experts_per_tok", 2) if "E" in letters else None,
        d_expert=width if "E" in letters else None,
        router="softmax_topk",
    )


def _to_config(config: ModelConfig) -> dict[str, Any]:
    mixers, layers = config.pattern[::2], len(config.pattern[::2])
    attended = _regular([i for i, letter in enumerate(mixers) if letter == "*"], layers)
    expert = _regular([i for i, letter in enumerate(config.pattern[1::2]) if letter == "E"], layers)
    attention = blocks.attention_values(config)
    del attention["attention_bias"]  # which has no effect there
    return {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "num_hidden_layers": layers,
        "attn_layer_period": attended[0],
        "attn_layer_offset": attended[1],
        "expert_layer_period": expert[0],
        "expert_layer_offset": expert[1],
        "num_experts": config.n_experts if "E" in config.pattern else 1,
        "num_experts_per_tok": config.experts_per_token or 1,
        "intermediate_size": config.mlp_width if "-" in config.pattern else config.d_expert,
        **blocks.whole_values(config),
        "mamba_d_state": config.d_state,
        "mamba_expand": config.expand,
        "mamba_d_conv": config.d_conv,
        "mamba_dt_rank": config.dt_rank or "auto",
        "mamba_proj_bias": config.mamba_bias,
        "mamba_conv_bias": config.conv_bias,
        **attention,
    }


def _regular(places: list[int], layers: int) -> tuple[int, int]:
    """The period and offset of layers at regular distances; of none, an offset that no layer has."""
    if not places:
        return layers + 1, layers
    return (places[1] - places[0] if len(places) > 1 else layers), places[0]


def _layout(config: ModelConfig) -> Layout:
    mixers = ["self_attn" if letter == "*" else "mamba" for letter in config.pattern[::2]]
    norms = "input_layernorm", "pre_ff_layernorm"
    layout = blocks.pairs(mixers, mlp="feed_forward", norms=norms, final="final_layernorm")
    names, stacked = dict(layout.names), {}
    for i, mixer in enumerate(mixers):
        there, first, second = f"model.layers.{i}", f"layers.{2 * i}.mixer", f"layers.{2 * i + 1}.mixer"
        if mixer == "mamba":
            for n, part in enumerate(["dt", "b", "c"]):
                names[f"{first}.inner_norms.{n}"] = f"{there}.mamba.{part}_layernorm"
        if config.pattern[2 * i + 1] == "E":
            experts = [f"{there}.feed_forward.experts.{e}" for e in range(config.n_experts or 0)]
            for ours, theirs in (("gate_proj", "gate_proj"), ("up_proj", "up_proj"), ("out_proj", "down_proj")):
                stacked[f"{second}.{ours}"] = [f"{expert}.{theirs}" for expert in experts]
    return Layout(names=names, stacked=stacked)


JAMBA = Family(
    name="jamba",
    checkpoints="ai21labs/Jamba-v0.1, AI21-Jamba-1.5-Mini, AI21-Jamba-Reasoning-3B",
    config=_config,
    to_config=_to_config,
    takes="layers m or *, with - or E after each, those of a kind at regular distances",
    layout=_layout,
)
