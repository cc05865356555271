"""The specification of Mamba's selective scan (S6): the recurrence of arXiv 2312.00752, algorithm 2.

For every batch row, channel c and state n, with Δ = softplus(dt + dt_bias),

    h_t[c, n] = exp(Δ_t[c] A[c, n]) h_{t-1}[c, n] + Δ_t[c] B_t[n] x_t[c],
    y_t[c] = (Σ_n C_t[n] h_t[c, n] + D[c] x_t[c]) · SiLU(z_t[c]).

It is plain differentiable PyTorch in any floating dtype; in float64 it is the oracle that everything else is tested
against. Shapes: `x`, `dt`, `z` (b, l, d); `A` (d, n); `B`, `C` (b, l, g, n); `D`, `dt_bias` (d,); states (b, d, n).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype, softplus
from dualscan.ops.varlen import sequence_spans


def step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    """Δ = softplus(dt + dt_bias) in the compute dtype."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return softplus(dt) if dt_softplus else dt


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """One token: `x`, `dt`, `z` (b, d), `B`, `C` (b, g, n).

    Returns:
        `y` (b, d) in x's dtype and the next state (b, d, n).
    """
    (batch, channels, d_state), ngroups = state.shape, B.shape[1]
    dtype = accumulation_dtype(x.dtype)
    delta, inputs = step_size(dt, dt_bias, dt_softplus, dtype), x.to(dtype)
    # (b * g, channels of the group, n): an outer product and a matrix-vector product per group, each one pass.
    rows = (batch * ngroups, channels // ngroups)
    decayed = (torch.exp(delta.unsqueeze(-1) * A.to(dtype)) * state.to(dtype)).view(*rows, d_state)
    state = decayed.baddbmm_((delta * inputs).view(*rows, 1), B.to(dtype).reshape(-1, 1, d_state))
    y = torch.bmm(state, C.to(dtype).reshape(-1, d_state, 1)).view(batch, channels)
    if D is not None:
        y = y + D.to(dtype) * inputs
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state.view(batch, channels, d_state)


def recurrent(
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
    """One token after the other, every packed sequence by itself: O(l) work and depth, one state in memory.

    Returns:
        `y` (b, l, d) in x's dtype and final states (b or nseq, d, n), float32 (float64 for float64 inputs).
    """
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulation_dtype(x.dtype)
    if initial_states is None:
        initial_states = torch.zeros(nseq, *A.shape, dtype=dtype, device=x.device)
    else:
        initial_states = initial_states.to(dtype)
    rows, finals = [], [initial_states[:0]]
    for i, (start, end) in enumerate(sequence_spans(cu_seqlens, x.shape[1])):
        state = initial_states if cu_seqlens is None else initial_states[i : i + 1]
        for t in range(start, end):
            gate = None if z is None else z[:, t]
            y, state = step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, gate, dt_bias, dt_softplus)
            rows.append(y)
        finals.append(state)
    return torch.stack(rows, dim=1) if rows else x.clone(), torch.cat(finals)
