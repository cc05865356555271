"""AI21's Jamba as transformers stores it: Mamba or attention, then an MLP or experts."""

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
    layout=_layout,
)
