"""The operator boundary of SSD: schemas, fake kernels, FLOP formula and autograd, torch only.

`dualscan::ssd_fwd` and `dualscan::ssd_bwd` take the core's arguments: a log-decay and an optional input scale per token
and head. Both faces, `ssd` and `linear_attention`, are thin layers over it. The autograd function sits at the Autograd
dispatch key of the forward operator: half the call overhead of `torch.library.register_autograd` (docs/decisions/001),
and `opcheck`, `torch.compile(fullgraph=True)` and selective checkpointing see one operator. `dualscan::ssd_numba_fwd`
and `ssd_numba_bwd` are the same as kernels for a CPU.

`dualscan::ssd_kernel_fwd` and `ssd_kernel_bwd` are the same for the GPU kernels. They take dt as it comes, with bias,
softplus and clamp, and as `decay` either A per head or a log-decay per token, because the kernels do that arithmetic on
the way. With `keep` the forward may also return states that the backward needs. Their launchers are imported on the
first call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dualscan.ops._autograd import asks_for_gradient, differentiable, entry
from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.ssd import blocks, chunked, configs

_LIB = torch.library.Library("dualscan", "FRAGMENT")
_CORE = (
    "Tensor x, Tensor? scale, Tensor log_decay, Tensor B, Tensor C, Tensor? D, Tensor? initial_states, "
    "Tensor? cu_seqlens, int chunk_size"
)
for _name in ("ssd", "ssd_numba"):
    _LIB.define(f"{_name}_fwd({_CORE}) -> (Tensor y, Tensor final_states)")
    _LIB.define(
        f"{_name}_bwd(Tensor? dy, Tensor? dfinal_states, {_CORE}) -> "
        "(Tensor dx, Tensor dscale, Tensor ddA, Tensor dB, Tensor dC, Tensor dD, Tensor dinitial_states)"
    )


_KERNEL = (
    "Tensor x, Tensor? dt, Tensor decay, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_states, "
    "Tensor? cu_seqlens, bool dt_softplus, float dt_min, float dt_max, bool keep"
)
_LIB.define(f"ssd_kernel_fwd({_KERNEL}) -> (Tensor y, Tensor final_states, Tensor states)")
_LIB.define(
    f"ssd_kernel_bwd(Tensor? dy, Tensor? dfinal_states, Tensor states, {_KERNEL}) -> (Tensor dx, Tensor ddt, "
    "Tensor ddecay, Tensor dB, Tensor dC, Tensor dD, Tensor ddt_bias, Tensor dinitial_states)"
)

_LIB.define(
    "ssd_step_kernel(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, float dt_min, float dt_max) -> (Tensor y, Tensor final_states)"
)


def _numba_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from dualscan.ops.ssd.cpu import forward

    return forward.forward(*args)


def _numba_backward(*args: Any) -> tuple[Tensor, ...]:
    from dualscan.ops.ssd.cpu import backward

    return backward.backward(*args)


def _kernel_forward(*args: Any) -> tuple[Tensor, ...]:
    from dualscan.ops.ssd import triton_scan

    return triton_scan.forward(*args)


def _kernel_backward(*args: Any) -> tuple[Tensor, ...]:
    from dualscan.ops.ssd import triton_gradients

    return triton_gradients.backward(*args)


def _kernel_step(*args: Any) -> tuple[Tensor, Tensor]:
    from dualscan.ops.ssd import triton_scan

    return triton_scan.step(*args)


_LIB.impl("ssd_numba_fwd", _numba_forward, "CPU")
_LIB.impl("ssd_numba_bwd", _numba_backward, "CPU")
for _key in ("CPU", "CUDA"):  # on a CPU the kernels run in Triton's interpreter
    _LIB.impl("ssd_fwd", chunked.forward, _key)
    _LIB.impl("ssd_bwd", chunked.backward, _key)
    _LIB.impl("ssd_kernel_fwd", _kernel_forward, _key)
    _LIB.impl("ssd_kernel_bwd", _kernel_backward, _key)
    _LIB.impl("ssd_step_kernel", _kernel_step, _key)


def _fake_forward(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = x.new_empty((nseq, x.shape[2], x.shape[3], B.shape[3]), dtype=accumulation_dtype(x.dtype))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), states


def _fake_backward(
    dy: Tensor | None,
    dfinal_states: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=x.device)

    return tuple(like(t) for t in (x, scale, log_decay, B, C, D, initial_states))


def _fake_kernel_forward(*args: Any) -> tuple[Tensor, ...]:
    x, _, _, B, _, _, _, _, cu_seqlens, *_, keep = args
    states = x.new_empty(configs.saved_states(x, B, cu_seqlens) if keep else (0,))
    return *_fake_forward(x, None, x, B, B, None, None, cu_seqlens, 1), states


def _fake_kernel_backward(*args: Any) -> tuple[Tensor, ...]:
    x = args[3]
    return tuple(
        x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in args[3:11]
    )


for _name in ("ssd", "ssd_numba"):
    torch.library.register_fake(f"dualscan::{_name}_fwd", _fake_forward, lib=_LIB)
    torch.library.register_fake(f"dualscan::{_name}_bwd", _fake_backward, lib=_LIB)
torch.library.register_fake("dualscan::ssd_kernel_fwd", _fake_kernel_forward, lib=_LIB)
torch.library.register_fake("dualscan::ssd_kernel_bwd", _fake_kernel_backward, lib=_LIB)


@torch.library.register_fake("dualscan::ssd_step_kernel", lib=_LIB)
def _fake_step(state: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)


_OPS = torch.ops.dualscan
_SECOND = "impl='quadratic' or impl='recurrent'"
for _name in ("ssd", "ssd_numba"):
    _forward, _backward = (getattr(_OPS, f"{_name}_{_pass}").default for _pass in ("fwd", "bwd"))
    _LIB.impl(f"{_name}_fwd", differentiable("ssd", _forward, _backward, 7, _SECOND), "Autograd")
_forward, _backward = _OPS.ssd_kernel_fwd.default, _OPS.ssd_kernel_bwd.default
_function = differentiable("ssd", _forward, _backward, 8, _SECOND, (_kernel_forward, _kernel_backward))
_LIB.impl("ssd_kernel_fwd", _function, "Autograd")


def forward_flops(
    batch: int, seqlen: int, nheads: int, headdim: int, ngroups: int, d_state: int, chunk_size: int
) -> int:
    """Multiply-adds count 2. Section 6: C Bᵀ per group, then per head (L ∘ C Bᵀ) X, C S and Bᵀ X."""
    tokens, chunk = batch * seqlen, min(chunk_size, seqlen)
    return 2 * tokens * (ngroups * chunk * d_state + nheads * chunk * headdim + 2 * nheads * headdim * d_state)


def backward_flops(
    batch: int, seqlen: int, nheads: int, headdim: int, ngroups: int, d_state: int, chunk_size: int
) -> int:
    """Per head: dX and dL inside the chunk; dX, dB, dC, the two state products and the states rebuilt. Per group: C Bᵀ
    and dCB into dB, dC."""
    tokens, chunk = batch * seqlen, min(chunk_size, seqlen)
    return 2 * tokens * (3 * ngroups * chunk * d_state + 2 * nheads * chunk * headdim + 6 * nheads * headdim * d_state)


def _sizes(x: Any, B: Any, chunk_size: int) -> tuple[int, int, int, int, int, int, int]:
    batch, seqlen, nheads, headdim = x
    return batch, seqlen, nheads, headdim, B[2], B[3], chunk_size


@register_flop_formula([torch.ops.dualscan.ssd_fwd, torch.ops.dualscan.ssd_numba_fwd])
def _forward_formula(
    x: Any, scale: Any, log_decay: Any, B: Any, C: Any, D: Any, states: Any, cu: Any, chunk: int, **_: Any
) -> int:
    return forward_flops(*_sizes(x, B, chunk))


@register_flop_formula([torch.ops.dualscan.ssd_bwd, torch.ops.dualscan.ssd_numba_bwd])
def _backward_formula(
    dy: Any,
    df: Any,
    x: Any,
    scale: Any,
    log_decay: Any,
    B: Any,
    C: Any,
    D: Any,
    states: Any,
    cu: Any,
    chunk: int,
    **_: Any,
) -> int:
    return backward_flops(*_sizes(x, B, chunk))


@register_flop_formula(torch.ops.dualscan.ssd_kernel_fwd)
def _kernel_forward_formula(x: Any, dt: Any, decay: Any, B: Any, *_: Any, **__: Any) -> int:
    return forward_flops(*_sizes(x, B, blocks.DEFAULT_CHUNK_SIZE))


@register_flop_formula(torch.ops.dualscan.ssd_kernel_bwd)
def _kernel_backward_formula(
    dy: Any, df: Any, states: Any, x: Any, dt: Any, decay: Any, B: Any, *_: Any, **__: Any
) -> int:
    return backward_flops(*_sizes(x, B, blocks.DEFAULT_CHUNK_SIZE))


# Loaded for its effect: `torch.ops.dualscan.ssd_fwd` exists once this module is imported.
core = {"chunked": torch.ops.dualscan.ssd_fwd.default, "numba": torch.ops.dualscan.ssd_numba_fwd.default}
_kernel = entry(torch.ops.dualscan.ssd_kernel_fwd.default, _function)


def kernel(*args: Any, keep: bool = True) -> tuple[Tensor, Tensor]:
    """`y` and the final states by the GPU kernels; to `keep`, what a backward needs is kept where there may be one."""
    y, final_states, _ = _kernel(*args, keep and asks_for_gradient(args))
    return y, final_states


step_kernel = torch.ops.dualscan.ssd_step_kernel.default
