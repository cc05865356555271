"""Parameters that stay in float32 when a module is cast to a lower precision, and projections."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualscan.ops import decode
from dualscan.ops._autograd import unwatched

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


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`; a plain `nn.Linear` goes through `project`.

    Anything else that stands where a projection stood (one with an adapter, a quantised or a parametrised one, one with
    hooks) is called: its weight alone does not say what it computes.

    Args:
        module: maps `(..., in)` to `(..., out)`.
        x: `(..., in)`.

    Returns:
        `(..., out)`.
    """
    return project(x, module.weight, module.bias) if is_plain_linear(module) else module(x)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the module is an `nn.Linear` that does nothing beside its matrix product."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and "forward" not in module.__dict__
    )


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by a kernel of its own where there are few rows on a CPU.

    In a training step under `torch.autocast` on a GPU the weight's gradient is float32 from the start: see `Product`.

    A one-token decode step is bound by reading the weights, and a general matrix product packs its operands first.
    Without Numba a single row takes the matrix-vector product, which reads bfloat16 at about twice the rate.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)`.

    Returns:
        `(..., out)`.
    """
    if x.is_cuda and _trains_under_autocast(x, weight, bias):
        return Product.apply(x, weight)
    if x.numel() > decode.MOST_ROWS * x.shape[-1] or x.device.type != "cpu" or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) and decode.runs(rows, weight, bias):
        return decode.project(rows, weight, bias).view(*x.shape[:-1], -1)
    if len(rows) != 1:
        return F.linear(x, weight, bias)
    y = torch.mv(weight, rows[0])
    if bias is not None:
        y = y + bias
    return y.view(*x.shape[:-1], -1)


def _trains_under_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if bias is not None or weight.dtype != torch.float32 or not (torch.is_grad_enabled() and weight.requires_grad):
        return False
    if not torch.is_autocast_enabled("cuda") or x.dtype not in LOW_PRECISION:
        return False
    return x.dtype == torch.get_autocast_dtype("cuda") and unwatched((x, weight))


class Product(torch.autograd.Function):
    """`x weightᵀ` in the low dtype of x, with a float32 weight whose gradient keeps the product's float32 sums.

    Autocast casts the weight, and so rounds the gradient and casts that: a pass over it more, and an error.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        low = weight.to(x.dtype)
        ctx.save_for_backward(x, low)
        return F.linear(x, low)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None]:
        (dy,), (x, low) = grad_outputs, ctx.saved_tensors
        dx = dy @ low if ctx.needs_input_grad[0] else None
        rows, inputs = dy.flatten(0, -2).t(), x.flatten(0, -2)
        if not rows.is_cuda or torch.is_grad_enabled():  # sums of a low dtype's product exist on a GPU only
            return dx, rows.float() @ inputs.float()
        return dx, torch.mm(rows, inputs, out_dtype=torch.float32)
