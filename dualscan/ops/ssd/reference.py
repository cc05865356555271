"""The specification of SSD: the recurrence (section 2) and the quadratic dual (section 5) of arXiv 2405.21060.

Both compute, for every batch row and head, with a_t = exp(log_decay_t) and an input scale s_t (the paper's Δ, or 1 in
the attention face),

    H_t = a_t H_{t-1} + s_t x_t ⊗ B_t,      y_t = H_t C_t + D x_t.

They are plain differentiable PyTorch in any floating dtype; in float64 the recurrence is the oracle that everything
else is tested against. The third form of the paper, the chunked block decomposition (section 6), is `chunked.py`.

Shapes, here and in `chunked.py`: `x` (b, l, h, p); `scale`, `log_decay` (b, l, h); `B`, `C` (b, l, g, n); states (b, h,
p, n).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.varlen import sequence_spans


class Core(NamedTuple):
    """The core's tensors with a time dimension: the inputs of every form, or their gradients."""

    x: Tensor
    scale: Tensor | None
    log_decay: Tensor
    B: Tensor
    C: Tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Core":
        """Applies `fn` to each of them; an absent scale stays absent."""
        scale = None if self.scale is None else fn(self.scale)
        return Core(fn(self.x), scale, fn(self.log_decay), fn(self.B), fn(self.C))


def per_head(grouped: Tensor, nheads: int) -> Tensor:
    """Repeats (..., g, n) to (..., h, n): head `h` uses group `h // (nheads // ngroups)`."""
    return grouped.repeat_interleave(nheads // grouped.shape[-2], dim=-2)


def recurrent(
    x: Tensor, scale: Tensor | None, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token after the other: O(l) work and depth, one state in memory (equation 1, scalar-identity A).

    Returns:
        `y` (b, l, h, p) and the state after the last token (b, h, p, n).
    """
    nheads = x.shape[2]
    B, C = per_head(B, nheads), per_head(C, nheads)
    inputs = x if scale is None else x * scale.unsqueeze(-1)
    decay = log_decay.exp()
    outputs = []
    for t in range(x.shape[1]):
        state = decay[:, t, :, None, None] * state + inputs[:, t, :, :, None] * B[:, t, :, None, :]
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    return y + skip(D, x), state


def quadratic(
    x: Tensor, scale: Tensor | None, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The dual attention form Y = (L ∘ C Bᵀ) X: O(l²) work, no sequential depth (equation 16); the state is an extra
    token.

    Returns:
        `y` (b, l, h, p) and the state after the last token (b, h, p, n).
    """
    nheads = x.shape[2]
    B, C = per_head(B, nheads), per_head(C, nheads)
    inputs = x if scale is None else x * scale.unsqueeze(-1)
    decay = log_decay.transpose(1, 2)
    segments = segment_sum(decay)
    scores = torch.einsum("blhn,bshn->bhls", C, B) * segments.exp()
    from_start = decay.cumsum(-1).exp()
    y = torch.einsum("bhls,bshp->blhp", scores, inputs) + torch.einsum("bhl,blhn,bhpn->blhp", from_start, C, state)
    if x.shape[1]:
        to_end = segments[:, :, -1].exp()
        state = from_start[:, :, -1, None, None] * state + torch.einsum("bhs,bshp,bshn->bhpn", to_end, inputs, B)
    return y + skip(D, x), state


def segment_sum(log_decay: Tensor) -> Tensor:
    """(..., l) -> (..., l, l): entry (i, j) is the sum of `log_decay` over (j, i], -inf above the diagonal.

    Every column is summed by itself instead of subtracting two prefix sums: no cancellation, and a log-decay of -inf
    stays exact.
    """
    length = log_decay.shape[-1]
    ones = torch.ones(length, length, dtype=torch.bool, device=log_decay.device)
    terms = log_decay.unsqueeze(-1).expand(*log_decay.shape, length).masked_fill(~ones.tril(-1), 0)
    return terms.cumsum(-2).masked_fill(~ones.tril(), float("-inf"))


def skip(D: Tensor | None, x: Tensor) -> Tensor | float:
    """D x for D of shape (h,) or (h, p); 0 without D."""
    if D is None:
        return 0.0
    return x * (D.unsqueeze(-1) if D.ndim == 1 else D)


FORMS = {"recurrent": recurrent, "quadratic": quadratic}


def run(
    form: str, inputs: Core, D: Tensor | None, initial_states: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A form over a batch or over every packed sequence, in float32 (float64 for float64 inputs).

    Returns:
        `y` (b, l, h, p) in x's dtype and final states (b or nseq, h, p, n).
    """
    x, B = inputs.x, inputs.B
    dtype = accumulation_dtype(x.dtype)
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_states is None:
        initial_states = torch.zeros(nseq, x.shape[2], x.shape[3], B.shape[3], dtype=dtype, device=x.device)
    initial_states = initial_states.to(dtype)
    D = None if D is None else D.to(dtype)
    inputs = inputs.map(lambda t: t.to(dtype))
    if cu_seqlens is None:
        y, final_states = FORMS[form](*inputs, D, initial_states)
        return y.to(x.dtype), final_states
    ys, finals = [x[:, :0]], [initial_states[:0]]
    for i, (start, end) in enumerate(sequence_spans(cu_seqlens, x.shape[1])):
        sequence = inputs.map(lambda t, start=start, end=end: t[:, start:end])
        y, final = FORMS[form](*sequence, D, initial_states[i : i + 1])
        ys.append(y.to(x.dtype))
        finals.append(final)
    return torch.cat(ys, dim=1), torch.cat(finals)


def step(
    state: Tensor, x: Tensor, scale: Tensor | None, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence with as few passes over the state as PyTorch allows.

    Args:
        state: `(b, h, p, n)`; x: `(b, h, p)`; scale, log_decay: `(b, h)`; B, C: `(b, g, n)`; D: `(h,)` or `(h, p)`.

    Returns:
        `y` (b, h, p) in x's dtype and the next state (b, h, p, n).
    """
    batch, nheads, headdim, d_state = state.shape
    ngroups, dtype = B.shape[1], state.dtype
    inputs = x.to(dtype)
    scaled = inputs if scale is None else inputs * scale.unsqueeze(-1)
    # (b * g, heads of the group * p, n): an outer product and a matrix-vector product per group, each one pass.
    rows = (batch * ngroups, nheads // ngroups * headdim)
    decayed = (state * log_decay.exp()[:, :, None, None]).reshape(*rows, d_state)
    state = decayed.baddbmm_(scaled.reshape(*rows, 1), B.to(dtype).reshape(-1, 1, d_state))
    y = torch.bmm(state, C.to(dtype).reshape(-1, d_state, 1)).view(batch, nheads, headdim)
    if D is not None:
        y = y + skip(D.to(dtype), inputs)
    return y.to(x.dtype), state.view(batch, nheads, headdim, d_state)
