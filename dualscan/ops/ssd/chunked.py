"""The chunked block decomposition of SSD (section 6 of arXiv 2405.21060), forward and backward: the portable fast path.

The sequence is cut into chunks of Q tokens. Inside a chunk, with cs the cumulative sum of the log-decay from the
chunk's start, s the input scale and S the state at the start,

    Y = ((C Bᵀ) ∘ exp(cs_i − cs_j) ∘ [i ≥ j]) (s X) + exp(cs_i) C S,     S' = exp(cs_Q) S + Bᵀ (exp(cs_Q − cs_j) s X).

Chunks run one after the other, so that everything between reading x and writing y stays in the processor's cache, and
the memory beyond inputs and outputs is that of one chunk. The heads of a group share B and C: the state of a group is
one (n, heads * p) matrix, so that the products with B and C are single large matrix products. Low-precision inputs are
computed in float32, chunk by chunk.

The backward pass recomputes instead of saving: it rebuilds the states at the chunk starts (temporary, one state a
chunk), then runs the chunks in reverse. The log-decay's gradient is taken from row and column sums of the masked
product and two state inner products, never from y·dy − x·dx, which cancels.
"""

import torch
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.ssd.blocks import LOWEST_LOG_DECAY, Decays, Layout, pieces
from dualscan.ops.ssd.reference import Core


def forward(
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
    """Returns `y` (b, l, h, p) in x's dtype and final states (b or nseq, h, p, n) in the compute dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # A sequence without tokens keeps its initial state.
    if initial_states is None:
        nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        finals = torch.zeros(nseq, *x.shape[2:], B.shape[3], dtype=accumulation_dtype(x.dtype), device=x.device)
    else:
        finals = initial_states.to(accumulation_dtype(x.dtype), copy=True, memory_format=torch.contiguous_format)
    inputs = Core(x, scale, log_decay, B, C)
    for piece in pieces(x, cu_seqlens):
        final = _forward_piece(inputs.map(piece.tokens), D, piece.states(initial_states), piece.tokens(y), chunk_size)
        finals[piece.rows].copy_(final)
    return y, finals


def _forward_piece(inputs: Core, D: Tensor | None, initial: Tensor | None, y: Tensor, chunk_size: int) -> Tensor:
    """Fills `y` and returns the final state (b, h, p, n)."""
    x, scale, log_decay, B, C = inputs
    layout, dtype, chunk = Layout.of(x, B), accumulation_dtype(x.dtype), min(chunk_size, x.shape[1])
    decays = Decays.build(scale, log_decay, layout, chunk, dtype)
    skip = None if D is None else layout.skip(D.to(dtype))
    # While the state is zero, nothing is read from it.
    state = None if initial is None else layout.state_in(initial, dtype, x.device)
    chunks = zip(*(t.split(chunk, dim=1) for t in (x, B, C, y)), strict=True)
    for c, (x_c, B_c, C_c, y_c) in enumerate(chunks):
        q = x_c.shape[1]
        x_c, B_c, C_c = layout.heads(x_c, dtype), layout.group(B_c, dtype), layout.group(C_c, dtype)
        weights = decays.mask(c, q).mul_(torch.bmm(C_c, B_c.mT).unsqueeze(1))
        if decays.scale is not None:
            weights.mul_(decays.scale[:, c, ..., :q])
        out = layout.head_product(weights, x_c)
        if state is not None:
            out = torch.bmm(C_c, state).view(x_c.shape).mul_(decays.from_start[:, c, :q]).add_(out)
        if skip is not None:
            out.addcmul_(x_c, skip)
        layout.write(out, y_c)
        to_end = (x_c * decays.inputs_to_end(c, q)).flatten(2)
        if state is None:
            state = torch.bmm(B_c.mT, to_end)
        else:
            state.view(layout.m, layout.n, layout.k, layout.p).mul_(decays.total[:, c])
            state.baddbmm_(B_c.mT, to_end)
    assert state is not None
    return layout.state_out(state)


def backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, log_decay, B, C, D and initial_states; an empty tensor for an argument that was None."""
    if dy is None:
        dy = torch.zeros(1, dtype=x.dtype, device=x.device).expand(x.shape)
    inputs = Core(x, scale, log_decay, B, C)
    grads = inputs.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device))
    dD = torch.zeros(x.shape[2:], dtype=accumulation_dtype(x.dtype), device=x.device)
    dinitial = x.new_empty(0)
    if initial_states is not None:
        # A sequence without tokens passes its final state's gradient on.
        dinitial = torch.zeros(initial_states.shape, dtype=initial_states.dtype, device=x.device)
        if dfinal is not None:
            dinitial.copy_(dfinal)
    for piece in pieces(x, cu_seqlens):
        dstate = _backward_piece(
            piece.tokens(dy),
            piece.states(dfinal),
            inputs.map(piece.tokens),
            D,
            piece.states(initial_states),
            grads.map(piece.tokens),
            dD,
            chunk_size,
        )
        if initial_states is not None:
            dinitial[piece.rows].copy_(dstate)
    if D is None:
        dD = x.new_empty(0)
    else:
        dD = (dD.sum(-1) if D.ndim == 1 else dD).to(D.dtype)
    dscale = x.new_empty(0) if grads.scale is None else grads.scale
    return grads.x, dscale, grads.log_decay, grads.B, grads.C, dD, dinitial


def _backward_piece(
    dy: Tensor,
    dfinal: Tensor | None,
    inputs: Core,
    D: Tensor | None,
    initial: Tensor | None,
    grads: Core,
    dD: Tensor,
    chunk_size: int,
) -> Tensor:
    """Fills `grads`, adds to `dD`, and returns the gradient (b, h, p, n) of the initial state."""
    x, scale, log_decay, B, C = inputs
    layout, dtype, chunk = Layout.of(x, B), accumulation_dtype(x.dtype), min(chunk_size, x.shape[1])
    decays = Decays.build(scale, log_decay, layout, chunk, dtype)
    skip = None if D is None else layout.skip(D.to(dtype))
    states = _chunk_states(x, B, decays, layout, chunk, layout.state_in(initial, dtype, x.device))
    # G is the gradient of the state at the end of the chunk that is worked on.
    G = layout.state_in(dfinal, dtype, x.device)
    scratch = torch.empty_like(G)
    splits = list(zip(*(t.split(chunk, dim=1) for t in (x, B, C, dy, grads.x, grads.B, grads.C)), strict=True))
    # (m, c, q, k): gradients of cs and of the scale, brought to (b, l, h) at the end in one go.
    ddA = torch.zeros(layout.m, len(splits), chunk, layout.k, dtype=torch.float64, device=x.device)
    dscale = torch.zeros(ddA.shape, dtype=dtype, device=x.device)
    for c in reversed(range(len(splits))):
        x_c, B_c, C_c, dy_c, dx_c, dB_c, dC_c = splits[c]
        q, S = x_c.shape[1], states.pop()
        B_c, C_c = layout.group(B_c, dtype), layout.group(C_c, dtype)
        x_c, dy_c = layout.heads(x_c, dtype), layout.heads(dy_c, dtype)
        xs = x_c if scale is None else x_c * decays.token_scale(c, q)
        L = decays.mask(c, q)
        CB = torch.bmm(C_c, B_c.mT)
        # Inside the chunk: y_i = Σ_j (CB ∘ L)_ij xs_j.
        dL = layout.head_outer(dy_c, xs).mul_(L)
        dCB = dL.sum(1)
        pairs = dL.mul_(CB.unsqueeze(1))
        dcs = (pairs.sum(-1, dtype=torch.float64) - pairs.sum(-2, dtype=torch.float64)).transpose(1, 2)
        inside = layout.head_product(L.mul_(CB.unsqueeze(1)).mT, dy_c)
        # Into the state at the end: S' = exp(cs_Q) S + Bᵀ (exp(cs_Q − cs_j) xs).
        to_end, total = decays.to_end[:, c, :q], decays.total[:, c]
        dxs = torch.bmm(B_c, G).view(x_c.shape).mul_(to_end)
        through_state = (xs * dxs).sum(-1).double()
        kept = torch.mul(S, G, out=scratch).view(layout.m, layout.n, layout.k, layout.p).sum(1).sum(-1)
        dcs = dcs - through_state
        dcs[:, -1] += through_state.sum(1) + total[:, 0, :, 0] * kept
        dxs.add_(inside)
        dB_g = torch.bmm((xs * to_end).flatten(2), G.mT).baddbmm_(dCB.mT, C_c)
        # Out of the state at the start: y_i += exp(cs_i) C_i S.
        dy_start = dy_c * decays.from_start[:, c, :q]
        dcs += torch.bmm(C_c, S).view(x_c.shape).mul_(dy_start).sum(-1)
        dC_g = torch.bmm(dy_start.flatten(2), S.mT).baddbmm_(dCB, B_c)
        G.view(layout.m, layout.n, layout.k, layout.p).mul_(total)
        G.baddbmm_(C_c.mT, dy_start.flatten(2))
        # cs_t is a prefix sum, so the log-decay's gradient is the suffix sum of cs's.
        ddA[:, c, :q] = dcs.flip(1).cumsum(1).flip(1)
        if scale is not None:
            dscale[:, c, :q] = (dxs * x_c).sum(-1)
            dxs.mul_(decays.token_scale(c, q))
        if skip is not None:
            dD += layout.per_head((dy_c * x_c).sum(1))
            dxs.addcmul_(dy_c, skip)
        layout.write(dxs, dx_c)
        layout.write(dB_g, dB_c)
        layout.write(dC_g, dC_c)
    reset = log_decay < LOWEST_LOG_DECAY
    grads.log_decay.copy_(layout.per_token(ddA, x.shape[1]).masked_fill(reset, 0.0))
    if grads.scale is not None:
        grads.scale.copy_(layout.per_token(dscale, x.shape[1]))
    return layout.state_out(G)


def _chunk_states(x: Tensor, B: Tensor, decays: Decays, layout: Layout, chunk: int, state: Tensor) -> list[Tensor]:
    """The state at the start of every chunk, each (m, n, k * p)."""
    states = []
    for c, (x_c, B_c) in enumerate(zip(x.split(chunk, dim=1), B.split(chunk, dim=1), strict=True)):
        states.append(state)
        to_end = (layout.heads(x_c, state.dtype) * decays.inputs_to_end(c, x_c.shape[1])).flatten(2)
        state = layout.decay_state(state, decays.total[:, c]).baddbmm_(layout.group(B_c, state.dtype).mT, to_end)
    return states
