"""Checkpoints of other programs: which there are, and which are out of reach.

A family is one entry: how its `config.json` reads as a `ModelConfig`, and how its tensors are named
(`dualscan.models.weights` does the rest). docs/families.md has the table, made from here and from the tests.
"""

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from dualscan.models.families.family import Family

# Name -> the module that defines it and the name there.
_MODULES = {
    "mamba_ssm": ("mamba_ssm", "MAMBA_SSM"),
    "mamba2": ("hf.mamba", "MAMBA2"),
    "mamba": ("hf.mamba", "MAMBA"),
    "falcon_mamba": ("hf.mamba", "FALCON_MAMBA"),
    "bamba": ("hf.bamba", "BAMBA"),
    "nemotron_h": ("hf.nemotron_h", "NEMOTRON_H"),
    "granitemoehybrid": ("hf.granite", "GRANITE"),
    "falcon_h1": ("hf.falcon_h1", "FALCON_H1"),
    "zamba2": ("hf.zamba2", "ZAMBA2"),
    "jamba": ("hf.jamba", "JAMBA"),
    "dualscan_hf": ("hf.dualscan", "DUALSCAN_HF"),
}
NAMES = tuple(_MODULES)

# Relatives that would need something that is not here: what that is.
OUT_OF_REACH = {
    "zamba": "shared attention over Mamba layers with several heads",
    "mamba3": "Mamba-3's rotating and trapezoidal recurrence",
    "recurrent_gemma": "the RG-LRU recurrence",
    "lfm2": "gated short convolutions without a state space",
    "qwen3_next": "gated delta networks",
    "kimi_linear": "gated delta networks",
    "rwkv": "the WKV recurrence",
}


def family(name: str) -> Family:
    """A family by its name.

    Raises:
        ValueError: an unknown name; lists what exists.
    """
    if name not in _MODULES:
        close = difflib.get_close_matches(name, _MODULES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown family {name!r}; the families are {', '.join(NAMES)}.{hint}")
    module, attribute = _MODULES[name]
    return getattr(import_module(f"dualscan.models.families.{module}"), attribute)


def find(values: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json`.

    Args:
        values: as read from JSON.
        where: the folder, for messages.

    Raises:
        ValueError: it is of no family that is known here, or of one that is out of reach.
    """
    kind = values.get("model_type")
    if kind is None and {"d_model", "n_layer"} <= values.keys():
        return family("mamba_ssm")
    if kind == "dualscan":
        return family("dualscan_hf")
    if kind in _MODULES:
        return family(kind)
    known = f"the families are {', '.join(NAMES)}, and what model.save() or training wrote"
    if kind in OUT_OF_REACH:
        raise ValueError(
            f"{where} holds a checkpoint of the family {kind!r}, which needs {OUT_OF_REACH[kind]}: not supported yet; "
            f"{known}."
        )
    other = f"a transformers checkpoint of type {kind!r}" if kind else "a checkpoint of another program"
    raise ValueError(f"{where} holds {other}, which is not supported; {known}.")
