"""RMS normalisation (arXiv 1910.07467) and its gated, grouped form, the extra norm of Mamba-2 (arXiv 2405.21060)."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualscan.ops import _numba, _triton
from dualscan.ops._dispatch import Operator, anywhere, register
from dualscan.ops.norm.add_norm import add_rms_norm_fwd
from dualscan.ops.norm.library import rms_norm_fwd
from dualscan.ops.norm.validate import validate, validate_dtype

for _name in ("rms_norm", "gated_rms_norm", "add_rms_norm"):
    _impls = {"triton": _triton.obstacle, "numba": _numba.obstacle, "chunked": anywhere}
    register(Operator(name=_name, impls=_impls, preference=tuple(_impls), selectable=False))


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Divides each row by its root mean square and scales it by `weight`.

    `y = x / sqrt(mean(x^2) + eps) * weight`, arXiv 1910.07467, equation 4.

    Args:
        x: `(..., d)` float, any strides.
        weight: `(d,)` float; may be wider than `x` (float32 weights in a bfloat16 model).
        eps: added to the mean square.

    Returns:
        `(..., d)` in the dtype of `x`. Differentiable once in both.

    Raises:
        ValueError: a shape, a device or `eps` does not fit.
        TypeError: a dtype is not floating-point.

    Example:
        >>> import torch
        >>> rms_norm(torch.tensor([[3.0, -4.0]]), torch.ones(2), eps=0.0)
        tensor([[ 0.8485, -1.1314]])

    Note:
        Statistics in float32 (float64 for float64). About 4 FLOPs an element; reads `x` and writes `y` once.
    """
    d = x.shape[-1] if x.ndim else 1
    validate("rms_norm", x, None, weight, d, eps)
    return rms_norm_fwd(x, None, weight, d, False, eps)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """RMS norm with a SiLU gate, over groups of channels.

    `y = RMSNorm(x * silu(z)) * weight`, the norm before the output projection in arXiv 2405.21060, figure 6; with
    `norm_before_gate`, `y = RMSNorm(x) * weight * silu(z)`. Groups make the norm local to a tensor-parallel rank
    (section 8.1).

    Args:
        x: `(..., d)` float, any strides.
        z: the gate, like `x`.
        weight: `(d,)` float.
        group_size: channels that share one mean square, a divisor of `d`; None for all `d`.
        norm_before_gate: gate after the norm instead of before it.
        eps: added to the mean square.

    Returns:
        `(..., d)` in the dtype of `x`. Differentiable once in `x`, `z` and `weight`.

    Raises:
        ValueError: a shape, a device, `group_size` or `eps` does not fit.
        TypeError: a dtype is not floating-point.

    Example:
        >>> import torch
        >>> x, z = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])
        >>> gated_rms_norm(x, z, torch.ones(2), eps=0.0)  # the first channel is shut: the second has all the energy
        tensor([[0.0000, 1.4142]])

    Note:
        Statistics in float32 (float64 for float64). About 9 FLOPs an element; reads `x` and `z` and writes `y` once.
    """
    group_size = group_size if group_size is not None else x.shape[-1] if x.ndim else 1
    validate("gated_rms_norm", x, z, weight, group_size, eps)
    return rms_norm_fwd(x, z, weight, group_size, norm_before_gate, eps)


class AddRMSNormOutput(NamedTuple):
    """What `add_rms_norm` returns.

    Attributes:
        residual: the sum, `(..., d)` in the dtype of the residual stream.
        normed: its norm, `(..., d)` in the dtype asked for.
    """

    residual: Tensor
    normed: Tensor


def add_rms_norm(
    residual: Tensor, y: Tensor | None, weight: Tensor, *, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> AddRMSNormOutput:
    """Adds a layer's output to the residual stream and normalises the sum for the next layer.

    `h = residual + y`, `normed = h / sqrt(mean(h^2) + eps) * weight` (arXiv 1910.07467, equation 4). On a GPU both
    are one pass over memory, and so is the backward, which adds the gradients of `h` and of its norm.

    Args:
        residual: `(..., d)` float, any strides.
        y: of the same shape and any floating-point dtype; None adds nothing.
        weight: `(d,)` float.
        eps: added to the mean square.
        dtype: of the norm, that of the matrices which take it; None takes the residual's.

    Returns:
        `AddRMSNormOutput(residual, normed)`. Differentiable once in `residual`, `y` and `weight`.

    Raises:
        ValueError: a shape, a device or `eps` does not fit.
        TypeError: a dtype is not floating-point.

    Example:
        >>> import torch
        >>> h, y = torch.tensor([[1.0, -4.0]]), torch.tensor([[2.0, 0.0]]).bfloat16()
        >>> add_rms_norm(h, y, torch.ones(2), eps=0.0, dtype=torch.bfloat16)
        AddRMSNormOutput(residual=tensor([[ 3., -4.]]), normed=tensor([[ 0.8477, -1.1328]], dtype=torch.bfloat16))

    Note:
        The sum is rounded to the dtype of `residual`, and that is what is normalised, in float32 (float64 for
        float64). About 5 FLOPs an element.
    """
    dtype = residual.dtype if dtype is None else dtype
    d = residual.shape[-1] if residual.ndim else 1
    validate("add_rms_norm", residual, y, weight, d, eps, names=("residual", "y"))
    validate_dtype("add_rms_norm", dtype)
    out, normed = add_rms_norm_fwd(residual, y, weight, eps, dtype)
    return AddRMSNormOutput(residual if y is None else out, normed)
