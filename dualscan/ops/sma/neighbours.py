"""Relatives of SSD as calls of its operators: RetNet, lightning attention, scalar-gated linear attention, mLSTM, S4D.

Table 1 of arXiv 2405.21060 and its section on related models order them by their decay: none, constant, or from the
data. Linear attention itself is `dualscan.linear_attention` with a feature map and `normalize=True`.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.sma.rotation import advance, positions, rotate
from dualscan.ops.ssd import SSDOutput, linear_attention
from dualscan.ops.ssd.validate import dimensions


def retention(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None, base: float | None = 10000.0, **options: Any
) -> SSDOutput:
    """Retention of RetNet: S_n = γ S_{n-1} + K_nᵀ V_n, O_n = Q_n S_n with Q, K turned by the position.

    (arXiv 2307.08621, equations 5 and 6.)

    Args:
        q: `(batch, seqlen, ngroups, d_state)` queries, d_state even where they turn.
        k: like `q`, keys.
        v: `(batch, seqlen, nheads, headdim)` values.
        log_decay: `(nheads,)`, log γ <= 0; None takes γ_h = 1 - 2^(-5 - h) (equation 8).
        base: pair i turns by base^(-2 i / d_state) radians a token; None does not turn.
        **options: `scale`, `initial_states`, `cu_seqlens`, `chunk_size`, `impl` of `linear_attention`.

    Returns:
        `SSDOutput(y, final_states)`; a state feeds `initial_states` of the next call.

    Raises:
        ValueError: a shape does not fit, or d_state is odd.

    Example:
        >>> q, k, v = torch.randn(3, 1, 9, 2, 4).unbind(0)
        >>> first = retention(q[:, :5], k[:, :5], v[:, :5])
        >>> rest = retention(q[:, 5:], k[:, 5:], v[:, 5:], initial_states=first.final_states)
        >>> torch.allclose(rest.y, retention(q, k, v).y[:, 5:], atol=1e-5)
        True
    """
    if log_decay is None:
        heads = torch.arange(v.shape[2], dtype=accumulation_dtype(v.dtype), device=v.device)
        log_decay = torch.log1p(-torch.exp2(-5 - heads))
    decay = _constant(log_decay, v)
    if base is None:
        return linear_attention(q, k, v, log_decay=decay, **options)
    width, cu_seqlens = q.shape[-1], options.get("cu_seqlens")
    if width % 2:
        raise ValueError(f"retention: d_state={width} is odd; pairs turn, so use an even one, or base=None.")
    rates = base ** -torch.arange(0, 1, 2 / width, dtype=torch.float64, device=q.device)
    angles = positions(q.shape[1], cu_seqlens, q.device)[:, None, None] * rates
    y, states = linear_attention(rotate(q, angles), rotate(k, angles), v, log_decay=decay, **options)
    return SSDOutput(y, advance(states, rates, q.shape[1], cu_seqlens))


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None, depth: float = 0.0, **options: Any
) -> SSDOutput:
    """Lightning attention: kv_t = λ kv_{t-1} + k_t v_tᵀ, o_t = q_t kv_t (arXiv 2401.04658, section 3).

    Args:
        q: `(batch, seqlen, ngroups, d_state)` queries.
        k: like `q`, keys.
        v: `(batch, seqlen, nheads, headdim)` values.
        log_decay: `(nheads,)`, log λ <= 0; None takes -8 h / nheads · (1 - depth) for h = 1, 2, ... (arXiv 2307.14995,
            section 3.1).
        depth: the layer's place in the model, 0 for the first and less than 1 for the last.
        **options: as in `retention`.

    Returns:
        `SSDOutput(y, final_states)`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 9, 2, 4).unbind(0)
        >>> lightning_attention(q, k, v, depth=0.5).y.shape
        torch.Size([1, 9, 2, 4])
    """
    if log_decay is None:
        nheads = v.shape[2]
        heads = torch.arange(1, nheads + 1, dtype=accumulation_dtype(v.dtype), device=v.device)
        log_decay = -8 * heads / nheads * (1 - depth)
    return linear_attention(q, k, v, log_decay=_constant(log_decay, v), **options)


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, **options: Any) -> SSDOutput:
    """Gated linear attention with one gate a head: S_t = α_t S_{t-1} + k_tᵀ v_t, o_t = q_t S_t.

    (arXiv 2312.06635, section 4, with the gate vector α_t a multiple of ones.)

    Args:
        q: `(batch, seqlen, ngroups, d_state)` queries.
        k: like `q`, keys.
        v: `(batch, seqlen, nheads, headdim)` values.
        log_gate: `(batch, seqlen, nheads)`, log α <= 0; the paper's is logsigmoid(x W) / 16.
        **options: as in `retention`.

    Returns:
        `SSDOutput(y, final_states)`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 9, 2, 4).unbind(0)
        >>> gated_linear_attention(q, k, v, F.logsigmoid(torch.randn(1, 9, 2)) / 16).y.shape
        torch.Size([1, 9, 2, 4])
    """
    return linear_attention(q, k, v, log_decay=log_gate, **options)


class MLSTMState(NamedTuple):
    """What an mLSTM remembers, scaled so that nothing overflows.

    Attributes:
        memory: `(batch, nheads, headdim + 1, d_state)` float32: exp(-m) C and, as its last row, exp(-m) n.
        log_scale: `(batch, nheads)` m.
    """

    memory: Tensor
    log_scale: Tensor


class MLSTMOutput(NamedTuple):
    """What `mlstm` returns.

    Attributes:
        y: output before the output gate, like v.
        final_states: the state after the last token.
    """

    y: Tensor
    final_states: MLSTMState


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    log_forget: Tensor,
    *,
    initial_states: MLSTMState | None = None,
    **options: Any,
) -> MLSTMOutput:
    """The mLSTM of xLSTM, with its normaliser and stabilised exponential gates (arXiv 2405.04517, equations 19 to 27).

    C_t = f_t C_{t-1} + i_t v_t k_tᵀ,  n_t = f_t n_{t-1} + i_t k_t,  h_t = C_t q_t / max(|n_t · q_t|, 1), where i =
    exp(input_gate), and keys are divided by √d_state. Every state is kept times exp(-m_t), m_t = max(log f_t + m_{t-1},
    input_gate_t): then f and i become factors of at most 1, and the whole is linear attention with n as one more column
    of v.

    Args:
        q: `(batch, seqlen, ngroups, d_state)` queries.
        k: like `q`, keys.
        v: `(batch, seqlen, nheads, headdim)` values.
        input_gate: `(batch, seqlen, nheads)`, log i of any size and sign.
        log_forget: `(batch, seqlen, nheads)`, log f: `logsigmoid(x)`, or x itself for an exponential gate.
        initial_states: `MLSTMState` of a previous call.
        **options: `chunk_size` and `impl` of `linear_attention`.

    Returns:
        `MLSTMOutput(y, final_states)`.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> q, k, v = torch.randn(3, 1, 9, 2, 4).unbind(0)
        >>> y, state = mlstm(q, k, v, 100 * torch.randn(1, 9, 2), F.logsigmoid(torch.randn(1, 9, 2)))
        >>> bool(y.isfinite().all())
        True

    Note:
        Cost as `linear_attention` with one column more, and log2(seqlen) passes over the gates for m.
    """
    sizes = dict(zip(("batch", "seqlen", "nheads"), v.shape, strict=False))
    for name, gate in (("input_gate", input_gate), ("log_forget", log_forget)):
        dimensions("mlstm", name, gate, sizes)
    dtype = accumulation_dtype(v.dtype)
    q, k, log_input, log_forget = (t.to(dtype) for t in (q, k, input_gate, log_forget))
    before = log_input.new_zeros(v.shape[0], v.shape[2]) if initial_states is None else initial_states.log_scale
    # The result does not depend on m, only its rounding does: m needs no gradient.
    with torch.no_grad():
        log_scale = torch.cat([before.unsqueeze(1), _running_maximum(log_forget, log_input, before)], dim=1)
    log_decay = log_forget + log_scale[:, :-1] - log_scale[:, 1:]
    log_decay = log_decay - log_decay.detach().clamp(min=0)  # rounded above 0; a clamp would lose the gradient there
    values = F.pad(v.to(dtype), (0, 1), value=1.0) * (log_input - log_scale[:, 1:]).exp().unsqueeze(-1)
    memory = None if initial_states is None else initial_states.memory
    h, memory = linear_attention(
        q, k / math.sqrt(k.shape[-1]), values, log_decay=log_decay, initial_states=memory, **options
    )
    floor = (-log_scale[:, 1:]).exp().unsqueeze(-1)
    y = h[..., :-1] / torch.maximum(h[..., -1:].abs(), floor)
    return MLSTMOutput(y.to(v.dtype), MLSTMState(memory, log_scale[:, -1]))


def s4d_real(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, **options: Any
) -> SSDOutput:
    """S4D with real eigenvalues: a diagonal state space of its own for every channel, the same at every token.

    h_t = exp(Δ A) h_{t-1} + (exp(Δ A) - 1) / A · B x_t,  y_t = C · h_t + D x_t. (arXiv 2206.11893, section 3,
    zero-order hold.) Every pair of a channel and a state is a head of SSD with one column and one state.

    Args:
        x: `(batch, seqlen, channels)`.
        dt: `(channels,)` step sizes, positive.
        A: `(channels, d_state)`, negative; -1, -2, ... is the paper's initialisation S4D-Real.
        B: `(channels, d_state)`.
        C: `(channels, d_state)`.
        D: `(channels,)` skip connection.
        **options: `initial_states`, `cu_seqlens`, `chunk_size` and `impl` of `linear_attention`.

    Returns:
        `SSDOutput(y, final_states)`: y like x; states `(batch or nseq, channels * d_state, 1, 1)`.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> x, dt, B, C = torch.randn(1, 9, 3), torch.rand(3), torch.randn(3, 4), torch.randn(3, 4)
        >>> s4d_real(x, dt, -torch.arange(1.0, 5.0).repeat(3, 1), B, C).y.shape
        torch.Size([1, 9, 3])
    """
    _, _, channels = dimensions("s4d_real", "x", x, {"batch": None, "seqlen": None, "channels": None})
    _, d_state = dimensions("s4d_real", "A", A, {"channels": channels, "d_state": None})
    dimensions("s4d_real", "dt", dt, {"channels": channels})
    for name, t in (("B", B), ("C", C)):
        dimensions("s4d_real", name, t, {"channels": channels, "d_state": d_state})
    if D is not None:
        dimensions("s4d_real", "D", D, {"channels": channels})
    log_decay = dt.unsqueeze(-1) * A
    values = x.unsqueeze(-1) * (torch.expm1(log_decay) / A * B).to(x.dtype)
    values = values.flatten(-2).unsqueeze(-1)
    ones = torch.ones_like(values[:, :, :1])
    y, states = linear_attention(ones, ones, values, log_decay=log_decay.flatten().expand(values.shape[:-1]), **options)
    y = (y.view(*x.shape, d_state) * C.to(x.dtype)).sum(-1)
    return SSDOutput(y if D is None else y + D.to(x.dtype) * x, states)


def _constant(log_decay: Tensor, v: Tensor) -> Tensor:
    """`(nheads,)` for every token `(batch, seqlen, nheads)`."""
    dimensions("log_decay", "log_decay", log_decay, {"nheads": v.shape[2]})
    return log_decay.expand(v.shape[:-1])


def _running_maximum(rate: Tensor, value: Tensor, before: Tensor) -> Tensor:
    """m_t = max(m_{t-1} + rate_t, value_t) along dimension 1, m_{-1} = `before`, in log2(seqlen) passes.

    In the algebra of maxima and sums this is a scalar recurrence. Subtracting prefix sums instead would cancel.
    """
    if not value.shape[1]:
        return value
    first = torch.maximum(value[:, :1], before.unsqueeze(1) + rate[:, :1])
    value, stride = torch.cat([first, value[:, 1:]], dim=1), 1
    while stride < value.shape[1]:
        later, earlier = value[:, stride:], value[:, :-stride]
        value = torch.cat([value[:, :stride], torch.maximum(later, earlier + rate[:, stride:])], dim=1)
        rate = torch.cat([rate[:, :stride], rate[:, stride:] + rate[:, :-stride]], dim=1)
        stride *= 2
    return value
