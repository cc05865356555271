"""The shape, dtype and device contract of the RMS norms, by named dimension."""

import torch
from torch import Tensor


def validate(
    name: str,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    group_size: int,
    eps: float,
    *,
    names: tuple[str, str] = ("x", "z"),
) -> None:
    """Raises `ValueError` or `TypeError` with the value given, what is allowed and the fix.

    `names` are those of x and z to the caller.
    """
    x_name, z_name = names
    if x.ndim < 1:
        raise ValueError(f"{name}: {x_name} has no dimension; expected (..., d).")
    d = x.shape[-1]
    if weight.shape != (d,):
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}; expected (d={d},), the last dimension of {x_name}."
        )
    if z is not None and z.shape != x.shape:
        raise ValueError(f"{name}: {z_name} has shape {tuple(z.shape)}; expected that of {x_name}, {tuple(x.shape)}.")
    if group_size < 1 or d % group_size:
        raise ValueError(f"{name}: group_size={group_size} does not divide d={d}; use a divisor, or None for d.")
    if not eps >= 0:
        raise ValueError(f"{name}: eps={eps} is negative; use a small value such as 1e-5.")
    for label, tensor in ((x_name, x), (z_name, z), ("weight", weight)):
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: {label} has dtype {tensor.dtype}; use a floating-point dtype.")
        if tensor.device != x.device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, {x_name} on {x.device}; move it there.")


def validate_dtype(name: str, dtype: torch.dtype) -> None:
    """Raises `TypeError` for a result that is not floating-point."""
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: dtype={dtype} is not floating-point; use one such as torch.bfloat16.")
