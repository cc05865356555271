"""The operator boundary of the mixer: `dualscan::mamba2_mix_fwd` and `_bwd`, with fake kernels, gradient, FLOPs.

Four of the forward's results are there for the backward: what comes out of SSD, A, and, unless `keep` is false and the
backward computes them again, what comes out of the convolution and SSD's states on the way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dualscan.ops._autograd import asks_for_gradient, entry, shortcut
from dualscan.ops.ssd import blocks
from dualscan.ops.ssd.configs import saved_states
from dualscan.ops.ssd.library import backward_flops, forward_flops

_INPUTS = (
    "Tensor projected, Tensor conv_weight, Tensor? conv_bias, Tensor A_log, Tensor dt_bias, Tensor D, "
    "Tensor norm_weight, Tensor? conv_states, Tensor? ssm_states, Tensor? cu_seqlens, int ngroups, int norm_group, "
    "bool norm_before_gate, float eps, float dt_min, float dt_max, bool keep"
)
_LIB = torch.library.Library("dualscan", "FRAGMENT")
_LIB.define(
    f"mamba2_mix_fwd({_INPUTS}) -> "
    "(Tensor y, Tensor conv, Tensor ssm, Tensor scanned, Tensor A, Tensor convolved, Tensor states)"
)
_LIB.define(
    f"mamba2_mix_bwd(Tensor? dy, Tensor? dconv, Tensor? dssm, Tensor scanned, Tensor A, Tensor convolved, "
    f"Tensor states, {_INPUTS}) -> (Tensor dprojected, Tensor dconv_weight, Tensor dconv_bias, Tensor dA_log, "
    "Tensor ddt_bias, Tensor dD, Tensor dnorm_weight, Tensor dconv_states, Tensor dssm_states)"
)
# Tensors of the forward that have gradients; cu_seqlens comes after them.
_DIFFERENTIABLE = 9
# The backward's first arguments, before those of the forward: three gradients, and four results of the forward.
_FIRST = 7


def _forward(*args: Any) -> tuple[Tensor, ...]:
    from dualscan.ops.mixer import triton_mixer

    return triton_mixer.forward(*args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    from dualscan.ops.mixer import triton_mixer

    return triton_mixer.backward(*args)


for _key in ("CPU", "CUDA"):  # on a CPU the kernels run in Triton's interpreter
    _LIB.impl("mamba2_mix_fwd", _forward, _key)
    _LIB.impl("mamba2_mix_bwd", _backward, _key)
_OPERATOR = torch.ops.dualscan.mamba2_mix_fwd.default


def _following(results: Sequence[Tensor], args: Sequence[Any]) -> None:
    _backward(torch.empty_like(results[0]), None, None, *results[3:], *args)


_run = shortcut(_OPERATOR, _forward, _following)
_run_back = shortcut(torch.ops.dualscan.mamba2_mix_bwd.default, _backward)


def sizes(projected: Any, conv_weight: Any, A_log: Any, norm_weight: Any, ngroups: int) -> tuple[int, ...]:
    """Of the shapes: batch, seqlen, nheads, headdim, d_state, channels, width of the convolution."""
    (channels, _, width), (d_inner,), (nheads,) = conv_weight, norm_weight, A_log
    return *projected[:2], nheads, d_inner // nheads, (channels - d_inner) // (2 * ngroups), channels, width


@torch.library.register_fake("dualscan::mamba2_mix_fwd", lib=_LIB)
def _fake_forward(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    conv_states: Tensor | None,
    ssm_states: Tensor | None,
    cu_seqlens: Tensor | None,
    ngroups: int,
    *values: Any,
) -> tuple[Tensor, ...]:
    shapes = (projected.shape, conv_weight.shape, A_log.shape, norm_weight.shape)
    batch, seqlen, nheads, headdim, d_state, channels, width = sizes(*shapes, ngroups)
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    scanned = projected.new_empty(batch, seqlen, nheads, headdim)
    groups = projected.new_empty(batch, seqlen, ngroups, d_state)
    return (
        projected.new_empty(batch, seqlen, nheads * headdim),
        projected.new_empty(nseq, width - 1, channels).transpose(1, 2),
        projected.new_empty(nseq, nheads, headdim, d_state, dtype=torch.float32),
        scanned,
        A_log.new_empty(A_log.shape, dtype=torch.float32),
        projected.new_empty((batch, seqlen, channels) if values[-1] else 0),
        projected.new_empty(saved_states(scanned, groups, cu_seqlens) if values[-1] else 0),
    )


def empty_rows(like: Tensor) -> Tensor:
    """Memory for a tensor like `(batch, seqlen, width)`, which is contiguous or the first columns of one that is."""
    if like.is_contiguous():
        return torch.empty_like(like)
    batch, seqlen, width = like.shape
    return torch.empty(batch, seqlen, like.stride(1), dtype=like.dtype, device=like.device)[..., :width]


@torch.library.register_fake("dualscan::mamba2_mix_bwd", lib=_LIB)
def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    inputs = args[_FIRST : _FIRST + _DIFFERENTIABLE]
    grads = [args[_FIRST].new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs]
    grads[0] = empty_rows(inputs[0])
    if inputs[7] is not None:
        grads[7] = inputs[7].new_empty(inputs[7].transpose(1, 2).shape).transpose(1, 2)
    return tuple(grads)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        results = _below(*args)
        ctx.save_for_backward(*results[3:], *args[: _DIFFERENTIABLE + 1])
        ctx.values = args[_DIFFERENTIABLE + 1 :]
        ctx.mark_non_differentiable(*results[3:])
        return results

    @staticmethod
    def backward(ctx: Any, *grads_out: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: unpacking may compute them again
        kept, inputs = saved[: _FIRST - 3], saved[_FIRST - 3 :]
        nothing = [None] * (1 + len(ctx.values))
        if all(g is None for g in grads_out[:3]):
            return *([None] * _DIFFERENTIABLE), *nothing
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Mamba2: create_graph=True asks for a second derivative, which the kernels do not have; use "
                "Mamba2(impl='quadratic') or impl='recurrent'."
            )
        grads = _run_back(*grads_out[:3], *kept, *inputs, *ctx.values)
        return *(None if t is None else g for t, g in zip(inputs, grads, strict=False)), *nothing


def _below(*args: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return _run(*args)


def _autograd(*args: Any) -> tuple[Tensor, ...]:
    return _Mix.apply(*args) if asks_for_gradient(args) else _below(*args)


_LIB.impl("mamba2_mix_fwd", _autograd, "Autograd")
mix = entry(_OPERATOR, _autograd)


def _counted(shapes: tuple[Any, ...], ngroups: int, backward: bool) -> int:
    """SSD's, the convolution's and the norm's FLOPs, as their operators count them."""
    projected, conv_weight, _, A_log, _, _, norm_weight, *_ = shapes
    batch, seqlen, nheads, headdim, d_state, channels, width = sizes(
        projected, conv_weight, A_log, norm_weight, ngroups
    )
    scan = backward_flops if backward else forward_flops
    chunked = scan(batch, seqlen, nheads, headdim, ngroups, d_state, blocks.DEFAULT_CHUNK_SIZE)
    tokens = batch * seqlen
    return chunked + tokens * ((1 + backward) * 2 * channels * width + nheads * headdim * (24 if backward else 9))


@register_flop_formula(torch.ops.dualscan.mamba2_mix_fwd)
def _flops_forward(*args: Any, **_: Any) -> int:
    return _counted(args, args[_DIFFERENTIABLE + 1], False)


@register_flop_formula(torch.ops.dualscan.mamba2_mix_bwd)
def _flops_backward(*args: Any, **_: Any) -> int:
    return _counted(args[_FIRST:], args[_FIRST + _DIFFERENTIABLE + 1], True)
