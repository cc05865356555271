"""IBM's Bamba as transformers stores it: Mamba-2 or attention with half-rotated heads, each followed by a SwiGLU."""

from typing import Any

from dualscan.models.config import ModelConfig
from dualscan.models.families.family import Family
from dualscan.models.families.hf import blocks
from dualscan.models.families.layout import Layout
from dualscan.models.families.settings import Settings


def _config(settings: Settings) -> ModelConfig:
    attended = set(settings("attn_layer_indices", None) or ())
    layers = settings("num_hidden_layers")
    if not attended <= set(range(layers)):
        raise ValueError(
            f"the bamba configuration has attn_layer_indices={sorted(attended)} but num_hidden_layers={layers}."
        )
    return ModelConfig(
        pattern="".join("*-" if i in attended else "M-" for i in range(layers)),
        d_mlp=settings("intermediate_size"),
        mlp_bias=settings("mlp_bias", False),
        **blocks.whole(settings),
        **blocks.mamba2(settings),
        **blocks.attention(settings),
        **blocks.rotary(settings, share=0.5),
    )


def _to_config(config: ModelConfig) -> dict[str, Any]:
    mixers = [letter for letter in config.pattern if letter != "-"]
    rotary = blocks.rotary_values(config)
    heads = blocks.attention_values(config)
    share = (config.rotary_dim or heads["head_dim"]) / heads["head_dim"]
    return {
        "architectures": ["BambaForCausalLM"],
        "model_type": "bamba",
        "num_hidden_layers": len(mixers),
        "attn_layer_indices": [i for i, letter in enumerate(mixers) if letter == "*"],
        "intermediate_size": config.mlp_width,
        "mlp_bias": config.mlp_bias,
        **blocks.whole_values(config),
        **blocks.mamba2_values(config),
        **heads,
        **rotary,
        "rope_parameters": {**rotary["rope_parameters"], "partial_rotary_factor": share},
    }


def _layout(config: ModelConfig) -> Layout:
    mixers = ["self_attn" if letter == "*" else "mamba" for letter in config.pattern[::2]]
    norms = "input_layernorm", "pre_ff_layernorm"
    return blocks.pairs(mixers, mlp="feed_forward", norms=norms, final="final_layernorm")


BAMBA = Family(
    name="bamba",
    checkpoints="ibm-ai-platform/Bamba-9B-v2",
    config=_config,
    to_config=_to_config,
    takes="layers M or *, with - after each",
    layout=_layout,
    differences="cached steps of transformers leave out the clamp of time_step_limit; here they apply it.",
)
