"""Meeting other libraries: `transformers` in both directions, and programs exported to run without this package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dualscan.interop.extras import require

# Public name -> the module that defines it. Names load on first use.
_PUBLIC = {
    "use_in_transformers": "dualscan.interop.patch",
    "register_with_transformers": "dualscan.interop.causal_lm",
    "DualscanConfig": "dualscan.interop.causal_lm",
    "DualscanForCausalLM": "dualscan.interop.causal_lm",
    "export_prefill": "dualscan.interop.export",
    "export_step": "dualscan.interop.export",
    "save_onnx": "dualscan.interop.export",
    "to_transformers_tokenizer": "dualscan.interop.tokenizer",
}

__all__ = [
    "DualscanConfig",
    "DualscanForCausalLM",
    "export_prefill",
    "export_step",
    "register_with_transformers",
    "save_onnx",
    "to_transformers_tokenizer",
    "use_in_transformers",
]

if TYPE_CHECKING:
    from dualscan.interop.causal_lm import DualscanConfig, DualscanForCausalLM, register_with_transformers
    from dualscan.interop.export import export_prefill, export_step, save_onnx
    from dualscan.interop.patch import use_in_transformers
    from dualscan.interop.tokenizer import to_transformers_tokenizer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dualscan.interop' has no attribute {name!r}")
    if _PUBLIC[name] == "dualscan.interop.causal_lm":
        require("transformers", "hf")
    return getattr(import_module(_PUBLIC[name]), name)
