"""The operator boundary: schemas, fake kernels, gradient and FLOP formula of `dualscan::rms_norm_fwd` and `_bwd`.

One operator for the plain and the gated norm: the gate is optional. See `ops/conv1d/library.py` for the form of the
registration. The operators take the device's kernels, whose launchers are imported on the first call.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from dualscan.ops import _numba, _triton
from dualscan.ops._dispatch import announce_slow_path
from dualscan.ops._launch import unsupported
from dualscan.ops.norm import chunked

_INPUTS = "Tensor x, Tensor? z, Tensor weight, int group_size, bool norm_before_gate, float eps"

_LIBRARY = torch.library.Library("dualscan", "FRAGMENT")
_LIBRARY.define(f"rms_norm_fwd({_INPUTS}) -> Tensor y")
_LIBRARY.define(f"rms_norm_bwd(Tensor dy, {_INPUTS}) -> (Tensor dx, Tensor dz, Tensor dweight)")
rms_norm_fwd = torch.ops.dualscan.rms_norm_fwd.default
rms_norm_bwd = torch.ops.dualscan.rms_norm_bwd.default


# A group that a program holds in its registers.
LARGEST_GROUP = 16384


@cache
def obstacle(device: torch.device, group_size: int, *dtypes: torch.dtype) -> str | None:
    """Why the kernels cannot run; None means that they can."""
    reasons = [_triton.obstacle(device), *map(unsupported, dtypes)]
    if group_size > LARGEST_GROUP:
        reasons.append(f"groups of {group_size} channels do not fit the registers, {LARGEST_GROUP} do")
    return next((reason for reason in reasons if reason is not None), None)


def _on_cuda(x: Tensor, z: Tensor | None, weight: Tensor, group_size: int) -> bool:
    """Whether the kernels run; says once why not."""
    reason = obstacle(x.device, group_size, x.dtype, weight.dtype, x.dtype if z is None else z.dtype)
    if reason is not None:
        announce_slow_path("rms_norm", "cuda", reason)
    return reason is None


def _forward_on_cuda(
    x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, norm_before_gate: bool, eps: float
) -> Tensor:
    if not _on_cuda(x, z, weight, group_size):
        return chunked.forward(x, z, weight, group_size, norm_before_gate, eps)
    from dualscan.ops.norm import triton_norm

    return triton_norm.forward(x, z, weight, group_size, norm_before_gate, eps)


def _backward_on_cuda(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, norm_before_gate: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not _on_cuda(x, z, weight, group_size):
        return chunked.backward(dy, x, z, weight, group_size, norm_before_gate, eps)
    from dualscan.ops.norm import triton_norm

    return triton_norm.backward(dy, x, z, weight, group_size, norm_before_gate, eps)


@cache
def _numba_runs(dtype: torch.dtype) -> bool:
    return _numba.obstacle(torch.device("cpu")) is None and _numba.unsupported(dtype) is None


def _forward_on_cpu(x: Tensor, z: Tensor | None, *others: Any) -> Tensor:
    if not _numba_runs(x.dtype):
        return chunked.forward(x, z, *others)
    from dualscan.ops.norm import numba_norm

    return numba_norm.forward(x, z, *others)


def _backward_on_cpu(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    if not _numba_runs(x.dtype):
        return chunked.backward(dy, x, *others)
    from dualscan.ops.norm import numba_norm

    return numba_norm.backward(dy, x, *others)


_LIBRARY.impl("rms_norm_fwd", _forward_on_cpu, "CPU")
_LIBRARY.impl("rms_norm_bwd", _backward_on_cpu, "CPU")
_LIBRARY.impl("rms_norm_fwd", _forward_on_cuda, "CUDA")
_LIBRARY.impl("rms_norm_bwd", _backward_on_cuda, "CUDA")


@torch.library.register_fake("dualscan::rms_norm_fwd", lib=_LIBRARY)
def _fake_forward(
    x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, norm_before_gate: bool, eps: float
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("dualscan::rms_norm_bwd", lib=_LIBRARY)
def _fake_backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, norm_before_gate: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    return x.new_empty(x.shape), dz, weight.new_empty(weight.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.options = options
        with torch._C._AutoDispatchBelowAutograd():
            return rms_norm_fwd(x, z, weight, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override] (the decorator unnames ctx)
        x, z, weight = ctx.saved_tensors
        dx, dz, dweight = rms_norm_bwd(*grad_outputs, x, z, weight, *ctx.options)
        return dx, None if z is None else dz, dweight, None, None, None


def _autograd(*inputs: Any) -> Tensor:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return _RMSNorm.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return rms_norm_fwd(*inputs)


_LIBRARY.impl("rms_norm_fwd", _autograd, "Autograd")


@register_flop_formula(torch.ops.dualscan.rms_norm_fwd)
def _flops_forward(x_shape: torch.Size, z_shape: torch.Size | None, *_: Any, **__: Any) -> int:
    """Square, sum, scale and weight: 4 an element; 5 more for a gate (SiLU counted as 4)."""
    return x_shape.numel() * (4 if z_shape is None else 9)


@register_flop_formula(torch.ops.dualscan.rms_norm_bwd)
def _flops_backward(_dy: torch.Size, x_shape: torch.Size, z_shape: torch.Size | None, *_: Any, **__: Any) -> int:
    """Statistics and `n` again (3), `dweight` (2), `h`, its mean and `du` (6); 13 more for the gate and `dz`."""
    return x_shape.numel() * (11 if z_shape is None else 24)
