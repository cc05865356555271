"""`use_in_transformers`: transformers' own Mamba-2 models on our operators, without a port of any of them."""

import functools
import importlib
import logging
from collections.abc import Callable, Collection
from types import ModuleType, TracebackType
from typing import Any

import torch

from dualscan.interop.extras import require
from dualscan.interop.operators import OFFERED

# Model types of transformers whose mixers are Mamba-2.
FAMILIES = ("mamba2", "bamba", "nemotron_h", "granitemoehybrid", "zamba2", "falcon_h1")

_LOGGER = logging.getLogger(__name__)


class Replacements:
    """What `use_in_transformers` replaced. Leaving a `with` block, or `undo()`, puts everything back.

    Attributes:
        changed: the replaced functions, such as `"transformers.models.bamba.modeling_bamba.causal_conv1d_fn"`.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[ModuleType, str, Callable[..., Any], Callable[..., Any]]] = []

    @property
    def changed(self) -> list[str]:
        """The replaced functions by their full names; none any more after `undo`."""
        return [f"{module.__name__}.{name}" for module, name, _, _ in self._replaced]

    def replace(self, module: ModuleType, ours: Callable[..., Any]) -> None:
        """Puts `ours` in place of the module's function of that name, unless it is there already."""
        original = getattr(module, ours.__name__)
        if not hasattr(original, "__dualscan__"):
            offered = _offer(ours, original)
            setattr(module, ours.__name__, offered)
            self._replaced.append((module, ours.__name__, original, offered))

    def undo(self) -> None:
        """Puts the original functions back, except where somebody else replaced ours since."""
        while self._replaced:
            module, name, original, offered = self._replaced.pop()
            if getattr(module, name) is offered:
                setattr(module, name, original)

    def __enter__(self) -> "Replacements":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        by_module: dict[str, list[str]] = {}
        for module, name, _, _ in self._replaced:
            by_module.setdefault(module.__name__.rpartition(".")[2], []).append(name)
        return "Replacements(" + ", ".join(f"{name}: {' '.join(names)}" for name, names in by_module.items()) + ")"


def use_in_transformers(families: Collection[str] = FAMILIES) -> Replacements:
    """Runs the Mamba-2 layers of transformers' models on our convolution and SSD, wherever the models were made.

    The mixers of these families look five functions up in their module at every call; this replaces them. Models,
    weights, caches and `generate` stay transformers' own, and results change by rounding only. It works on every
    device, replaces the kernels that transformers may have found elsewhere (`mamba_ssm`), and lets packed sequences
    (`seq_idx`) train without them. `torch.export` keeps the originals.

    Args:
        families: model types, of `FAMILIES`.

    Returns:
        `Replacements`: `changed` lists them, `undo()` or the end of a `with` block puts the originals back.

    Raises:
        ImportError: transformers is not installed, or its version does not have these functions.
        ValueError: an unknown family.

    Example:
        >>> from dualscan.interop import use_in_transformers
        >>> with use_in_transformers(["mamba2"]) as replacements:
        ...     print(replacements.changed[0])
        transformers.models.mamba2.modeling_mamba2.causal_conv1d_fn

    Note:
        Training passes by the fused function from `in_proj` to `out_proj`: it knows neither the padding mask nor a
        family's norm groups. Norms, projections and attention run as transformers has them.
    """
    version = require("transformers", "hf").__version__
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"family {family!r} has no Mamba-2 layers that we know; use one of {', '.join(FAMILIES)}.")
    modules = [importlib.import_module(f"transformers.models.{family}.modeling_{family}") for family in families]
    for module in modules:
        missing = [ours.__name__ for ours in OFFERED if not hasattr(module, ours.__name__)]
        if missing:
            raise ImportError(
                f"{module.__name__} of transformers {version} has no {missing[0]}; "
                'install a version that was tested: pip install "dualscan[hf]" "transformers==5.23.0".'
            )
    replacements = Replacements()
    for module in modules:
        for ours in OFFERED:
            replacements.replace(module, ours)
    _LOGGER.info("%r", replacements)
    return replacements


def _offer(ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def offered(*args: Any, **kwargs: Any) -> Any:
        # An exported program should not need this package to run.
        result = NotImplemented if torch.compiler.is_exporting() else ours(*args, **kwargs)
        return original(*args, **kwargs) if result is NotImplemented else result

    offered.__dualscan__ = True  # pyrefly: ignore[missing-attribute]
    return offered
