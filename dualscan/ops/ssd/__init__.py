"""Structured state space duality (SSD): the operator of Mamba-2, arXiv 2405.21060.

One core serves two faces. `ssd` is the state space face, with the discretisation Δ, A of section 2; `linear_attention`
is the attention face of section 5, with C ↔ q, B ↔ k, X ↔ v and any log-decay per token and head.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.ops import _dispatch, _numba, _triton
from dualscan.ops._autograd import without_autocast
from dualscan.ops._pointwise import accumulation_dtype, softplus
from dualscan.ops.ssd import blocks, configs, library, reference, validate

__all__ = ["SSDOutput", "linear_attention", "ssd", "ssd_step"]

OPERATOR = _dispatch.register(
    _dispatch.Operator(
        name="ssd",
        impls={
            "triton": _triton.obstacle,
            "numba": _numba.obstacle,
            **dict.fromkeys(("chunked", "recurrent", "quadratic"), _dispatch.anywhere),
        },
        preference=("triton", "numba", "chunked"),
    )
)


class SSDOutput(NamedTuple):
    """What `ssd`, `ssd_step` and `linear_attention` return.

    Attributes:
        y: output, in the shape and dtype of the input sequence.
        final_states: `(batch or nseq, nheads, headdim, d_state)`, float32 (float64 for float64 inputs); feeds
            `initial_states` of the next call.
    """

    y: Tensor
    final_states: Tensor


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    keep_states: bool = True,
    impl: str = "auto",
) -> SSDOutput:
    """Selective state space model with scalar decay per head, over whole sequences.

    H_t = exp(Δ_t A) H_{t-1} + Δ_t x_t ⊗ B_t;  y_t = (H_t C_t + D x_t) · SiLU(z_t), with Δ = clamp(softplus(dt +
    dt_bias)). (arXiv 2405.21060, equations 1 and 2 with A_t = a_t I; section 6 for the chunked form.)

    Args:
        x: `(batch, seqlen, nheads, headdim)` inputs X; float32, bfloat16, float16 or float64.
        dt: `(batch, seqlen, nheads)` step sizes, any floating dtype. After bias, softplus and clamp they should be >=
            0; 0 makes a token a no-op.
        A: `(nheads,)` decay rates, negative, float32.
        B: `(batch, seqlen, ngroups, d_state)` input projections, x's dtype. Head h uses group `h // (nheads //
            ngroups)`.
        C: like `B`, output projections.
        D: `(nheads,)` or `(nheads, headdim)` skip connection.
        z: like `x`, gate.
        dt_bias: `(nheads,)` added to dt first.
        dt_softplus: applies softplus after the bias.
        dt_limit: (low, high) clamp of Δ, last.
        initial_states: `(batch or nseq, nheads, headdim, d_state)` float32, the state before the first token; None is
            zero.
        cu_seqlens: `(nseq + 1,)` int32 boundaries of sequences packed along time; batch must be 1.
        chunk_size: tokens a chunk of the chunked form; None takes its default (64). Changes rounding only.
        keep_states: whether the GPU kernels keep the states on the way for the backward. Without them it computes these
            again and takes the batch a part at a time: a third to two thirds of the memory beyond outputs and
            gradients, for a third to two thirds more time. The other implementations always do.
        impl: "auto", "triton" (the kernels for NVIDIA GPUs, with chunk sizes of their own), "numba" (the kernels for
            CPUs; float32 and bfloat16), "chunked", "recurrent" (the O(seqlen)-step oracle) or "quadratic" (O(seqlen²)
            memory).

    Returns:
        `SSDOutput(y, final_states)`: y like x; one float32 state a sequence, after its last token.

    Raises:
        ValueError: a shape, device, chunk size or implementation does not fit; the message names the dimension.
        TypeError: a dtype does not fit.

    Example:
        >>> x, dt = torch.randn(2, 100, 4, 16), torch.rand(2, 100, 4)
        >>> A, B, C = -torch.rand(4), torch.randn(2, 100, 1, 32), torch.randn(2, 100, 1, 32)
        >>> y, state = ssd(x, dt, A, B, C)
        >>> first = ssd(x[:, :60], dt[:, :60], A, B[:, :60], C[:, :60])
        >>> rest = ssd(x[:, 60:], dt[:, 60:], A, B[:, 60:], C[:, 60:], initial_states=first.final_states)
        >>> torch.allclose(y[:, 60:], rest.y, atol=1e-4)
        True

    Note:
        About `2 seqlen (ngroups Q d_state + nheads headdim (Q + 2 d_state))` FLOPs a batch row for chunk size Q; memory
        beyond inputs and outputs is one chunk's (forward) or one state a chunk (backward). Low-precision inputs are
        computed in float32.
    """
    validate.sequence("ssd", x, {"dt": dt}, B, C, initial_states, cu_seqlens, chunk_size)
    validate.parameters("ssd", x, A, D, z, dt_bias, dt_limit)
    form = _form("ssd", impl, x, B)
    if form == "triton":
        low, high = map(float, dt_limit)
        given = x, dt, A, B, C, D, dt_bias, initial_states, cu_seqlens
        y, final_states = library.kernel(*given, dt_softplus, low, high, keep=keep_states)
    else:
        scale = _step_size(dt, dt_bias, dt_softplus, dt_limit, accumulation_dtype(x.dtype))
        y, final_states = _core(x, scale, scale * A, B, C, D, initial_states, cu_seqlens, chunk_size, form)
    return SSDOutput(_gate(y, z), final_states)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    impl: str = "auto",
) -> SSDOutput:
    """One token of `ssd`: the state goes in and the next state comes out (equation 1 of arXiv 2405.21060).

    Args:
        state: `(batch, nheads, headdim, d_state)` float32; not modified.
        x: `(batch, nheads, headdim)`.
        dt: `(batch, nheads)`.
        A: `(nheads,)` float32.
        B: `(batch, ngroups, d_state)`.
        C: `(batch, ngroups, d_state)`.
        D: `(nheads,)` or `(nheads, headdim)`.
        z: like `x`, gate.
        dt_bias: `(nheads,)`.
        dt_softplus: applies softplus after the bias.
        dt_limit: (low, high) clamp of Δ.
        impl: "auto", "triton" (one kernel for NVIDIA GPUs, without gradients) or "recurrent".

    Returns:
        `SSDOutput(y, final_states)`: y like x, and the next state.

    Raises:
        ValueError: a shape, device or implementation does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> state = torch.zeros(1, 4, 16, 32)
        >>> x, dt, A, B = torch.randn(1, 4, 16), torch.ones(1, 4), -torch.ones(4), torch.randn(1, 1, 32)
        >>> y, state = ssd_step(state, x, dt, A, B, B)
        >>> torch.allclose(y, x * (B * B).sum(), atol=1e-4)
        True

    Note:
        Reads and writes the state once each: `8 batch nheads headdim d_state` bytes.
    """
    batch, nheads, headdim = validate.dimensions("ssd_step", "x", x, {"batch": None, "nheads": None, "headdim": None})
    _, ngroups, d_state = validate.dimensions("ssd_step", "B", B, {"batch": batch, "ngroups": None, "d_state": None})
    validate.dimensions("ssd_step", "C", C, {"batch": batch, "ngroups": ngroups, "d_state": d_state})
    validate.dimensions("ssd_step", "dt", dt, {"batch": batch, "nheads": nheads})
    shape = {"batch": batch, "nheads": nheads, "headdim": headdim, "d_state": d_state}
    validate.dimensions("ssd_step", "state", state, shape)
    validate.heads("ssd_step", nheads, ngroups)
    validate.same_kind("ssd_step", "x", x, {"B": B, "C": C}, dtype=True)
    validate.state_dtype("ssd_step", "state", state, x)
    validate.parameters("ssd_step", x, A, D, z, dt_bias, dt_limit)
    if _step_form(impl, state, x, dt, A, B, C, D, z, dt_bias) == "triton":
        low, high = map(float, dt_limit)
        return SSDOutput(*library.step_kernel(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high))
    dtype = accumulation_dtype(x.dtype)
    scale = _step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    with without_autocast(x.device):
        y, next_state = reference.step(state.to(dtype), x, scale, (scale * A).to(dtype), B, C, D)
    return SSDOutput(_gate(y, z), next_state)


STEP_OPERATOR = _dispatch.register(
    _dispatch.Operator(
        name="ssd_step",
        impls={"triton": _triton.obstacle, "recurrent": _dispatch.anywhere},
        preference=("triton", "recurrent"),
    )
)


def _step_form(impl: str, state: Tensor, x: Tensor, *others: Tensor | None) -> str:
    """The step's implementation: the kernel has no gradient, so `auto` leaves it where one is asked for."""
    form = impl if impl == "triton" and _triton.interpreted() else _dispatch.choose(STEP_OPERATOR, impl, x.device)
    if form != "triton":
        return form
    reason = None if x.dtype in configs.DTYPES else f"the kernels do not compute {x.dtype}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (state, x, *others)):
        reason = "the kernel of one token has no gradient"
    if reason is not None and impl == "triton":
        raise ValueError(f"ssd_step: impl='triton' cannot run on these inputs: {reason}; use impl='auto'.")
    return form if reason is None else "recurrent"


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    keep_states: bool = True,
    impl: str = "auto",
) -> SSDOutput:
    """Causal linear attention with a decay per token and head: the attention face of `ssd` (section 5 of arXiv
    2405.21060).

    y_t = scale · Σ_{s ≤ t} exp(Σ_{s < r ≤ t} log_decay_r) (q_t · k_s) v_s.  No decay is linear attention, a constant
    one is RetNet.

    Args:
        q: `(batch, seqlen, ngroups, d_state)` queries (C of `ssd`).
        k: like `q`, keys (B of `ssd`).
        v: `(batch, seqlen, nheads, headdim)` values (X of `ssd`); head h uses group `h // (nheads // ngroups)`.
        log_decay: `(batch, seqlen, nheads)`, natural logarithm, <= 0; -inf forgets everything before the token,
            exactly. None is 0.
        scale: factor on the queries; None is 1.
        normalize: divides by the sum of the weights (the softmax-like denominator); needs non-negative q · k.
        initial_states: `(batch or nseq, nheads, headdim, d_state)` float32; with `normalize` headdim is one larger, the
            last row being the denominator.
        cu_seqlens: `(nseq + 1,)` int32 boundaries of packed sequences; batch must be 1.
        chunk_size: as in `ssd`.
        keep_states: as in `ssd`.
        impl: as in `ssd`.

    Returns:
        `SSDOutput(y, final_states)`: y like v; states as `initial_states`.

    Raises:
        ValueError: a shape, device, chunk size or implementation does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> q, k, v = torch.randn(3, 1, 50, 2, 8).unbind(0)
        >>> mask = torch.ones(50, 50).tril()
        >>> scores = torch.einsum("blhn,bshn->bhls", q, k) * mask
        >>> torch.allclose(linear_attention(q, k, v).y, torch.einsum("bhls,bshp->blhp", scores, v), atol=1e-4)
        True

    Note:
        Cost as `ssd`; `normalize` adds one column to v.
    """
    op = "linear_attention"
    names = ("v", "k", "q")
    validate.dimensions(op, "v", v, {"batch": None, "seqlen": None, "nheads": None, "headdim": None})
    values = F.pad(v, (0, 1), value=1.0) if normalize else v
    validate.sequence(op, values, {"log_decay": log_decay}, k, q, initial_states, cu_seqlens, chunk_size, names)
    dtype = accumulation_dtype(v.dtype)
    if log_decay is None:
        log_decay = torch.zeros(v.shape[:-1], dtype=dtype, device=v.device)
    if normalize:
        # Sums of weights leave the range of float16, and their quotient would round three times.
        q, k, values = q.to(dtype), k.to(dtype), values.to(dtype)
    if scale is not None:
        q = q * scale
    form = _form(op, impl, values, k)
    if form == "triton":
        y, states = library.kernel(
            *(values, None, log_decay, k, q, None, None, initial_states, cu_seqlens, False, 0.0, math.inf),
            keep=keep_states,
        )
    else:
        y, states = _core(values, None, log_decay.to(dtype), k, q, None, initial_states, cu_seqlens, chunk_size, form)
    return SSDOutput((y[..., :-1] / y[..., -1:]).to(v.dtype) if normalize else y, states)


def _form(op: str, impl: str, x: Tensor, B: Tensor) -> str:
    """The implementation that runs; `auto` says once why it leaves the kernels on a GPU."""
    if impl == "triton" and _triton.interpreted():
        form = impl
    else:
        form = _dispatch.choose(OPERATOR, impl, x.device)
    reason = None
    if form in ("triton", "numba"):
        unsupported = configs.unsupported(x.dtype, B.shape[3]) if form == "triton" else _numba.unsupported(x.dtype)
        if unsupported is None:
            return form
        if impl == form:
            raise ValueError(f"{op}: impl={impl!r} cannot run on these inputs: {unsupported}; use impl='auto'.")
        reason, form = unsupported, "chunked"
    if impl == "auto" and x.is_cuda and not torch.compiler.is_compiling():
        reason = reason or _triton.obstacle(x.device)
        if reason is not None:
            _dispatch.announce_slow_path(op, "cuda", reason)
    return form


def _core(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    with without_autocast(x.device):
        if form in library.core:
            chunk_size = chunk_size or blocks.DEFAULT_CHUNK_SIZE
            return library.core[form](x, scale, log_decay, B, C, D, initial_states, cu_seqlens, chunk_size)
        return reference.run(form, reference.Core(x, scale, log_decay, B, C), D, initial_states, cu_seqlens)


def _step_size(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """Δ = clamp(softplus(dt + dt_bias)) in the compute dtype."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = softplus(dt)
    if dt_limit != (0.0, math.inf):
        dt = dt.clamp(*dt_limit)
    return dt


def _gate(y: Tensor, z: Tensor | None) -> Tensor:
    return y if z is None else y * F.silu(z)
