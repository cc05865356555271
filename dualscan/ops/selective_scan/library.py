"""The operator boundary of the selective scan: schemas, fake kernels, FLOP formulas and autograd, torch only.

`dualscan::selective_scan_fwd` and `_bwd` are the portable chunked form, `selective_scan_numba_fwd` and `_bwd` the
kernels for CPUs, `selective_scan_kernel_fwd` and `_bwd` those for GPUs. Bias, softplus, skip and gate are inside,
because each of them is an array of x's size that a composition would write and read again. The GPU's forward may keep
some states for its backward. The autograd function sits at the Autograd dispatch key of the forward operators
(docs/decisions/001).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dualscan.ops._autograd import asks_for_gradient, differentiable
from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.selective_scan import chunked, configs

# The tensors with gradients, in the order of the arguments; cu_seqlens and dt_softplus follow.
DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? cu_seqlens, bool dt_softplus"
)
_GRADIENTS = ", ".join(f"Tensor d{name}" for name in DIFFERENTIABLE)
_LIB = torch.library.Library("dualscan", "FRAGMENT")
_NAMES = {"chunked": "selective_scan", "numba": "selective_scan_numba"}
for _name in _NAMES.values():
    _LIB.define(f"{_name}_fwd({_INPUTS}) -> (Tensor y, Tensor final_states)")
    _LIB.define(f"{_name}_bwd(Tensor? dy, Tensor? dfinal_states, {_INPUTS}) -> ({_GRADIENTS})")
_LIB.define(f"selective_scan_kernel_fwd({_INPUTS}, bool keep) -> (Tensor y, Tensor final_states, Tensor states)")
_LIB.define(
    f"selective_scan_kernel_bwd(Tensor? dy, Tensor? dfinal_states, Tensor states, {_INPUTS}, bool keep) -> "
    f"({_GRADIENTS})"
)
_LIB.define(
    "selective_scan_step_kernel(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus) -> (Tensor y, Tensor final_states)"
)


def _numba_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from dualscan.ops.selective_scan import numba_scan

    return numba_scan.forward(*inputs)


def _numba_backward(*inputs: Any) -> tuple[Tensor, ...]:
    from dualscan.ops.selective_scan import numba_scan

    return numba_scan.backward(*inputs)


def _kernel_forward(*inputs: Any) -> tuple[Tensor, ...]:
    from dualscan.ops.selective_scan import triton_scan

    return triton_scan.forward(*inputs)


def _kernel_backward(*inputs: Any) -> tuple[Tensor, ...]:
    from dualscan.ops.selective_scan import triton_scan

    return triton_scan.backward(*inputs)


def _kernel_step(*inputs: Any) -> tuple[Tensor, Tensor]:
    from dualscan.ops.selective_scan import triton_step

    return triton_step.step(*inputs)


_LIB.impl("selective_scan_numba_fwd", _numba_forward, "CPU")
_LIB.impl("selective_scan_numba_bwd", _numba_backward, "CPU")
for _key in ("CPU", "CUDA"):  # on a CPU the kernels run in Triton's interpreter
    _LIB.impl("selective_scan_fwd", chunked.forward, _key)
    _LIB.impl("selective_scan_bwd", chunked.backward, _key)
    _LIB.impl("selective_scan_kernel_fwd", _kernel_forward, _key)
    _LIB.impl("selective_scan_kernel_bwd", _kernel_backward, _key)
    _LIB.impl("selective_scan_step_kernel", _kernel_step, _key)


def _fake_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = x.new_empty((nseq, *A.shape), dtype=accumulation_dtype(x.dtype))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), states


def _fake_backward(dy: Tensor | None, dfinal_states: Tensor | None, x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    tensors = (x, *inputs[: len(DIFFERENTIABLE) - 1])
    return tuple(x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in tensors)


def _fake_kernel_forward(*args: Any) -> tuple[Tensor, ...]:
    *inputs, keep = args
    x, cu_seqlens = inputs[0], inputs[9]
    states = x.new_empty(configs.kept_states(x, inputs[2], cu_seqlens) if keep else (0,), dtype=torch.float32)
    return *_fake_forward(*inputs), states


def _fake_kernel_backward(*args: Any) -> tuple[Tensor, ...]:
    dy, dfinal_states, _, *inputs = args
    return _fake_backward(dy, dfinal_states, *inputs)


@torch.library.register_fake("dualscan::selective_scan_step_kernel", lib=_LIB)
def _fake_step(state: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    after = torch.empty(state.shape, dtype=state.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), after


def forward_flops(batch: int, seqlen: int, channels: int, d_state: int) -> int:
    """A multiply-add to update every element of a state, and one to read it: 4 FLOPs a token."""
    return 4 * batch * seqlen * channels * d_state


def backward_flops(batch: int, seqlen: int, channels: int, d_state: int) -> int:
    """The states once more, their gradients, and the sums of dB, dC, dA, dx and (two) ddt: 14 FLOPs an element."""
    return 14 * batch * seqlen * channels * d_state


def _forward_formula(x: Any, dt: Any, A: Any, *_: Any, **__: Any) -> int:
    batch, seqlen, channels = x
    return forward_flops(batch, seqlen, channels, A[1])


def _backward_formula(dy: Any, dfinal: Any, x: Any, dt: Any, A: Any, *_: Any, **__: Any) -> int:
    batch, seqlen, channels = x
    return backward_flops(batch, seqlen, channels, A[1])


step_kernel = torch.ops.dualscan.selective_scan_step_kernel.default
_KERNEL = "selective_scan_kernel"
_FAKES: dict[str, Any] = dict.fromkeys(_NAMES.values(), (_fake_forward, _fake_backward))
_FAKES[_KERNEL] = _fake_kernel_forward, _fake_kernel_backward
for _name, (_fake, _fake_back) in _FAKES.items():
    _forward, _backward = (getattr(torch.ops.dualscan, f"{_name}_{_pass}") for _pass in ("fwd", "bwd"))
    torch.library.register_fake(f"dualscan::{_name}_fwd", _fake, lib=_LIB)
    torch.library.register_fake(f"dualscan::{_name}_bwd", _fake_back, lib=_LIB)
    _pair = _forward.default, _backward.default
    _function = differentiable("selective_scan", *_pair, len(DIFFERENTIABLE), "impl='recurrent'")
    _LIB.impl(f"{_name}_fwd", _function, "Autograd")
    register_flop_formula(_forward)(_forward_formula)
_BACKWARDS = [torch.ops.dualscan.selective_scan_bwd, torch.ops.dualscan.selective_scan_numba_bwd]
register_flop_formula(_BACKWARDS)(_backward_formula)


@register_flop_formula(torch.ops.dualscan.selective_scan_kernel_bwd)
def _kernel_backward_formula(dy: Any, dfinal: Any, states: Any, x: Any, dt: Any, A: Any, *_: Any, **__: Any) -> int:
    return _backward_formula(dy, dfinal, x, dt, A)


def _kernel(*args: Any) -> tuple[Tensor, Tensor]:
    """`y` and the final states by the GPU kernels; what a backward needs is kept where there may be one."""
    y, final_states, _ = torch.ops.dualscan.selective_scan_kernel_fwd.default(*args, asks_for_gradient(args))
    return y, final_states


# The forms by the name of their implementation.
forms: dict[str, Any] = {
    **{form: getattr(torch.ops.dualscan, f"{name}_fwd").default for form, name in _NAMES.items()},
    "triton": _kernel,
}
