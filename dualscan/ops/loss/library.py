"""The operator boundary: schemas, fake kernels, gradient and FLOP formulas of `dualscan::linear_cross_entropy_fwd`.

`dualscan::linear_cross_entropy_grad` gives losses and gradients in one sweep, for given weights of the tokens. Where
these are known in the forward, as for a mean, it runs there and the backward only scales, by
`dualscan::linear_cross_entropy_scale_`, which does nothing for the factor 1 that a loss usually has. See
`ops/conv1d/library.py` for the form of the registration.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.loss import chunked

_OPTIONS = "int ignore_index, float z_loss, float label_smoothing, bool kernel"
_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor target"

_LIBRARY = torch.library.Library("dualscan", "FRAGMENT")
_LIBRARY.define(f"linear_cross_entropy_fwd({_TENSORS}, Tensor? scale, {_OPTIONS}) -> Tensor loss")
_LIBRARY.define(
    f"linear_cross_entropy_grad(Tensor scale, {_TENSORS}, {_OPTIONS})"
    " -> (Tensor losses, Tensor dx, Tensor dweight, Tensor dbias)"
)
_LIBRARY.define("linear_cross_entropy_scale_(Tensor(a!) t, Tensor factor, bool kernel) -> ()")
linear_cross_entropy_fwd = torch.ops.dualscan.linear_cross_entropy_fwd.default
linear_cross_entropy_grad = torch.ops.dualscan.linear_cross_entropy_grad.default
linear_cross_entropy_scale_ = torch.ops.dualscan.linear_cross_entropy_scale_.default

for _key in ("CPU", "CUDA"):  # on a CPU the kernel runs in Triton's interpreter
    _LIBRARY.impl("linear_cross_entropy_fwd", chunked.forward, _key)
    _LIBRARY.impl("linear_cross_entropy_grad", chunked.gradients, _key)
    _LIBRARY.impl("linear_cross_entropy_scale_", chunked.scale_, _key)


@torch.library.register_fake("dualscan::linear_cross_entropy_fwd", lib=_LIBRARY)
def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor | None, *_: Any
) -> Tensor:
    return x.new_empty(target.shape if scale is None else (), dtype=accumulation_dtype(x.dtype))


@torch.library.register_fake("dualscan::linear_cross_entropy_grad", lib=_LIBRARY)
def _fake_gradients(
    scale: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = x.new_empty(target.shape, dtype=accumulation_dtype(x.dtype))
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return losses, x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


@torch.library.register_fake("dualscan::linear_cross_entropy_scale_", lib=_LIBRARY)
def _fake_scale(*_: Any) -> None:
    return None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, target, scale, *options = inputs
        ctx.save_for_backward(x, weight, bias, target, scale)
        ctx.options, ctx.gradients = options, None
        with torch._C._AutoDispatchBelowAutograd():
            if scale is None:
                return linear_cross_entropy_fwd(*inputs)
            losses, *ctx.gradients = linear_cross_entropy_grad(scale, x, weight, bias, target, *options)
            return losses.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override] (the decorator unnames ctx)
        (dloss,) = grad_outputs
        x, weight, bias, target, scale = ctx.saved_tensors
        # What the forward left is handed out once and scaled in place: as large as the weight, it is not copied.
        grads, ctx.gradients = ctx.gradients, None
        if grads is None:
            scale = dloss if scale is None else scale * dloss
            _, *grads = linear_cross_entropy_grad(scale, x, weight, bias, target, *ctx.options)
        else:
            for gradient in grads:
                linear_cross_entropy_scale_(gradient, dloss, ctx.options[-1])
        dx, dweight, dbias = grads
        return dx, dweight, None if bias is None else dbias, None, None, None, None, None, None


def _autograd(*inputs: Any) -> Tensor:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs[:3]):
        return _LinearCrossEntropy.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return linear_cross_entropy_fwd(*inputs)


_LIBRARY.impl("linear_cross_entropy_fwd", _autograd, "Autograd")


@register_flop_formula(torch.ops.dualscan.linear_cross_entropy_fwd)
def _flops_forward(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    """The logits; the softmax is not counted."""
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.dualscan.linear_cross_entropy_grad)
def _flops_gradients(_scale: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    """The logits, and the products that give the gradients of `x` and `weight`."""
    return 3 * _flops_forward(x_shape, weight_shape)
