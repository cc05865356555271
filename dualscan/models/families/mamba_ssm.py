"""Checkpoints of mamba_ssm, the authors' program: Mamba-2, Mamba, and their hybrids with attention and MLPs."""

from typing import Any

from dualscan.models.config import ModelConfig
from dualscan.models.families.family import Family
from dualscan.models.families.layout import Layout
from dualscan.models.families.settings import Settings
from dualscan.models.tensors import PICKLE

# Settings of a layer that matter at initialisation only, or choose a kernel.
_NO_MATTER = {
    *("layer", "chunk_size", "use_mem_eff_path", "A_init_range", "conv_init", "dt_min", "dt_max", "dt_init_floor"),
    *("dt_init", "dt_scale", "use_fast_path"),
}
_MAMBA2 = {
    *("d_state", "d_conv", "expand", "headdim", "d_ssm", "ngroups", "D_has_hdim", "rmsnorm", "norm_before_gate"),
    *("dt_limit", "bias", "conv_bias"),
}
_MAMBA = {"d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias"}
_ATTENTION = {
    *("causal", "num_heads", "num_heads_kv", "head_dim", "mlp_dim", "qkv_proj_bias", "out_proj_bias", "d_conv"),
    *("softmax_scale", "rotary_emb_dim", "rotary_emb_base", "rotary_emb_interleaved"),
}


def _config(settings: Settings) -> ModelConfig:
    settings.only("rms_norm", True, lacks="LayerNorm")
    settings.only("norm_epsilon", 1e-5, lacks="an epsilon of the gated norm that differs from the others")
    ssm, attention = settings.section("ssm_cfg"), settings.section("attn_cfg")
    ssm.only("layer", "Mamba2", "Mamba1", default="Mamba1", lacks="this kind of layer")
    first = ssm("layer", "Mamba1") == "Mamba1"
    _refuse_unknown(ssm, _MAMBA if first else _MAMBA2)
    _refuse_unknown(attention, _ATTENTION)
    layers, attended = settings("n_layer"), set(settings("attn_layer_idx", None) or ())
    if not attended <= set(range(layers)):
        raise ValueError(f"the mamba_ssm configuration has attn_layer_idx={sorted(attended)} but n_layer={layers}.")
    hidden = settings("d_intermediate", 0)
    width = settings("d_model")
    mixers = ["*" if i in attended else "m" if first else "M" for i in range(layers)]
    return ModelConfig(
        d_model=width,
        pattern="".join(mixer + ("-" if hidden else "") for mixer in mixers),
        vocab_size=settings("vocab_size"),
        vocab_multiple=settings("pad_vocab_size_multiple", 8),
        expand=ssm("expand", 2),
        d_conv=ssm("d_conv", 4),
        mamba_bias=ssm("bias", False),
        conv_bias=ssm("conv_bias", True),
        **(_mamba(ssm) if first else _mamba2(ssm, width)),
        # Its gated MLP rounds the hidden width up to a multiple of 128.
        d_mlp=-(-hidden // 128) * 128 if hidden else None,
        tie_embeddings=settings("tie_embeddings", True),
        **(_attention(attention, width) if attended else {}),
    )


def _mamba2(settings: Settings, width: int) -> dict[str, Any]:
    settings.only("d_ssm", None, settings("expand", 2) * width, lacks="a gated MLP inside the Mamba-2 layer")
    settings.only("D_has_hdim", False, lacks="a D of every channel")
    return {
        "d_state": settings("d_state", 128),
        "headdim": settings("headdim", 64),
        "ngroups": settings("ngroups", 1),
        "dt_limit": settings.limits("dt_limit"),
        "gated_norm": settings("rmsnorm", True),
        "norm_before_gate": settings("norm_before_gate", False),
    }


def _mamba(settings: Settings) -> dict[str, Any]:
    rank = settings("dt_rank", "auto")
    return {"d_state": settings("d_state", 16), "dt_rank": None if rank == "auto" else rank}


def _attention(settings: Settings, width: int) -> dict[str, Any]:
    settings.only("causal", True, default=False, lacks="attention to later tokens")
    settings.only("mlp_dim", 0, lacks="an MLP inside attention")
    settings.only("rotary_emb_interleaved", False, lacks="interleaved rotary positions")
    bias = settings("qkv_proj_bias", True)
    settings.only("out_proj_bias", bias, default=True, lacks="a bias on some of attention's projections")
    heads, rotary = settings("num_heads"), settings("rotary_emb_dim", 0)
    return {
        "n_heads": heads,
        "n_kv_heads": settings("num_heads_kv", None) or heads,
        "head_dim": settings("head_dim", None) or width // heads,
        "attention_bias": bias,
        "attention_scale": settings("softmax_scale", None),
        "attention_conv": settings("d_conv", 0) or None,
        "rope_theta": float(settings("rotary_emb_base", 10000.0)) if rotary else None,
        "rotary_dim": rotary or None,
    }


def _refuse_unknown(settings: Settings, known: set[str]) -> None:
    for name in settings.values.keys() - known - _NO_MATTER:
        raise settings.out_of_reach(f"{name}={settings(name)!r}", "this setting")


def _to_config(config: ModelConfig) -> dict[str, Any]:
    mixers = [letter for letter in config.pattern if letter != "-"]
    attended = [i for i, letter in enumerate(mixers) if letter == "*"]
    ssm: dict[str, Any] = {
        "layer": "Mamba1" if "m" in config.pattern else "Mamba2",
        "d_state": config.d_state,
        "d_conv": config.d_conv,
        "expand": config.expand,
        "bias": config.mamba_bias,
        "conv_bias": config.conv_bias,
    }
    if "m" in config.pattern:
        ssm["dt_rank"] = config.dt_rank or "auto"
    else:
        ssm |= {
            "headdim": config.headdim,
            "ngroups": config.ngroups,
            "rmsnorm": config.gated_norm,
            "norm_before_gate": config.norm_before_gate,
            "dt_limit": list(config.dt_limit),
        }
    heads = config.attention_heads
    attention = {
        "causal": True,
        "num_heads": heads,
        "num_heads_kv": config.n_kv_heads or heads,
        "head_dim": config.head_dim or config.d_model // heads,
        "qkv_proj_bias": config.attention_bias,
        "out_proj_bias": config.attention_bias,
        "softmax_scale": config.attention_scale,
        "d_conv": config.attention_conv or 0,
        "rotary_emb_dim": (config.rotary_dim or config.head_dim or config.d_model // heads) if config.rope_theta else 0,
        "rotary_emb_base": config.rope_theta or 10000.0,
    }
    return {
        "d_model": config.d_model,
        "d_intermediate": config.mlp_width if "-" in config.pattern else 0,
        "n_layer": len(mixers),
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": attended,
        "attn_cfg": attention if attended else {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.vocab_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def _layout(config: ModelConfig) -> Layout:
    names = {"embedding": "backbone.embedding", "norm_f": "backbone.norm_f"}
    joined, layer = {}, -1
    for i, kind in enumerate(config.layer_types):
        here = f"layers.{i}"
        if kind == "mlp":  # the second half of the block before it
            there = f"backbone.layers.{layer}"
            names |= {f"{here}.norm": f"{there}.norm2", f"{here}.mixer.out_proj": f"{there}.mlp.fc2"}
            joined[f"{there}.mlp.fc1"] = ([f"{here}.mixer.up_proj", f"{here}.mixer.gate_proj"], 0)
            continue
        layer += 1
        there = f"backbone.layers.{layer}"
        names[here] = there
        if kind == "attention":
            joined[f"{there}.mixer.in_proj"] = ([f"{here}.mixer.{x}_proj" for x in "qkv"], 0)
    return Layout(names=names, joined=joined)


MAMBA_SSM = Family(
    name="mamba_ssm",
    checkpoints="state-spaces/mamba2-130m to mamba2-2.7b, mamba2attn-2.7b, mamba-130m to mamba-2.8b",
    config=_config,
    to_config=_to_config,
    takes="layers M or *, or m or *, with - after each or after none",
    layout=_layout,
    weights=PICKLE,
    head_when_tied=True,
)
