"""Mamba's selective scan (S6), arXiv 2312.00752: a diagonal state space model whose Δ, B and C depend on the input.

Every channel has its own step size Δ and its own N decay rates, where SSD (`dualscan.ops.ssd`) has one decay for a
whole head. With A equal across the N states, and Δ and A shared by the channels of a head, the two are the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dualscan.ops import _dispatch, _numba, _triton
from dualscan.ops._autograd import without_autocast
from dualscan.ops._launch import unsupported
from dualscan.ops.selective_scan import library, reference, validate

__all__ = ["SelectiveScanOutput", "selective_scan", "selective_scan_step"]

OPERATOR = _dispatch.register(
    _dispatch.Operator(
        name="selective_scan",
        impls={
            "triton": _triton.obstacle,
            "numba": _numba.obstacle,
            **dict.fromkeys(("chunked", "recurrent"), _dispatch.anywhere),
        },
        preference=("triton", "numba", "chunked"),
    )
)
STEP_OPERATOR = _dispatch.register(
    _dispatch.Operator(
        name="selective_scan_step",
        impls={"triton": _triton.obstacle, "recurrent": _dispatch.anywhere},
        preference=("triton", "recurrent"),
    )
)


class SelectiveScanOutput(NamedTuple):
    """What `selective_scan` and `selective_scan_step` return.

    Attributes:
        y: output, in the shape and dtype of x.
        final_states: `(batch or nseq, channels, d_state)`, float32 (float64 for float64 inputs); feeds `initial_states`
            of the next call.
    """

    y: Tensor
    final_states: Tensor


def selective_scan(
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
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> SelectiveScanOutput:
    """Selective state space model with a diagonal A per channel, over whole sequences.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t;  y_t = (C_t · h_t + D x_t) · SiLU(z_t), with Δ = softplus(dt + dt_bias).
    (arXiv 2312.00752, equation 2a and algorithm 2; B is discretised by Euler's rule, as in the published models.)

    Args:
        x: `(batch, seqlen, channels)` inputs; float32, bfloat16, float16 or float64.
        dt: `(batch, seqlen, channels)` step sizes, any floating dtype. After bias and softplus they should be >= 0; 0
            makes a token a no-op.
        A: `(channels, d_state)` decay rates, negative, float32.
        B: `(batch, seqlen, d_state)` or `(batch, seqlen, ngroups, d_state)` input projections, x's dtype. Channel c
            uses group `c // (channels // ngroups)`.
        C: like `B`, output projections.
        D: `(channels,)` skip connection.
        z: like `x`, gate.
        dt_bias: `(channels,)` added to dt first.
        dt_softplus: applies softplus after the bias.
        initial_states: `(batch or nseq, channels, d_state)` float32, the state before the first token; None is zero.
        cu_seqlens: `(nseq + 1,)` int32 boundaries of sequences packed along time; batch must be 1.
        impl: "auto", "triton" (kernels for NVIDIA GPUs), "numba" (kernels for CPUs; float32 and bfloat16), "chunked"
            (blocks of time, portable) or "recurrent" (the oracle, twice differentiable).

    Returns:
        `SelectiveScanOutput(y, final_states)`: y like x; one float32 state a sequence, after its last token.

    Raises:
        ValueError: a shape, device or implementation does not fit; the message names the dimension.
        TypeError: a dtype does not fit.

    Example:
        >>> import torch
        >>> x, dt, A = torch.randn(2, 50, 6), torch.rand(2, 50, 6), -torch.rand(6, 16)
        >>> B, C = torch.randn(2, 50, 16), torch.randn(2, 50, 16)
        >>> y, state = selective_scan(x, dt, A, B, C)
        >>> first = selective_scan(x[:, :30], dt[:, :30], A, B[:, :30], C[:, :30])
        >>> rest = selective_scan(x[:, 30:], dt[:, 30:], A, B[:, 30:], C[:, 30:], initial_states=first.final_states)
        >>> torch.allclose(y[:, 30:], rest.y, atol=1e-4)
        True

    Note:
        `4 channels d_state` FLOPs a token beside the exponentials, and no matrix products: SSD does more arithmetic in
        less time. Memory beyond inputs and outputs is that of a block of tokens (forward), or one state in 16 to 64
        tokens (backward); the GPU's kernels keep one in 64 tokens until the backward. Low-precision inputs are computed
        in float32.
    """
    op = OPERATOR.name
    validate.dimensions(op, "x", x, {"batch": None, "seqlen": None, "channels": None})
    B, C = (validate.with_groups(op, name, t, 2) for name, t in (("B", B), ("C", C)))
    validate.sequence(op, x, dt, A, B, C, {"D": D, "z": z, "dt_bias": dt_bias}, initial_states, cu_seqlens)
    form = _form(impl, x)
    run = library.forms.get(form, reference.recurrent)
    with without_autocast(x.device):
        return SelectiveScanOutput(*run(x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus))


def _form(impl: str, x: Tensor) -> str:
    """The implementation that runs; `auto` says once why it leaves the kernels on a GPU."""
    if impl == "triton" and _triton.interpreted():
        form = impl
    else:
        form = _dispatch.choose(OPERATOR, impl, x.device)
    reason = None
    if form in ("triton", "numba"):
        reason = unsupported(x.dtype) if form == "triton" else _numba.unsupported(x.dtype)
    if reason is not None and impl == form:
        raise ValueError(f"selective_scan: impl={impl!r} cannot run on these inputs: {reason}; use impl='auto'.")
    if impl == "auto" and x.is_cuda and not torch.compiler.is_compiling():
        slow = reason or _triton.obstacle(x.device)
        if slow is not None:
            _dispatch.announce_slow_path("selective_scan", "cuda", slow)
    return form if reason is None else "chunked"


def selective_scan_step(
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
    impl: str = "auto",
) -> SelectiveScanOutput:
    """One token of `selective_scan`: the state goes in and the next state comes out (arXiv 2312.00752, equation 2a).

    Args:
        state: `(batch, channels, d_state)` float32; not modified.
        x: `(batch, channels)`.
        dt: `(batch, channels)`.
        A: `(channels, d_state)` float32.
        B: `(batch, d_state)` or `(batch, ngroups, d_state)`.
        C: like `B`.
        D: `(channels,)`.
        z: like `x`, gate.
        dt_bias: `(channels,)`.
        dt_softplus: applies softplus after the bias.
        impl: "auto", "triton" (one kernel for NVIDIA GPUs; "auto" leaves it where gradients are asked for) or
            "recurrent".

    Returns:
        `SelectiveScanOutput(y, final_states)`: y like x, and the next state.

    Raises:
        ValueError: a shape, device or implementation does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> import torch
        >>> state = torch.zeros(1, 6, 16)
        >>> x, dt, A, B = torch.randn(1, 6), torch.ones(1, 6), -torch.ones(6, 16), torch.randn(1, 16)
        >>> y, state = selective_scan_step(state, x, dt, A, B, B)
        >>> torch.allclose(y, x * (B * B).sum(), atol=1e-4)
        True

    Note:
        Reads and writes the state once each: `8 batch channels d_state` bytes.
    """
    op = STEP_OPERATOR.name
    validate.dimensions(op, "x", x, {"batch": None, "channels": None})
    B, C = (validate.with_groups(op, name, t, 1) for name, t in (("B", B), ("C", C)))
    validate.token(op, state, x, dt, A, B, C, {"D": D, "z": z, "dt_bias": dt_bias})
    if _step_form(impl, state, x, dt, A, B, C, D, z, dt_bias) == "triton":
        return SelectiveScanOutput(*library.step_kernel(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus))
    with without_autocast(x.device):
        return SelectiveScanOutput(*reference.step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus))


def _step_form(impl: str, *inputs: Tensor | None) -> str:
    """The step's implementation: the kernel has no gradient, so `auto` leaves it where one is asked for."""
    x = inputs[1]
    assert x is not None
    form = impl if impl == "triton" and _triton.interpreted() else _dispatch.choose(STEP_OPERATOR, impl, x.device)
    if form != "triton":
        return form
    reason = unsupported(x.dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        reason = "the kernel of one token has no gradient"
    if reason is not None and impl == "triton":
        raise ValueError(f"selective_scan_step: impl='triton' cannot run on these inputs: {reason}; use impl='auto'.")
    return form if reason is None else "recurrent"
