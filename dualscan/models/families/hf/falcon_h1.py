"""TII's Falcon-H1 as transformers stores it: Mamba-2 and attention side by side, then a SwiGLU, with many factors."""

from typing import Any

from dualscan.models.config import ModelConfig
from dualscan.models.families.family import Family
from dualscan.models.families.hf import blocks
from dualscan.models.families.layout import Layout
from dualscan.models.families.settings import Settings


def _config(settings: Settings) -> ModelConfig:
    bias = settings("mamba_proj_bias", False)
    settings.only("projectors_bias", bias, default=False, lacks="a bias on one of Mamba-2's two projections alone")
    attention, width = blocks.attention(settings), settings("hidden_size")
    scales: Any = tuple(settings("ssm_multipliers", None) or (1.0,) * 5)
    gate, mlp = settings("mlp_multipliers", None) or (1.0, 1.0)
    return ModelConfig(
        pattern="P-" * settings("num_hidden_layers"),
        d_ssm=settings("mamba_d_ssm", None) or settings("mamba_expand", 2) * width,
        gated_norm=settings("mamba_rms_norm", False),
        norm_before_gate=settings("mamba_norm_before_gate", True),
        **blocks.whole(settings),
        **blocks.mamba2(settings),
        **attention,
        **blocks.rotary(settings),
        # Keys times a constant are scores times a constant.
        attention_scale=settings("key_multiplier", 1.0) * attention["head_dim"] ** -0.5,
        projection_scales=scales,
        branch_scales=(
            settings("ssm_in_multiplier", 1.0),
            settings("ssm_out_multiplier", 1.0),
            settings("attention_in_multiplier", 1.0),
            settings("attention_out_multiplier", 1.0),
        ),
        d_mlp=settings("intermediate_size"),
        mlp_bias=settings("mlp_bias", False),
        gate_scale=gate,
        mlp_scale=mlp,
        embedding_scale=settings("embedding_multiplier", 1.0),
        logits_scale=settings("lm_head_multiplier", 1.0),
    )


def _to_config(config: ModelConfig) -> dict[str, Any]:
    attention = blocks.attention_values(config)
    scale, plain = config.attention_scale, attention["head_dim"] ** -0.5
    mamba_in, mamba_out, attention_in, attention_out = map(float, config.branch_scales or (1.0,) * 4)
    return {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "num_hidden_layers": config.pattern.count("P"),
        **blocks.whole_values(config),
        **blocks.mamba2_values(config),
        "mamba_d_ssm": config.d_inner,
        "mamba_n_heads": config.nheads,
        "mamba_rms_norm": config.gated_norm,
        "mamba_norm_before_gate": config.norm_before_gate,
        "projectors_bias": config.mamba_bias,
        **attention,
        **blocks.rotary_values(config),
        "key_multiplier": 1.0 if scale is None else scale / plain,
        "ssm_multipliers": [float(factor) for factor in config.projection_scales or (1.0,) * 5],
        "ssm_in_multiplier": mamba_in,
        "ssm_out_multiplier": mamba_out,
        "attention_in_multiplier": attention_in,
        "attention_out_multiplier": attention_out,
        "intermediate_size": config.mlp_width,
        "mlp_bias": config.mlp_bias,
        "mlp_multipliers": [float(config.gate_scale), float(config.mlp_scale)],
        "embedding_multiplier": float(config.embedding_scale),
        "lm_head_multiplier": float(config.logits_scale),
    }


def _layout(config: ModelConfig) -> Layout:
    layers = config.n_layers // 2
    norms = "input_layernorm", "pre_ff_layernorm"
    layout = blocks.pairs(["mamba"] * layers, mlp="feed_forward", norms=norms, final="final_layernorm")
    names = dict(layout.names)
    for i in range(layers):
        there, branches = f"model.layers.{i}", f"layers.{2 * i}.mixer.mixers"
        names |= {
            f"{branches}.0": f"{there}.mamba",
            f"{branches}.1": f"{there}.self_attn",
            f"{branches}.1.out_proj": f"{there}.self_attn.o_proj",
        }
    return Layout(names=names)


FALCON_H1 = Family(
    name="falcon_h1",
    checkpoints="tiiuae/Falcon-H1-0.5B-Base to Falcon-H1-34B-Base",
    config=_config,
    to_config=_to_config,
    takes="layers P, with - after each",
    layout=_layout,
)
