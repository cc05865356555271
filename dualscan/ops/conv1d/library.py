"""The operator boundary: schemas, fake kernels, gradient and FLOP formula of `dualscan::causal_conv1d_fwd` and `_bwd`.

The autograd Function is registered at the Autograd key, beneath the operator: tracing sees one node, and a call costs
2.4 us over plain Python (`torch.library.register_autograd`: 7.8, `custom_op`: 7.2).

`dualscan::causal_conv1d_kernel_fwd` and `_bwd` are the same for the GPU kernels, `causal_conv1d_numba_fwd` and `_bwd`
for the CPU kernels. Their launchers are imported on the first call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from dualscan.ops.conv1d import chunked

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? cu_seqlens, bool silu"

_LIBRARY = torch.library.Library("dualscan", "FRAGMENT")
for _name in ("causal_conv1d", "causal_conv1d_numba", "causal_conv1d_kernel"):
    _LIBRARY.define(f"{_name}_fwd({_INPUTS}) -> (Tensor y, Tensor final_states)")
    _LIBRARY.define(
        f"{_name}_bwd(Tensor dy, Tensor dfinal_states, {_INPUTS})"
        " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_states)"
    )
causal_conv1d_fwd = torch.ops.dualscan.causal_conv1d_fwd.default
causal_conv1d_bwd = torch.ops.dualscan.causal_conv1d_bwd.default
causal_conv1d_numba_fwd = torch.ops.dualscan.causal_conv1d_numba_fwd.default
causal_conv1d_numba_bwd = torch.ops.dualscan.causal_conv1d_numba_bwd.default
causal_conv1d_kernel_fwd = torch.ops.dualscan.causal_conv1d_kernel_fwd.default
causal_conv1d_kernel_bwd = torch.ops.dualscan.causal_conv1d_kernel_bwd.default


def _numba_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from dualscan.ops.conv1d import numba_conv

    return numba_conv.forward(*inputs)


def _numba_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dualscan.ops.conv1d import numba_conv

    return numba_conv.backward(*inputs)


def _kernel_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from dualscan.ops.conv1d import triton_conv1d

    return triton_conv1d.forward(*inputs)


def _kernel_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dualscan.ops.conv1d import triton_conv1d

    return triton_conv1d.backward(*inputs)


_LIBRARY.impl("causal_conv1d_numba_fwd", _numba_forward, "CPU")
_LIBRARY.impl("causal_conv1d_numba_bwd", _numba_backward, "CPU")
for _key in ("CPU", "CUDA"):  # on a CPU the kernels run in Triton's interpreter
    _LIBRARY.impl("causal_conv1d_fwd", chunked.forward, _key)
    _LIBRARY.impl("causal_conv1d_bwd", chunked.backward, _key)
    _LIBRARY.impl("causal_conv1d_kernel_fwd", _kernel_forward, _key)
    _LIBRARY.impl("causal_conv1d_kernel_bwd", _kernel_backward, _key)


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(nseq, weight.shape[1] - 1, x.shape[2]).transpose(1, 2)


def _fake_backward(
    dy: Tensor,
    dfinal_states: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states = x.new_empty(0)
    if initial_states is not None:
        states = x.new_empty(initial_states.shape[0], weight.shape[1] - 1, x.shape[2]).transpose(1, 2)
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        states,
    )


for _name in ("causal_conv1d", "causal_conv1d_numba", "causal_conv1d_kernel"):
    torch.library.register_fake(f"dualscan::{_name}_fwd", _fake_forward, lib=_LIBRARY)
    torch.library.register_fake(f"dualscan::{_name}_bwd", _fake_backward, lib=_LIBRARY)


def _differentiable(forward: Any, backward: Any) -> Any:
    """The autograd function of a pair of operators: the inputs are saved, the backward computes the rest again."""

    class CausalConv1d(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:-1])
            ctx.silu = inputs[-1]
            with torch._C._AutoDispatchBelowAutograd():
                return forward(*inputs)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override] (the decorator unnames ctx)
            dy, dfinal_states = grad_outputs
            x, weight, bias, initial_states, cu_seqlens = ctx.saved_tensors
            dy = x.new_zeros(x.shape) if dy is None else dy
            dfinal_states = x.new_empty(0) if dfinal_states is None else dfinal_states
            dx, dweight, dbias, dinitial_states = backward(
                dy, dfinal_states, x, weight, bias, initial_states, cu_seqlens, ctx.silu
            )
            return (
                dx,
                dweight,
                None if bias is None else dbias,
                None if initial_states is None else dinitial_states,
                None,
                None,
            )

    def autograd(*inputs: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
            return CausalConv1d.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return forward(*inputs)

    return autograd


for _forward, _backward in (
    (causal_conv1d_fwd, causal_conv1d_bwd),
    (causal_conv1d_numba_fwd, causal_conv1d_numba_bwd),
    (causal_conv1d_kernel_fwd, causal_conv1d_kernel_bwd),
):
    _LIBRARY.impl(_forward, _differentiable(_forward, _backward), "Autograd")

_OPS = torch.ops.dualscan


@register_flop_formula([_OPS.causal_conv1d_fwd, _OPS.causal_conv1d_numba_fwd, _OPS.causal_conv1d_kernel_fwd])
def _flops_forward(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    """One multiply and one add per output and tap; bias and activation are not counted."""
    batch, seqlen, channels = x_shape
    return 2 * batch * seqlen * channels * weight_shape[1]


@register_flop_formula([_OPS.causal_conv1d_bwd, _OPS.causal_conv1d_numba_bwd, _OPS.causal_conv1d_kernel_bwd])
def _flops_backward(
    _dy: torch.Size, _dfinal: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any
) -> int:
    """`dx` and `dweight` cost a forward each; the pre-activation that is computed again is not counted."""
    return 2 * _flops_forward(x_shape, weight_shape)
