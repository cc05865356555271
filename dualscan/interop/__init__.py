"""Meeting other libraries: `transformers` in both directions, and programs exported to run without this package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dualscan.interop.extras import require

# Public name -> the module that defines it, and the package and extra that it needs. Names load on first use.
_TRANSFORMERS = "transformers", "hf"
_PUBLIC = {
    "use_in_transformers": ("dualscan.interop.patch", *_TRANSFORMERS),
    "register_with_transformers": ("dualscan.interop.causal_lm", *_TRANSFORMERS),
    "DualscanConfig": ("dualscan.interop.causal_lm", *_TRANSFORMERS),
    "DualscanForCausalLM": ("dualscan.interop.causal_lm", *_TRANSFORMERS),
}

__all__ = ["DualscanConfig", "DualscanForCausalLM", "register_with_transformers", "use_in_transformers"]

if TYPE_CHECKING:
    from dualscan.interop.causal_lm import DualscanConfig, DualscanForCausalLM, register_with_transformers
    from dualscan.interop.patch import use_in_transformers


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dualscan.interop' has no attribute {name!r}")
    module, package, extra = _PUBLIC[name]
    require(package, extra)
    return getattr(import_module(module), name)
