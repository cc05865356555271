"""Tiny random models of other programs, made by transformers itself, and what is asked of them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

VOCABULARY = 67  # odd: nothing may be padded unless the family says so


class Case(NamedTuple):
    """One configuration of a family."""

    family: str
    name: str
    settings: dict[str, Any]


_MAMBA2 = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "state_size": 8,
    "num_heads": 6,
    "head_dim": 8,
    "expand": 2,
    "chunk_size": 8,
    "vocab_size": VOCABULARY,
}

# Families whose layers are a mixer and an MLP.
_LAYERS = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 36,
    "mamba_n_heads": 6,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "vocab_size": VOCABULARY,
}
_GRANITE = {
    "shared_intermediate_size": 20,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 3.0,
}

_CASES: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    # family -> configuration class, settings, name of a case -> what it changes
    "mamba2": (
        "Mamba2Config",
        _MAMBA2,
        {
            "one group": {"n_groups": 1, "tie_word_embeddings": True},
            "groups, biases": {"n_groups": 3, "use_bias": True},
            "clamp, no bias": {"n_groups": 2, "use_conv_bias": False, "time_step_limit": (0.02, 0.08)},
        },
    ),
    "mamba": (
        "MambaConfig",
        {"hidden_size": 20, "num_hidden_layers": 3, "state_size": 8, "vocab_size": VOCABULARY},
        {
            "tied": {"time_step_rank": "auto"},
            "untied, biases": {"tie_word_embeddings": False, "use_bias": True, "time_step_rank": 5},
            "no bias, wide": {"use_conv_bias": False, "expand": 3, "conv_kernel": 3},
        },
    ),
    "falcon_mamba": (
        "FalconMambaConfig",
        {"hidden_size": 20, "num_hidden_layers": 3, "state_size": 8, "vocab_size": VOCABULARY},
        {
            "tied": {"time_step_rank": "auto"},
            "untied, biases": {"tie_word_embeddings": False, "use_bias": True, "time_step_rank": 5},
            "large epsilons": {"use_conv_bias": False, "mixer_rms_eps": 0.1, "layer_norm_epsilon": 0.01, "expand": 3},
        },
    ),
    "bamba": (
        "BambaConfig",
        {**_LAYERS, "attn_layer_indices": [1]},
        {
            "one group": {"mamba_n_groups": 1},
            "groups, tied": {"mamba_n_groups": 3, "tie_word_embeddings": True, "mamba_conv_bias": False},
            "biases": {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "num_key_value_heads": 3},
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "hidden_size": 20,
            "hybrid_override_pattern": "M-M*-E",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "mamba_num_heads": 6,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "intermediate_size": 36,
            "vocab_size": VOCABULARY,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "moe_shared_expert_intermediate_size": 28,
        },
        {
            "one group": {"n_groups": 1},
            "groups, biases": {"n_groups": 3, "use_bias": True, "mlp_bias": True, "use_conv_bias": False},
            "expert groups": {
                "n_groups": 2,
                "n_group": 3,
                "topk_group": 2,
                "norm_topk_prob": False,
                "routed_scaling_factor": 2.5,
                "time_step_min": 0.05,
            },
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {**_LAYERS, "layer_types": ["linear_attention", "full_attention", "linear_attention"], **_GRANITE},
        {
            "experts": {"num_local_experts": 4, "num_experts_per_tok": 2},
            "dense, tied": {"num_local_experts": 0, "tie_word_embeddings": True, "mamba_n_groups": 3},
            "rotary, biases": {
                "num_local_experts": 3,
                "num_experts_per_tok": 1,
                "position_embedding_type": "rope",
                "attention_bias": True,
                "mamba_proj_bias": True,
                "mamba_n_groups": 2,
            },
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {**_LAYERS, "mamba_d_ssm": 48},
        {
            "plain": {},
            "factors, groups": {
                "mamba_n_groups": 3,
                "mamba_rms_norm": True,
                "mamba_norm_before_gate": False,
                "embedding_multiplier": 2.5,
                "lm_head_multiplier": 0.3,
                "mlp_multipliers": [0.8, 0.6],
                "key_multiplier": 0.4,
                "attention_in_multiplier": 0.9,
                "attention_out_multiplier": 0.7,
                "ssm_multipliers": [0.9, 0.8, 1.1, 0.7, 0.6],
                "ssm_in_multiplier": 1.2,
                "ssm_out_multiplier": 0.5,
            },
            "biases, tied": {
                "mamba_d_ssm": 60,
                "mamba_n_heads": 4,
                "mamba_rms_norm": True,
                "mamba_n_groups": 2,
                "attention_bias": True,
                "mlp_bias": True,
                "mamba_proj_bias": True,
                "projectors_bias": True,
                "tie_word_embeddings": True,
                "ssm_in_multiplier": 0.7,
                "attention_in_multiplier": 1.3,
            },
        },
    ),
    "zamba2": (
        "Zamba2Config",
        {
            "hidden_size": 24,
            "num_hidden_layers": 6,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", "hybrid"],
            "num_attention_heads": 3,
            "n_mamba_heads": 6,
            "mamba_d_state": 8,
            "intermediate_size": 28,
            "adapter_rank": 3,
            "chunk_size": 8,
            "vocab_size": VOCABULARY,
        },
        {
            "one transformer": {"num_mem_blocks": 1},
            "two in turn, rotary, groups": {"num_mem_blocks": 2, "use_mem_rope": True, "mamba_ngroups": 2},
            "adapters, biases": {
                "num_mem_blocks": 2,
                "use_shared_attention_adapter": True,
                "add_bias_linear": True,
                "time_step_min": 0.05,
            },
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            "hidden_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 28,
            "mamba_d_state": 8,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "vocab_size": VOCABULARY,
        },
        {
            "experts": {},
            "dense, tied": {"num_experts": 1, "tie_word_embeddings": True, "mamba_dt_rank": 5},
            "biases": {
                "mamba_proj_bias": True,
                "mamba_conv_bias": False,
                "expert_layer_period": 3,
                "num_key_value_heads": 3,
                "num_experts_per_tok": 3,
            },
        },
    ),
}

CASES = [
    Case(family, name, {"class": kind, **settings, **changes})
    for family, (kind, settings, changes) in _CASES.items()
    for name, changes in changes.items()
]


def make(case: Case) -> Any:
    """The model of transformers; weights that are zeros or ones at first are random, too."""
    settings = dict(case.settings)
    config = getattr(transformers, settings.pop("class"))(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "conv1d" in name:
                p.add_(0.2 * torch.randn_like(p))
            elif "A_log" not in name:
                p.mul_(3.0)  # far from the linear regime, so that errors show
    return model


def saved(case: Case, folder: Path, **options: Any) -> Any:
    """Writes the model into a folder as transformers does."""
    model = make(case)
    model.save_pretrained(folder, **options)
    return model


def tokens(batch: int, seqlen: int) -> Tensor:
    """Random tokens, the same for every test."""
    return torch.randint(1, VOCABULARY, (batch, seqlen), generator=torch.Generator().manual_seed(1))
