"""Settings of published checkpoints, as far as they matter to the architecture: the sizes come out as published."""

from typing import Any

import pytest

from dualscan.models import families
from dualscan.models.accounting import parameters
from dualscan.models.families.settings import Settings

_HF = {"hidden_act": "silu", "tie_word_embeddings": False}
_GQA = {"num_attention_heads": 32, "num_key_value_heads": 8}
_NEMOTRON = {
    "model_type": "nemotron_h",
    "ssm_state_size": 128,
    "n_groups": 8,
    "vocab_size": 131072,
    "mamba_head_dim": 64,
}
_MAMBA_SSM = {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "rms_norm": True}
_ZAMBA2 = ["mamba"] + (["mamba"] * 5 + ["hybrid"]) * 7 + ["mamba"] * 4 + ["hybrid"] + ["mamba"] * 3 + ["hybrid"]

# Name -> billions of parameters, settings.
PUBLISHED: dict[str, tuple[float, dict[str, Any]]] = {
    "Mamba-Codestral-7B": (
        7.29,
        {
            **_HF,
            "model_type": "mamba2",
            "hidden_size": 4096,
            "num_hidden_layers": 64,
            "state_size": 128,
            "num_heads": 128,
            "head_dim": 64,
            "n_groups": 8,
            "vocab_size": 32768,
        },
    ),
    "Bamba-9B": (
        9.78,
        {
            **_HF,
            **_GQA,
            "model_type": "bamba",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "attn_layer_indices": [9, 18, 27],
            "intermediate_size": 14336,
            "mamba_n_heads": 128,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "vocab_size": 128256,
            "rope_theta": 10000.0,
        },
    ),
    "Nemotron-H-8B": (
        8.1,
        {
            **_HF,
            **_GQA,
            **_NEMOTRON,
            "hidden_size": 4096,
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
            "attention_head_dim": 128,
            "mamba_num_heads": 128,
            "intermediate_size": 21504,
        },
    ),
    "Nemotron-3-Nano-30B-A3B": (
        31.6,
        {
            **_HF,
            **_NEMOTRON,
            "hidden_size": 2688,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_num_heads": 64,
            "intermediate_size": 1856,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
        },
    ),
    "Falcon-H1-0.5B": (
        0.52,
        {
            **_HF,
            "model_type": "falcon_h1",
            "hidden_size": 1024,
            "num_hidden_layers": 36,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 2048,
            "mamba_d_ssm": 1536,
            "mamba_n_heads": 24,
            "mamba_d_state": 128,
            "vocab_size": 32784,
            "rope_theta": 1e11,
        },
    ),
    "granite-4.0-h-tiny": (
        6.94,
        {
            **_HF,
            "model_type": "granitemoehybrid",
            "tie_word_embeddings": True,
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "mamba_n_heads": 48,
            "mamba_d_state": 128,
            "intermediate_size": 512,
            "shared_intermediate_size": 1024,
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "vocab_size": 100352,
            "position_embedding_type": "nope",
        },
    ),
    "Zamba2-2.7B": (
        2.7,
        {
            "model_type": "zamba2",
            "hidden_size": 2560,
            "num_hidden_layers": 54,
            "layers_block_type": [*_ZAMBA2, "mamba", "mamba"],
            "num_attention_heads": 32,
            "n_mamba_heads": 80,
            "mamba_d_state": 64,
            "intermediate_size": 10240,
            "num_mem_blocks": 2,
            "vocab_size": 32000,
            "hidden_act": "gelu",
        },
    ),
    "Jamba-v0.1": (
        51.6,
        {
            **_HF,
            **_GQA,
            "model_type": "jamba",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "intermediate_size": 14336,
            "num_experts": 16,
            "mamba_dt_rank": 256,
            "vocab_size": 65536,
        },
    ),
    "falcon-mamba-7b": (
        7.27,
        {
            **_HF,
            "model_type": "falcon_mamba",
            "hidden_size": 4096,
            "num_hidden_layers": 64,
            "state_size": 16,
            "vocab_size": 65024,
        },
    ),
    "mamba2attn-2.7b": (
        2.7,
        {
            **_MAMBA_SSM,
            "ssm_cfg": {"layer": "Mamba2"},
            "attn_layer_idx": [9, 18, 27, 36, 45, 56],
            "attn_cfg": {
                "causal": True,
                "d_conv": 4,
                "head_dim": 128,
                "num_heads": 30,
                "out_proj_bias": False,
                "qkv_proj_bias": False,
                "rotary_emb_dim": 64,
            },
            "pad_vocab_size_multiple": 16,
        },
    ),
    "mamba-2.8b": (2.77, {**_MAMBA_SSM, "ssm_cfg": {}}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    billions, values = PUBLISHED[name]
    family = families.find(values, name)
    total = parameters(family.config(Settings(family.name, values))).total
    assert total / 1e9 == pytest.approx(billions, rel=0.015)
