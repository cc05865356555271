"""IBM's Granite 4 as transformers stores it: `model_type` "granitemoehybrid", Mamba-2 or attention and then experts."""

from typing import Any

from dualscan.models.config import ModelConfig
from dualscan.models.families.family import Family
from dualscan.models.families.hf import blocks
from dualscan.models.families.layout import Layout
from dualscan.models.families.settings import Settings


def _config(settings: Settings) -> ModelConfig:
    experts = settings("num_local_experts", 0) or 0
    letters = {"linear_attention": "M", "full_attention": "*"}
    types = blocks.kinds(settings, "layer_types" if "layer_types" in settings.values else "layers_block_type")
    if len(types) != settings("num_hidden_layers") or not set(types) <= letters.keys():
        raise ValueError(
            f"the granitemoehybrid configuration has layer_types={types} but "
            f"num_hidden_layers={settings('num_hidden_layers')}."
        )
    settings.only("position_embedding_type", None, "nope", "rope", default=None, lacks="this kind of positions")
    rope = settings("position_embedding_type", None) == "rope"
    return ModelConfig(
        pattern="".join(letters[kind] + ("E" if experts else "-") for kind in types),
        **blocks.whole(settings),
        **blocks.mamba2(settings),
        **blocks.attention(settings),
        **(blocks.rotary(settings) if rope else {}),
        attention_scale=settings("attention_multiplier", 1.0),
        **_experts(settings) if experts else {"d_mlp": settings("shared_intermediate_size")},
        embedding_scale=settings("embedding_multiplier", 1.0),
        residual_scale=settings("residual_multiplier", 1.0),
        logits_scale=1.0 / settings("logits_scaling", 1.0),
    )


def _to_config(config: ModelConfig) -> dict[str, Any]:
    mixers = [letter for letter in config.pattern if letter not in "-E"]
    rope = config.rope_theta is not None
    attention = blocks.attention_values(config)
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "num_hidden_layers": len(mixers),
        "layer_types": ["full_attention" if letter == "*" else "linear_attention" for letter in mixers],
        "position_embedding_type": "rope" if rope else "nope",
        **blocks.whole_values(config),
        **blocks.mamba2_values(config),
        **attention,
        **(blocks.rotary_values(config) if rope else {}),
        "attention_multiplier": config.attention_scale or attention["head_dim"] ** -0.5,
        **(_expert_values(config) if "E" in config.pattern else _dense_values(config)),
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1.0 / config.logits_scale,
    }


def _dense_values(config: ModelConfig) -> dict[str, Any]:
    return {"num_local_experts": 0, "shared_intermediate_size": config.mlp_width}


def _experts(settings: Settings) -> dict[str, Any]:
    return {
        "n_experts": settings("num_local_experts"),
        "experts_per_token": settings("num_experts_per_tok"),
        "d_expert": settings("intermediate_size"),
        "d_shared": settings("shared_intermediate_size"),
    }


def _expert_values(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "intermediate_size": config.d_expert,
        # It has a shared MLP in any case.
        "shared_intermediate_size": config.d_shared or 1,
    }


def _layout(config: ModelConfig) -> Layout:
    mixers = ["self_attn" if letter == "*" else "mamba" for letter in config.pattern[::2]]
    norms = "input_layernorm", "post_attention_layernorm"
    layout = blocks.pairs(mixers, mlp="block_sparse_moe", norms=norms, final="norm")
    names, joined = dict(layout.names), {}
    for i in range(len(mixers)):
        there, here = f"model.layers.{i}", f"layers.{2 * i + 1}.mixer"
        shared = f"{here}.shared" if config.pattern[1] == "E" else here
        joined[f"{there}.shared_mlp.input_linear"] = ([f"{shared}.gate_proj", f"{shared}.up_proj"], 0)
        names[f"{shared}.out_proj"] = f"{there}.shared_mlp.output_linear"
        if config.pattern[1] == "E":
            joined[f"{there}.block_sparse_moe.input_linear"] = ([f"{here}.gate_proj", f"{here}.up_proj"], 1)
            names[f"{here}.out_proj"] = f"{there}.block_sparse_moe.output_linear"
            names[f"{here}.router"] = f"{there}.block_sparse_moe.router.layer"
    return Layout(names=names, joined=joined)


GRANITE = Family(
    name="granitemoehybrid",
    checkpoints="ibm-granite/granite-4.0-h-tiny, granite-4.0-h-micro",
    config=_config,
    to_config=_to_config,
    takes="layers M or *, with - after each or E after each",
    layout=_layout,
)
