"""Zyphra's Zamba2 as transformers stores it: Mamba-2, some layers steered by one of a few shared transformers."""

from typing import Any

from dualscan.models.config import ModelConfig
from dualscan.models.families.family import Family
from dualscan.models.families.hf import blocks
from dualscan.models.families.layout import Layout
from dualscan.models.families.settings import Settings


def _config(settings: Settings) -> ModelConfig:
    settings.only("hidden_act", "gelu", lacks="another activation")
    # With an output projection of its own, transformers shares nothing, the transformers of the layers neither.
    settings.only("tie_word_embeddings", True, lacks="a transformer of its own for every layer")
    settings.only("use_long_context", False, lacks="a scaling of rotary positions")
    settings.only("rms_norm_eps", 1e-5, lacks="an epsilon of the gated norm that differs from the others")
    width, heads = settings("hidden_size"), settings("num_attention_heads")
    expand, mamba_heads = settings("mamba_expand", 2), settings("n_mamba_heads")
    head_dim = 2 * width // heads
    rope = settings("use_mem_rope", False)
    letters = {"linear_attention": "M", "hybrid": "S"}
    types = blocks.kinds(settings, "layers_block_type")
    if len(types) != settings("num_hidden_layers") or not set(types) <= letters.keys():
        raise ValueError(
            f"the zamba2 configuration has layers_block_type={types} but "
            f"num_hidden_layers={settings('num_hidden_layers')}."
        )
    return ModelConfig(
        d_model=width,
        pattern="".join(letters[kind] for kind in types),
        vocab_size=settings("vocab_size"),
        vocab_multiple=1,
        d_state=settings("mamba_d_state"),
        headdim=expand * width // mamba_heads,
        expand=expand,
        ngroups=settings("mamba_ngroups", 1),
        d_conv=settings("mamba_d_conv", 4),
        **blocks.lower_limit(settings),
        mamba_bias=settings("add_bias_linear", False),
        n_heads=heads,
        n_kv_heads=settings("num_key_value_heads", None) or heads,
        head_dim=head_dim,
        attention_scale=(head_dim / 2) ** -0.5,
        **(blocks.rotary(settings) if rope else {}),
        d_mlp=settings("intermediate_size", None) or 4 * width,
        mlp_activation="geglu",
        mlp_bias=settings("add_bias_linear", False),
        n_shared=settings("num_mem_blocks", 1),
        adapter_rank=settings("adapter_rank", 128),
        attention_adapters=settings("use_shared_attention_adapter", False),
        tie_embeddings=True,
    )


def _to_config(config: ModelConfig) -> dict[str, Any]:
    heads, rope = config.attention_heads, config.rope_theta is not None
    return {
        "architectures": ["Zamba2ForCausalLM"],
        "model_type": "zamba2",
        **blocks.whole_values(config),
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "num_hidden_layers": config.n_layers,
        "layers_block_type": ["hybrid" if letter == "S" else "linear_attention" for letter in config.pattern],
        "mamba_d_state": config.d_state,
        "mamba_expand": config.expand,
        "n_mamba_heads": config.expand * config.d_model // config.headdim,
        "mamba_ngroups": config.ngroups,
        "mamba_d_conv": config.d_conv,
        **blocks.lower_limit_values(config),
        "add_bias_linear": config.mamba_bias,
        "num_attention_heads": heads,
        # Adapters of keys and values are as wide as those of queries.
        "num_key_value_heads": heads if config.attention_adapters else config.n_kv_heads or heads,
        "use_mem_rope": rope,
        **(blocks.rotary_values(config) if rope else {}),
        "intermediate_size": config.mlp_width,
        "num_mem_blocks": config.n_shared or 1,
        "adapter_rank": config.adapter_rank or 1,
        "use_shared_attention_adapter": config.attention_adapters,
    }


def _layout(config: ModelConfig) -> Layout:
    names = {"embedding": "model.embed_tokens", "norm_f": "model.final_layernorm"}
    joined, owners, uses = {}, [], 0
    for i, letter in enumerate(config.pattern):
        here, there = f"layers.{i}", f"model.layers.{i}"
        mamba = there if letter == "M" else f"{there}.mamba_decoder"
        names |= {f"{here}.norm": f"{mamba}.input_layernorm", f"{here}.mixer": f"{mamba}.mamba"}
        if letter == "M":
            continue
        if len(owners) < (config.n_shared or 1):
            owners.append(f"{there}.shared_transformer")
        shared = owners[uses % len(owners)]
        names[f"{here}.linear"] = f"{there}.linear"
        own = f"{here}.transformer"
        names |= {
            f"{own}.norm": f"{shared}.input_layernorm",
            f"{own}.norm2": f"{shared}.pre_ff_layernorm",
            f"{own}.attention": f"{shared}.self_attn",
            f"{own}.attention.out_proj": f"{shared}.self_attn.o_proj",
            f"{own}.mlp.out_proj": f"{shared}.feed_forward.down_proj",
        }
        if shared.startswith(f"{there}."):
            joined[f"{shared}.feed_forward.gate_up_proj"] = ([f"{own}.mlp.gate_proj", f"{own}.mlp.up_proj"], 0)
        adapters = {f"{here}.mlp_adapter": f"{shared}.feed_forward.gate_up_proj_adapter_list.{uses}"}
        for n, part in enumerate("qkv"):
            adapters[f"{here}.attention_adapters.{n}"] = f"{shared}.self_attn.linear_{part}_adapter_list.{uses}"
        for ours, theirs in adapters.items():
            names |= {f"{ours}.down_proj": f"{theirs}.0", f"{ours}.up_proj": f"{theirs}.1"}
        uses += 1
    return Layout(names=names, joined=joined)


ZAMBA2 = Family(
    name="zamba2",
    checkpoints="Zyphra/Zamba2-1.2B, Zamba2-2.7B, Zamba2-7B",
    config=_config,
    to_config=_to_config,
    takes="layers M and S in any order",
    layout=_layout,
    differences=(
        "transformers clamps Δ from below at time_step_min over a sequence and not in cached steps; here it is clamped "
        "in both."
    ),
)
