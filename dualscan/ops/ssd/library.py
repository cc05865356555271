"""The operator boundary of SSD: schemas, fake kernels, FLOP formula and autograd, torch only.

`dualscan::ssd_fwd` and `dualscan::ssd_bwd` take the core's arguments: a log-decay and an optional input scale per token
and head. Both faces, `ssd` and `linear_attention`, are thin layers over it. The autograd function sits at the Autograd
dispatch key of the forward operator: half the call overhead of `torch.library.register_autograd` (docs/decisions/001),
and `opcheck`, `torch.compile(fullgraph=True)` and selective checkpointing see one operator.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dualscan.ops._dispatch import announce_slow_path
from dualscan.ops.ssd import blocks, chunked

_LIB = torch.library.Library("dualscan", "FRAGMENT")
_CORE = (
    "Tensor x, Tensor? scale, Tensor log_decay, Tensor B, Tensor C, Tensor? D, Tensor? initial_states, "
    "Tensor? cu_seqlens, int chunk_size"
)
_LIB.define(f"ssd_fwd({_CORE}) -> (Tensor y, Tensor final_states)")
_LIB.define(
    f"ssd_bwd(Tensor? dy, Tensor? dfinal_states, {_CORE}) -> "
    "(Tensor dx, Tensor dscale, Tensor ddA, Tensor dB, Tensor dC, Tensor dD, Tensor dinitial_states)"
)


def _on_gpu(form: Any) -> Any:
    def run(*args: Any) -> Any:
        announce_slow_path("ssd", "cuda", "this version has no SSD kernel for it; results are the same")
        return form(*args)

    return run


_LIB.impl("ssd_fwd", chunked.forward, "CPU")
_LIB.impl("ssd_bwd", chunked.backward, "CPU")
_LIB.impl("ssd_fwd", _on_gpu(chunked.forward), "CUDA")
_LIB.impl("ssd_bwd", _on_gpu(chunked.backward), "CUDA")


@torch.library.register_fake("dualscan::ssd_fwd", lib=_LIB)
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
    states = x.new_empty((nseq, x.shape[2], x.shape[3], B.shape[3]), dtype=blocks.compute_dtype(x))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), states


@torch.library.register_fake("dualscan::ssd_bwd", lib=_LIB)
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


class _SSD(torch.autograd.Function):
    """Saves the inputs only; the backward operator recomputes what it needs."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, chunk_size = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.chunk_size = chunk_size
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.dualscan.ssd_fwd.default(*args)

    @staticmethod
    def backward(ctx: Any, *grads_out: Any) -> tuple[Tensor | None, ...]:
        dy, dfinal_states = grads_out
        inputs = ctx.saved_tensors
        if dy is None and dfinal_states is None:
            return (None,) * 9
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ssd: create_graph=True asks for a second derivative, which the chunked form does not have; "
                "use impl='quadratic' or impl='recurrent'."
            )
        with blocks.without_autocast(inputs[0].device):
            grads = torch.ops.dualscan.ssd_bwd.default(dy, dfinal_states, *inputs, ctx.chunk_size)
        # The last two arguments, cu_seqlens and chunk_size, have no gradient.
        return *(None if t is None else g for t, g in zip(inputs[:7], grads, strict=True)), None, None


def _autograd(*args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
        return _SSD.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.dualscan.ssd_fwd.default(*args)


_LIB.impl("ssd_fwd", _autograd, "Autograd")


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


@register_flop_formula(torch.ops.dualscan.ssd_fwd)
def _forward_formula(
    x: Any, scale: Any, log_decay: Any, B: Any, C: Any, D: Any, states: Any, cu: Any, chunk: int, **_: Any
) -> int:
    return forward_flops(*_sizes(x, B, chunk))


@register_flop_formula(torch.ops.dualscan.ssd_bwd)
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


# Loaded for its effect: `torch.ops.dualscan.ssd_fwd` exists once this module is imported.
core = torch.ops.dualscan.ssd_fwd.default
