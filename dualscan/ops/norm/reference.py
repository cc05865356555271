"""The specification of the RMS norms, in plain differentiable PyTorch."""

import torch
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype


def rms_norm_reference(
    x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, norm_before_gate: bool, eps: float
) -> Tensor:
    """`u / sqrt(mean(u^2) + eps) * weight` over groups of `group_size` channels.

    Args:
        x: `(..., d)`.
        z: the gate, like `x`: `u = x * silu(z)`, or `u = x` and the result times `silu(z)` with `norm_before_gate`;
            None: no gate.
        weight: `(d,)`.
        group_size: channels that share one mean square; divides `d`.
        norm_before_gate: whether the gate comes after the norm.
        eps: added to the mean square.

    Returns:
        `(..., d)` in the dtype of `x`.
    """
    dtype = accumulation_dtype(x.dtype)
    u = x.to(dtype)
    gate = None if z is None else z.to(dtype) * torch.sigmoid(z.to(dtype))
    if gate is not None and not norm_before_gate:
        u = u * gate
    groups = u.unflatten(-1, (-1, group_size))
    y = (groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(dtype)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


def add_rms_norm_reference(
    residual: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`residual + y` and its norm.

    Args:
        residual: `(..., d)`.
        y: of the same shape; None adds nothing.
        weight: `(d,)`.
        eps: added to the mean square.
        dtype: of the norm.

    Returns:
        The sum in the dtype of `residual`, and its norm in `dtype`, both `(..., d)`.
    """
    if y is not None:
        wide = accumulation_dtype(residual.dtype)
        residual = (residual.to(wide) + y.to(wide)).to(residual.dtype)
    return residual, rms_norm_reference(residual, None, weight, residual.shape[-1], False, eps).to(dtype)
