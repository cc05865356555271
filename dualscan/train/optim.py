"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) with documented decay groups.

Weight decay pulls a parameter towards zero, which is a sensible prior for a matrix that multiplies activations and a
wrong one for a parameter whose zero means something else. Decayed: every parameter with two or more dimensions, the
embedding included (it is the output matrix too when it is tied, and decay keeps the logits from growing). Not decayed:
`A_log` (zero is the decay rate A = -1), `dt_bias` (zero is a step size of softplus(0) = 0.69, 7 to 700 times the
initial ones), `D` (the skip connection, initialised to 1), norm weights, and biases.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Parameters with these names keep out of weight decay whatever their number of dimensions (D may be (nheads, headdim)).
NO_DECAY_NAMES = frozenset({"A_log", "dt_bias", "D"})


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter, by its dotted name and number of dimensions.

    Example:
        >>> decays("layers.0.mixer.in_proj.weight", torch.zeros(4, 2)), decays("layers.0.mixer.D", torch.zeros(4, 2))
        (True, False)
    """
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in NO_DECAY_NAMES


def decay_groups(named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups, decayed and not, from `model.named_parameters()`; frozen parameters are left out.

    Args:
        named_parameters: names and parameters; a tied parameter is listed once, as `named_parameters` does.
        weight_decay: AdamW's decoupled decay per unit of learning rate.

    Returns:
        Groups with the keys "params" (pairs of name and parameter) and "weight_decay"; empty ones are left out.
    """
    groups: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            groups[decays(name, parameter)].append((name, parameter))
    return [
        {"params": members, "weight_decay": weight_decay if decayed else 0.0}
        for decayed, members in groups.items()
        if members
    ]


def adamw(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over `decay_groups`, with the fused update where PyTorch has one (CPU and CUDA).

    Args:
        model: its trainable parameters are optimized; all on one device.
        lr: peak learning rate; the loop sets the scheduled one before each step.
        betas: decay rates of the two moment estimates.
        weight_decay: for the decayed group.
    """
    device = next(model.parameters()).device
    groups = decay_groups(model.named_parameters(), weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device.type in ("cpu", "cuda"))


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat named tensors, `<parameter name>|<state name>`: what a checkpoint stores."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}|{key}"] = value
    return tensors


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `state_tensors` returned; the values are copied, bit for bit.

    Raises:
        ValueError: a parameter has no stored state, or one of another shape.
    """
    stored: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("|")
        stored.setdefault(name, {})[key] = value
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name not in stored:
                raise ValueError(f"no optimizer state for parameter {name!r}; the checkpoint is of another model.")
            for key, value in stored[name].items():
                if value.ndim and value.shape != parameter.shape:
                    raise ValueError(
                        f"optimizer state {key!r} of parameter {name!r} has shape {tuple(value.shape)}, the parameter "
                        f"{tuple(parameter.shape)}; the checkpoint is of another model."
                    )
                # Step counters stay where the fused update wants them: beside the parameter.
                optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
