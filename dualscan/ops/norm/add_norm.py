"""The operator boundary of `dualscan::add_rms_norm_fwd` and `_bwd`: schemas, kernels, gradient and FLOP formula.

Portably it is an addition and the norm's own operator; on a GPU one kernel each way does both. See `library.py` for
the form of the registration.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from dualscan.ops._dispatch import announce_slow_path
from dualscan.ops.norm.library import obstacle, rms_norm_bwd, rms_norm_fwd

_LIBRARY = torch.library.Library("dualscan", "FRAGMENT")
_LIBRARY.define(
    "add_rms_norm_fwd(Tensor residual, Tensor? y, Tensor weight, float eps, ScalarType dtype)"
    " -> (Tensor out, Tensor normed)"
)
_LIBRARY.define(
    "add_rms_norm_bwd(Tensor? dout, Tensor dnormed, Tensor out, Tensor weight, float eps, ScalarType? y_dtype)"
    " -> (Tensor dresidual, Tensor dy, Tensor dweight)"
)
add_rms_norm_fwd = torch.ops.dualscan.add_rms_norm_fwd.default
add_rms_norm_bwd = torch.ops.dualscan.add_rms_norm_bwd.default


def portable_forward(
    residual: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`residual + y` in residual's dtype (no elements without y), and its norm in `dtype`."""
    out = residual if y is None else torch.add(residual, y).to(residual.dtype).contiguous()
    normed = rms_norm_fwd(out, None, weight, out.shape[-1], False, eps)
    return residual.new_empty(0) if y is None else out, normed.to(dtype)


def portable_backward(
    dout: Tensor | None, dnormed: Tensor, out: Tensor, weight: Tensor, eps: float, y_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `residual`, of y in `y_dtype` (no elements for None), and of `weight`."""
    dresidual, _, dweight = rms_norm_bwd(dnormed.to(out.dtype), out, None, weight, out.shape[-1], False, eps)
    if dout is not None:
        dresidual += dout
    return dresidual, out.new_empty(0) if y_dtype is None else dresidual.to(y_dtype, copy=True), dweight


def _on_cuda(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the kernels run; says once why not."""
    reason = obstacle(x.device, x.shape[-1], x.dtype, *dtypes)
    if reason is not None:
        announce_slow_path("add_rms_norm", "cuda", reason)
    return reason is None


def _forward_on_cuda(
    residual: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if not _on_cuda(residual, dtype if y is None else y.dtype, weight.dtype, dtype):
        return portable_forward(residual, y, weight, eps, dtype)
    from dualscan.ops.norm import triton_add_norm

    return triton_add_norm.forward(residual, y, weight, eps, dtype)


def _backward_on_cuda(
    dout: Tensor | None, dnormed: Tensor, out: Tensor, weight: Tensor, eps: float, y_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not _on_cuda(out, dnormed.dtype, weight.dtype, out.dtype if y_dtype is None else y_dtype):
        return portable_backward(dout, dnormed, out, weight, eps, y_dtype)
    from dualscan.ops.norm import triton_add_norm

    return triton_add_norm.backward(dout, dnormed, out, weight, eps, y_dtype)


_LIBRARY.impl("add_rms_norm_fwd", portable_forward, "CPU")
_LIBRARY.impl("add_rms_norm_bwd", portable_backward, "CPU")
_LIBRARY.impl("add_rms_norm_fwd", _forward_on_cuda, "CUDA")
_LIBRARY.impl("add_rms_norm_bwd", _backward_on_cuda, "CUDA")


@torch.library.register_fake("dualscan::add_rms_norm_fwd", lib=_LIBRARY)
def _fake_forward(
    residual: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out = residual.new_empty(0) if y is None else residual.new_empty(residual.shape)
    return out, residual.new_empty(residual.shape, dtype=dtype)


@torch.library.register_fake("dualscan::add_rms_norm_bwd", lib=_LIBRARY)
def _fake_backward(
    dout: Tensor | None, dnormed: Tensor, out: Tensor, weight: Tensor, eps: float, y_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    dy = out.new_empty(0) if y_dtype is None else out.new_empty(out.shape, dtype=y_dtype)
    return out.new_empty(out.shape), dy, weight.new_empty(weight.shape)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, y: Tensor | None, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, normed = add_rms_norm_fwd(residual, y, weight, *options)
        ctx.save_for_backward(residual if y is None else out, weight)
        ctx.eps, ctx.y_dtype = options[0], None if y is None else y.dtype
        ctx.set_materialize_grads(False)
        return out, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override] (the decorator unnames ctx)
        out, weight = ctx.saved_tensors
        dout, dnormed = grad_outputs
        if dnormed is None:
            return dout, None if dout is None else dout.to(ctx.y_dtype), None, None, None
        if ctx.y_dtype is None:
            dresidual, _, dweight = add_rms_norm_bwd(None, dnormed, out, weight, ctx.eps, None)
            return dresidual, None, dweight, None, None
        same = ctx.y_dtype == out.dtype
        dresidual, dy, dweight = add_rms_norm_bwd(dout, dnormed, out, weight, ctx.eps, None if same else ctx.y_dtype)
        return dresidual, dresidual if same else dy, dweight, None, None


def _autograd(*inputs: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return _AddRMSNorm.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return add_rms_norm_fwd(*inputs)


_LIBRARY.impl("add_rms_norm_fwd", _autograd, "Autograd")


@register_flop_formula(torch.ops.dualscan.add_rms_norm_fwd)
def _flops_forward(residual_shape: torch.Size, y_shape: torch.Size | None, *_: Any, **__: Any) -> int:
    """The norm's 4 an element, and the sum."""
    return residual_shape.numel() * (4 if y_shape is None else 5)


@register_flop_formula(torch.ops.dualscan.add_rms_norm_bwd)
def _flops_backward(dout_shape: torch.Size | None, dnormed_shape: torch.Size, *_: Any, **__: Any) -> int:
    """The norm's 11 an element, and the sum of two gradients."""
    return dnormed_shape.numel() * (11 if dout_shape is None else 12)
