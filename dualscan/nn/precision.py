"""Parameters that stay in float32 when a module is cast to a lower precision, and one-row projections."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Float32Parameters(nn.Module):
    """A module whose own parameters named in `float32_parameters` are never cast below float32.

    Decay rates and norm weights set the scale of everything after them, and cost nothing: `model.bfloat16()` casts the
    matrices and leaves these alone. Casts to float32 or float64, and moves between devices, act on them as usual.
    """

    float32_parameters: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: p for name in self.float32_parameters if (p := getattr(self, name)) is not None}
        exact = {name: (p.detach(), None if p.grad is None else p.grad.detach()) for name, p in kept.items()}
        super()._apply(fn, recurse)
        for name, (value, grad) in exact.items():
            after = getattr(self, name)
            if after.dtype in LOW_PRECISION:
                to = {"device": after.device, "dtype": torch.promote_types(value.dtype, torch.float32)}
                after.data = value.to(**to)
                after.grad = None if grad is None else grad.to(**to)
        return self


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, through a matrix-vector product where there is a single row on a CPU.

    A one-token decode step is bound by reading the weights. On a CPU the matrix-vector kernel reads bfloat16 weights at
    about twice the rate of the general matrix product, which packs its operands first.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)`.

    Returns:
        `(..., out)`.
    """
    one_row = x.numel() == x.shape[-1] and x.device.type == "cpu" and x.dtype == weight.dtype
    if not one_row or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    y = torch.mv(weight, x.reshape(-1))
    if bias is not None:
        y = y + bias
    return y.view(*x.shape[:-1], -1)
