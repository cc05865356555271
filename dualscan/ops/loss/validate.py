"""The shape, dtype and device contract of `linear_cross_entropy`, by named dimension."""

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def validate(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    reduction: str,
) -> None:
    """Raises `ValueError` or `TypeError` with the value given, what is allowed and the fix."""
    name = "linear_cross_entropy"
    if x.ndim < 1:
        raise ValueError(f"{name}: x has no dimension; expected (..., d).")
    d = x.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != d or weight.shape[0] < 1:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}; expected (vocab, d={d}), as nn.Linear has.")
    vocab = weight.shape[0]
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"{name}: target has shape {tuple(target.shape)}; expected that of the tokens, {x.shape[:-1]}."
        )
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}; expected (vocab={vocab},).")
    if target.dtype != torch.int64:
        raise TypeError(f"{name}: target has dtype {target.dtype}; use torch.int64 (target.long()).")
    for label, tensor in (("x", x), ("weight", weight), ("bias", bias), ("target", target)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, x on {x.device}; move it there.")
        if label != "target" and not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: {label} has dtype {tensor.dtype}; use a floating-point dtype.")
    if not z_loss >= 0:
        raise ValueError(f"{name}: z_loss={z_loss} is negative; use a small weight such as 1e-4.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing={label_smoothing} is not in 0 to 1.")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{name}: reduction={reduction!r} does not exist; use one of {', '.join(map(repr, REDUCTIONS))}."
        )
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = target[((target < 0) | (target >= vocab)) & (target != ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"{name}: target {wrong[0].item()} is not in 0 to {vocab - 1} (vocab - 1) and not"
                f" ignore_index={ignore_index}."
            )
