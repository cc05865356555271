"""Parameters that stay in float32 when a module is cast to a lower precision, and projections."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualscan.ops import decode
from dualscan.ops._autograd import unwatched

LOW_PRECISION = (torch.bfloat16, torch.float16)
# cuBLAS takes up to 7 % longer for a low dtype's product whose columns are no multiple of so many.
COLUMNS = 32


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


def apply_linear(module: nn.Module, x: Tensor, *, spaced: bool = False) -> Tensor:
    """`module(x)`; a plain `nn.Linear` goes through `project`.

    Anything else that stands where a projection stood (one with an adapter, a quantised or a parametrised one, one with
    hooks) is called: its weight alone does not say what it computes.

    Args:
        module: maps `(..., in)` to `(..., out)`.
        x: `(..., in)`.
        spaced: as in `project`.

    Returns:
        `(..., out)`.
    """
    return project(x, module.weight, module.bias, spaced=spaced) if is_plain_linear(module) else module(x)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the module is an `nn.Linear` that does nothing beside its matrix product."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and "forward" not in module.__dict__
    )


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, spaced: bool = False) -> Tensor:
    """`F.linear`, by a kernel of its own where there are few rows on a CPU.

    In a training step under `torch.autocast` on a GPU the weight's gradient is float32 from the start: see `Product`.

    A one-token decode step is bound by reading the weights, and a general matrix product packs its operands first.
    Without Numba a single row takes the matrix-vector product, which reads bfloat16 at about twice the rate.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)`.
        spaced: rows of the result may lie further apart than they are long, where that is faster.

    Returns:
        `(..., out)`.
    """
    if x.is_cuda and _trains_under_autocast(x, weight, bias):
        return Product.apply(x, weight, COLUMNS if spaced else 1)
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

    The products have a multiple of so many columns: the weight's copy has more rows than the weight. What these hold,
    and what lies between the rows of y and of its gradient, is anything, and reaches nothing else: a column of y, and a
    row of the weight's gradient, depend on one row of the weight, and the gradient of x leaves the others out.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, multiple: int = 1) -> Tensor:
        columns = weight.shape[0]
        more = -columns % multiple
        if more:
            low = torch.empty(columns + more, weight.shape[1], dtype=x.dtype, device=x.device)
            low[:columns] = weight
        else:
            low = weight.to(x.dtype)
        ctx.save_for_backward(x, low)
        y = F.linear(x, low)
        return y[..., :columns] if more else y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (dy,), (x, low) = grad_outputs, ctx.saved_tensors
        columns = dy.shape[-1]
        dx = dy @ low[:columns] if ctx.needs_input_grad[0] else None
        rows, inputs = dy.flatten(0, -2), x.flatten(0, -2)
        if torch.is_grad_enabled():
            return dx, rows.t().float() @ inputs.float(), None
        rows = _widened(rows, low.shape[0]).t()
        if rows.is_cuda:
            dweight = torch.mm(rows, inputs, out_dtype=torch.float32)
        else:  # sums of a low dtype's product exist on a GPU only
            dweight = rows.float() @ inputs.float()
        return dx, dweight[:columns], None


def _widened(rows: Tensor, width: int) -> Tensor:
    """Rows that lie `width` elements apart, with what is between them; others as they are."""
    count, size = len(rows), rows.element_size()
    end = (rows.storage_offset() + count * width) * size
    if rows.stride() != (width, 1) or end > rows.untyped_storage().nbytes():
        return rows
    return rows.as_strided((count, width), (width, 1))
