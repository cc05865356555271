"""A tiny model of random weights for each Mamba-2 family of `transformers`."""

from typing import Any

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

VOCAB = 61
_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "bos_token_id": 0, "eos_token_id": 1}
_ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8}

CONFIGS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "mamba2": (
        Mamba2Config,
        Mamba2ForCausalLM,
        {"num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "use_bias": True},
    ),
    "bamba": (
        BambaConfig,
        BambaForCausalLM,
        {**_ATTENTION, **_MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    ),
    "nemotron_h": (
        NemotronHConfig,
        NemotronHForCausalLM,
        {
            **_ATTENTION,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "time_step_limit": (0.0, 0.1),
        },
    ),
    "granitemoehybrid": (
        GraniteMoeHybridConfig,
        GraniteMoeHybridForCausalLM,
        {
            **_ATTENTION,
            **_MAMBA,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
            "mamba_proj_bias": True,
        },
    ),
    "zamba2": (
        Zamba2Config,
        Zamba2ForCausalLM,
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
            "num_attention_heads": 4,
            "n_mamba_heads": 4,
            "mamba_ngroups": 2,
            "mamba_d_state": 8,
        },
    ),
    "falcon_h1": (
        FalconH1Config,
        FalconH1ForCausalLM,
        {
            **_ATTENTION,
            **_MAMBA,
            "num_hidden_layers": 2,
            "mamba_d_ssm": 64,
            "ssm_multipliers": [0.5, 1.5, 0.8, 1.2, 0.7],
        },
    ),
}


def tiny(family: str, **changes: Any) -> Any:
    """A model in evaluation mode whose every parameter matters: none is left at 0 or 1."""
    config, model, sizes = CONFIGS[family]
    built = model(config(**{**_COMMON, **sizes, "pad_token_id": 0, **changes})).eval()
    with torch.no_grad():
        for name, p in built.named_parameters():
            if name.endswith(("A_log", "dt_bias")):
                p.uniform_(-1.0, 1.0)
            elif p.ndim == 1:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=0.2)
    return built
