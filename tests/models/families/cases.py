"""Tiny random models of other programs, made by transformers itself, and what is asked of them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import dualscan
from dualscan.models.lm import MambaLM

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
}

CASES = [
    Case(family, name, {"class": kind, **settings, **changes})
    for family, (kind, settings, changes) in _CASES.items()
    for name, changes in changes.items()
]


def make(case: Case) -> nn.Module:
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


def saved(case: Case, folder: Path, **options: Any) -> nn.Module:
    """Writes the model into a folder as transformers does."""
    model = make(case)
    model.save_pretrained(folder, **options)
    return model


def load(case: Case, folder: Path) -> tuple[nn.Module, MambaLM]:
    """Theirs, and ours from their folder."""
    return saved(case, folder), dualscan.load(folder)


def tokens(batch: int, seqlen: int) -> Tensor:
    """Random tokens, the same for every test."""
    return torch.randint(1, VOCABULARY, (batch, seqlen), generator=torch.Generator().manual_seed(1))
