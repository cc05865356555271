"""Meeting other libraries: `transformers` in both directions, and programs exported to run without this package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Public name -> the module that defines it. Names load on first use, since most need an optional package.
_PUBLIC = {
    "use_in_transformers": "dualscan.interop.patch",
}

__all__ = ["use_in_transformers"]

if TYPE_CHECKING:
    from dualscan.interop.patch import use_in_transformers


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dualscan.interop' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
