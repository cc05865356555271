"""Which implementation of an operator runs: one capability check and one error text for all of them.

An operator names its implementations in one `Operator` value. `impl="auto"` takes the first of `preference` that can
run on the device; an explicit `impl` is honoured or raises. A slow path that `auto` takes on a GPU is announced once,
with the reason.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

Impl = Literal["auto", "triton", "numba", "recurrent", "quadratic", "chunked", "reference"]

# Answers "why can this implementation not run on that device?"; None means that it can.
Obstacle = Callable[[torch.device], str | None]


def anywhere(device: torch.device) -> None:
    """The obstacle of a pure PyTorch implementation: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """An operator's implementations, best first under `auto`.

    Attributes:
        name: public name, as the user calls it.
        impls: implementation name -> obstacle; the names that `impl=` accepts besides "auto".
        preference: the names that `auto` tries, in order.
        selectable: whether the operator has the argument `impl=`.
    """

    name: str
    impls: Mapping[str, Obstacle]
    preference: tuple[str, ...]
    selectable: bool = True


OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    """Enters an operator into the table that `dualscan env` prints."""
    OPERATORS[operator.name] = operator
    return operator


def choose(operator: Operator, impl: str, device: torch.device) -> str:
    """The implementation that runs.

    Raises:
        ValueError: `impl` is not one of the operator's, or it cannot run on `device`.
    """
    if impl == "auto":
        return _automatic(operator, device)[0]
    if impl not in operator.impls:
        known = ", ".join(repr(name) for name in ("auto", *operator.impls))
        raise ValueError(f"{operator.name}: impl={impl!r} does not exist; use one of {known}.")
    obstacle = operator.impls[impl](device)
    if obstacle is not None:
        raise ValueError(f"{operator.name}: impl={impl!r} cannot run on {device}: {obstacle}; use impl='auto'.")
    return impl


def explain(operator: Operator, device: torch.device) -> tuple[str, str]:
    """What `auto` takes on `device`, and why, in words."""
    name, passed_over = _automatic(operator, device)
    why = "; ".join(f"not {other}: {reason}" for other, reason in passed_over) or "first choice"
    if device.type != "cpu" and name != "triton":
        why += "; portable PyTorch form, no kernel for this device in this version"
    return name, why


def _automatic(operator: Operator, device: torch.device) -> tuple[str, list[tuple[str, str]]]:
    passed_over = []
    for name in operator.preference:
        obstacle = operator.impls[name](device)
        if obstacle is None:
            return name, passed_over
        passed_over.append((name, obstacle))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    raise ValueError(f"{operator.name}: nothing can run on {device} ({reasons}); move the tensors to 'cpu' or 'cuda'.")


@cache
def announce_slow_path(name: str, device_type: str, reason: str) -> None:
    """Warns once per operator and device type that `auto` runs a portable form where a kernel would be faster."""
    warnings.warn(f"{name} runs its portable PyTorch form on {device_type}: {reason}.", stacklevel=3)
