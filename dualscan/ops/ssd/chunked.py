"""The chunked block decomposition of SSD (section 6 of arXiv 2405.21060), forward and backward: the portable fast path.

The sequence is cut into chunks of Q tokens. Inside a chunk, with cs the cumulative sum of the log-decay from the
chunk's start and S the state at its start,

    Y = ((C Bᵀ) ∘ exp(cs_i − cs_j) ∘ [i ≥ j]) (s X)  +  exp(cs_i) C S,        S' = exp(cs_Q) S + Bᵀ (exp(cs_Q − cs_j) s
    X).

Chunks run one after the other, so that everything between reading x and writing y stays in the processor's cache, and
the memory beyond inputs and outputs is that of one chunk. The heads of a group share B and C: the state of a group is
kept as one (n, heads * p) matrix, so that the products with B and C are single large matrix products. Low-precision
inputs are computed in float32, chunk by chunk.

The backward pass recomputes instead of saving: it rebuilds the states at the chunk starts (one (n, heads * p) matrix a
chunk, temporary), then runs the chunks in reverse. The log-decay's gradient is taken from row and column sums of the
masked product and two state inner products, never from y·dy − x·dx, which cancels.

`m` below is batch rows x groups, `k` the heads of one group; `q` the tokens of a chunk.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.ops.varlen import common_length, sequence_spans

DEFAULT_CHUNK_SIZE = 64
# exp of this is exactly 0 in float64, so a log-decay clamped here still resets the state exactly, and sums of it stay
# precise.
LOWEST_LOG_DECAY = -1000.0
# Beyond this magnitude (in powers of two) float32 differences of prefix sums lose too many bits; they are then taken in
# float64.
WIDE_RANGE = 256.0
# Powers of two below this become exactly 0: a matrix product with subnormal numbers in it is over 100 times slower on a
# CPU.
SMALLEST_EXPONENT = {torch.float32: -100.0, torch.float64: -960.0}
# Batch rows computed together: as many as keep a chunk's working set in the second-level cache.
CHUNK_ELEMENTS = 2**17


@dataclass(frozen=True, slots=True)
class Decays:
    """What the log-decays of one call give, for every chunk; leading dimensions (m, nchunks).

    Sums are kept in powers of two: exp2 takes the same time for every argument, exp is up to 200 times slower where it
    underflows.
    """

    sums: Tensor  # (m, c, k, q) cs * log2(e), float64 where the range is wide
    scale: Tensor | None  # (m, c, k, 1, q)
    from_start: Tensor  # (m, c, q, k, 1) exp(cs_i)
    to_end: Tensor  # (m, c, q, k, 1) exp(cs_Q - cs_j)
    total: Tensor  # (m, c, 1, k, 1) exp(cs_Q)

    @classmethod
    def build(cls, scale: Tensor | None, log_decay: Tensor, ngroups: int, chunk: int) -> "Decays":
        dtype = log_decay.dtype
        pad = -log_decay.shape[1] % chunk

        def by_chunk(t: Tensor) -> Tensor:  # (b, l, h) -> (m, c, k, q)
            t = F.pad(t, (0, 0, 0, pad)).unflatten(2, (ngroups, -1)).permute(0, 2, 3, 1)
            return t.flatten(0, 1).unflatten(-1, (-1, chunk)).transpose(1, 2)

        sums = by_chunk(log_decay.clamp(min=LOWEST_LOG_DECAY).double() * math.log2(math.e)).cumsum(-1)
        last = sums[..., -1:]
        columns = (0, 1, 3, 2)
        wide = sums.device.type != "cpu" or bool(sums.numel() and sums.amin() < -WIDE_RANGE)
        return cls(
            sums=sums if wide or dtype == torch.float64 else sums.to(dtype),
            scale=None if scale is None else by_chunk(scale).unsqueeze(-2),
            from_start=_power(sums.to(dtype, copy=True)).permute(columns).unsqueeze(-1),
            to_end=_power((last - sums).to(dtype)).permute(columns).unsqueeze(-1),
            total=_power(last.to(dtype, copy=True)).unsqueeze(2),
        )

    def mask(self, c: int, q: int, upper: Tensor, dtype: torch.dtype) -> Tensor:
        """L of chunk `c`: (m, k, q, q), exp(cs_i - cs_j) on and below the diagonal, 0 above (masked before exp: no
        overflow)."""
        sums = self.sums[:, c, :, :q]
        return _power((sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(dtype).add_(upper[:q, :q]))

    def inputs_to_end(self, c: int, q: int) -> Tensor:
        """exp(cs_Q - cs_j) s_j of chunk `c`: (m, q, k, 1)."""
        to_end = self.to_end[:, c, :q]
        return to_end if self.scale is None else to_end * self.token_scale(c, q)

    def token_scale(self, c: int, q: int) -> Tensor:
        """s_j of chunk `c`: (m, q, k, 1)."""
        assert self.scale is not None
        return self.scale[:, c, :, 0, :q].transpose(1, 2).unsqueeze(-1)


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
    dtype = compute_dtype(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # A sequence without tokens keeps its initial state.
    if initial_states is None:
        nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        finals = torch.zeros(nseq, *x.shape[2:], B.shape[3], dtype=dtype, device=x.device)
    else:
        finals = initial_states.to(dtype, copy=True)
    for piece in _pieces(x, cu_seqlens):
        state = None if initial_states is None else piece.states(initial_states).to(dtype)
        args = [piece.tokens(t) for t in (x, scale, log_decay, B, C)]
        final = _forward_piece(*args, D, state, piece.tokens(y), chunk_size)
        piece.states(finals).copy_(final)
    return y, finals


def _forward_piece(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    y: Tensor,
    chunk_size: int,
) -> Tensor:
    """Fills `y` and returns the final state (b, h, p, n) of rows that are computed together."""
    shape = _Shape.of(x, B)
    dtype, chunk = compute_dtype(x), min(chunk_size, x.shape[1])
    decays = Decays.build(None if scale is None else scale.to(dtype), log_decay.to(dtype), shape.ngroups, chunk)
    upper = _upper(chunk, dtype, x.device)
    skip = None if D is None else shape.skip(D.to(dtype))
    state = None if initial is None else shape.group_state(initial)
    chunks = zip(*(t.split(chunk, dim=1) for t in (x, B, C, y)), strict=True)
    for c, (x_c, B_c, C_c, y_c) in enumerate(chunks):
        q = x_c.shape[1]
        x_c, B_c, C_c = shape.by_group(x_c, dtype), shape.by_group(B_c, dtype), shape.by_group(C_c, dtype)
        x_c = x_c.view(*x_c.shape[:2], shape.k, -1)
        scores = decays.mask(c, q, upper, dtype).mul_(torch.bmm(C_c, B_c.mT).unsqueeze(1))
        if decays.scale is not None:
            scores.mul_(decays.scale[:, c, ..., :q])
        out = shape.head_product(scores, x_c)
        if state is not None:
            carried = torch.bmm(C_c, state).view(x_c.shape).mul_(decays.from_start[:, c, :q])
            out = carried.add_(out)
        if skip is not None:
            out = out.addcmul(x_c, skip)
        shape.write(out, y_c)
        inputs = (x_c * decays.inputs_to_end(c, q)).view(*x_c.shape[:2], -1)
        state = _advance(state, decays.total[:, c], B_c, inputs)
    if state is None:
        state = torch.zeros(shape.m, shape.n, shape.k * shape.p, dtype=dtype, device=x.device)
    return shape.ungroup_state(state)


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
    dtype = compute_dtype(x)
    if dy is None:
        dy = torch.zeros(1, dtype=x.dtype, device=x.device).expand(x.shape)
    dx, ddA, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (x, log_decay, B, C))
    absent = x.new_empty(0)
    dscale = absent if scale is None else torch.empty(scale.shape, dtype=scale.dtype, device=x.device)
    dD = absent if D is None else torch.zeros(x.shape[2:], dtype=dtype, device=x.device)
    dinitial = absent
    if initial_states is not None:
        dinitial = torch.zeros_like(initial_states) if dfinal is None else dfinal.to(initial_states.dtype, copy=True)
    for piece in _pieces(x, cu_seqlens):
        state = None if initial_states is None else piece.states(initial_states).to(dtype)
        dstate = None if dfinal is None else piece.states(dfinal).to(dtype)
        tensors = [piece.tokens(t) for t in (x, scale, log_decay, B, C)]
        grads = [piece.tokens(t) for t in (dx, dscale if scale is not None else None, ddA, dB, dC)]
        dstate = _backward_piece(piece.tokens(dy), dstate, *tensors, D, state, *grads, dD, chunk_size)
        if initial_states is not None:
            piece.states(dinitial).copy_(dstate)
    if D is not None:
        dD = (dD.sum(-1) if D.ndim == 1 else dD).to(D.dtype)
    return dx, dscale, ddA, dB, dC, dD, dinitial


def _backward_piece(
    dy: Tensor,
    dstate: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    dx: Tensor,
    dscale: Tensor | None,
    ddA: Tensor,
    dB: Tensor,
    dC: Tensor,
    dD: Tensor,
    chunk_size: int,
) -> Tensor:
    """Fills dx, dscale, ddA, dB, dC; adds to dD; returns the gradient (b, h, p, n) of the initial state."""
    shape = _Shape.of(x, B)
    dtype, chunk = compute_dtype(x), min(chunk_size, x.shape[1])
    decays = Decays.build(None if scale is None else scale.to(dtype), log_decay.to(dtype), shape.ngroups, chunk)
    upper = _upper(chunk, dtype, x.device)
    skip = None if D is None else shape.skip(D.to(dtype))
    zeros = torch.zeros(shape.m, shape.n, shape.k * shape.p, dtype=dtype, device=x.device)
    G = zeros if dstate is None else shape.group_state(dstate)
    states = _chunk_states(x, B, decays, shape, chunk, zeros if initial is None else shape.group_state(initial))
    splits = list(zip(*(t.split(chunk, dim=1) for t in (x, B, C, dy, dx, dB, dC)), strict=True))
    # (m, c, q, k): gradients of cs and of the scale, brought to (b, l, h) at the end in one go.
    dsums = torch.zeros(shape.m, len(splits), chunk, shape.k, dtype=torch.float64, device=x.device)
    dscales = torch.zeros(dsums.shape, dtype=dtype, device=x.device)
    for c in reversed(range(len(splits))):
        x_c, B_c, C_c, dy_c, dx_c, dB_c, dC_c = splits[c]
        q, S = x_c.shape[1], states[c]
        B_c, C_c = shape.by_group(B_c, dtype), shape.by_group(C_c, dtype)
        x_c, dy_c = shape.by_group(x_c, dtype), shape.by_group(dy_c, dtype)
        heads = (*x_c.shape[:2], shape.k, shape.p)
        x_c, dy_c = x_c.view(heads), dy_c.view(heads)
        xs = x_c if scale is None else x_c * decays.token_scale(c, q)
        L = decays.mask(c, q, upper, dtype)
        CB = torch.bmm(C_c, B_c.mT)
        # Inside the chunk: y_i = Σ_j (CB ∘ L)_ij xs_j.
        dL = shape.head_outer(dy_c, xs).mul_(L)
        dCB = dL.sum(1)
        pair = dL.mul_(CB.unsqueeze(1))
        inside = shape.head_product(L.mul_(CB.unsqueeze(1)).mT, dy_c)
        dsum = pair.sum(-1, dtype=torch.float64) - pair.sum(-2, dtype=torch.float64)
        # Through the state at the chunk's end: S' = exp(cs_Q) S + Bᵀ (exp(cs_Q − cs_j) xs).
        to_end, total = decays.to_end[:, c, :q], decays.total[:, c]
        later = torch.bmm(B_c, G).view(heads).mul_(to_end)
        inner = (xs * later).sum(-1, dtype=torch.float64)
        dsum = dsum.transpose(1, 2) - inner
        carried_over = (S * G).view(shape.m, shape.n, shape.k, shape.p).sum((1, 3), dtype=torch.float64)
        dsum[:, -1] += inner.sum(1) + total[:, 0, :, 0] * carried_over
        dxs = later.add_(inside)
        flat = (*x_c.shape[:2], -1)
        dB_g = torch.bmm((xs * to_end).view(flat), G.mT).baddbmm_(dCB.mT, C_c)
        # From the state at the chunk's start: y_i += exp(cs_i) C_i S.
        dy_start = dy_c * decays.from_start[:, c, :q]
        dsum += (torch.bmm(C_c, S).view(heads).mul_(dy_start)).sum(-1, dtype=torch.float64)
        dC_g = torch.bmm(dy_start.view(flat), S.mT).baddbmm_(dCB, B_c)
        G = (G.view(shape.m, shape.n, shape.k, shape.p) * total.unsqueeze(1)[:, 0]).view(G.shape)
        G = G.baddbmm_(C_c.mT, dy_start.view(flat))
        # cs_t is a prefix sum, so the log-decay's gradient is the suffix sum of cs's.
        dsums[:, c, :q] = dsum.flip(1).cumsum(1).flip(1)
        if scale is not None:
            dscales[:, c, :q] = (dxs * x_c).sum(-1)
            dxs.mul_(decays.token_scale(c, q))
        if skip is not None:
            dD += shape.per_head((dy_c * x_c).sum(1))
            dxs.addcmul_(dy_c, skip)
        shape.write(dxs, dx_c)
        shape.write(dB_g, dB_c)
        shape.write(dC_g, dC_c)
    clamped = log_decay < LOWEST_LOG_DECAY
    ddA.copy_(shape.per_token(dsums, x.shape[1]).masked_fill(clamped, 0.0))
    if dscale is not None:
        dscale.copy_(shape.per_token(dscales, x.shape[1]))
    return shape.ungroup_state(G)


def _chunk_states(x: Tensor, B: Tensor, decays: Decays, shape: "_Shape", chunk: int, state: Tensor) -> list[Tensor]:
    """The state at the start of every chunk, each (m, n, k * p)."""
    states = []
    for c, (x_c, B_c) in enumerate(zip(x.split(chunk, dim=1), B.split(chunk, dim=1), strict=True)):
        states.append(state)
        x_c = shape.by_group(x_c, state.dtype)
        heads = x_c.view(*x_c.shape[:2], shape.k, shape.p)
        inputs = (heads * decays.inputs_to_end(c, x_c.shape[1])).view(x_c.shape)
        decayed = (state.view(shape.m, shape.n, shape.k, shape.p) * decays.total[:, c].unsqueeze(1)[:, 0]).view(
            state.shape
        )
        state = decayed.baddbmm_(shape.by_group(B_c, state.dtype).mT, inputs)
    return states


def _advance(state: Tensor | None, total: Tensor, B: Tensor, inputs: Tensor) -> Tensor:
    """exp(cs_Q) S + Bᵀ inputs, in place on a state that the caller owns; None is the zero state."""
    if state is None:
        return torch.bmm(B.mT, inputs)
    state.view(*state.shape[:2], total.shape[2], -1).mul_(total)
    return state.baddbmm_(B.mT, inputs)


@dataclass(frozen=True, slots=True)
class _Shape:
    """The two layouts: the caller's (b, l, h, p) and (b, l, g, n), and one row per (batch row, group) inside."""

    batch: int
    ngroups: int
    k: int
    p: int
    n: int

    @classmethod
    def of(cls, x: Tensor, B: Tensor) -> "_Shape":
        return cls(x.shape[0], B.shape[2], x.shape[2] // B.shape[2], x.shape[3], B.shape[3])

    @property
    def m(self) -> int:
        return self.batch * self.ngroups

    def by_group(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(b, q, g * k, w) -> (m, q, k * w): a view for one group of a head-contiguous input, else one copy."""
        t = t.to(dtype).flatten(2).unflatten(2, (self.ngroups, -1)).transpose(1, 2)
        return t.reshape(self.m, t.shape[2], t.shape[3]) if self.ngroups > 1 else t.squeeze(1)

    def write(self, grouped: Tensor, out: Tensor) -> None:
        """(m, q, k, p) or (m, q, n) into a slice (b, q, h, p) or (b, q, g, n) of a result."""
        grouped = grouped.view(self.batch, self.ngroups, *grouped.shape[1:]).transpose(1, 2)
        out.view(grouped.shape).copy_(grouped)

    def per_token(self, t: Tensor, length: int) -> Tensor:
        """(m, c, q, k) -> (b, l, h), the padding of the last chunk dropped."""
        t = t.view(self.batch, self.ngroups, -1, self.k)[:, :, :length]
        return t.transpose(1, 2).reshape(self.batch, length, -1)

    def per_head(self, t: Tensor) -> Tensor:
        """(m, k, p) summed over the batch -> (h, p)."""
        return t.view(self.batch, -1, self.p).sum(0)

    def skip(self, D: Tensor) -> Tensor:
        """D of (h,) or (h, p) -> (m, 1, k, 1 or p)."""
        return D.view(1, self.ngroups, self.k, -1).expand(self.batch, -1, -1, -1).reshape(self.m, 1, self.k, -1)

    def group_state(self, state: Tensor) -> Tensor:
        """(b, h, p, n) -> (m, n, k * p), a fresh tensor."""
        return (
            state.reshape(self.m, self.k * self.p, self.n).transpose(1, 2).clone(memory_format=torch.contiguous_format)
        )

    def ungroup_state(self, state: Tensor) -> Tensor:
        """(m, n, k * p) -> (b, h, p, n)."""
        return state.transpose(1, 2).reshape(self.batch, self.ngroups * self.k, self.p, self.n)

    def head_product(self, weights: Tensor, values: Tensor) -> Tensor:
        """Per head (q, q) @ (q, p): weights (m, k, q, q), values (m, q, k, p) -> (m, q, k, p)."""
        q = values.shape[1]
        out = torch.bmm(weights.reshape(-1, q, q), values.transpose(1, 2).reshape(-1, q, self.p))
        return out.view(self.m, self.k, q, self.p).transpose(1, 2)

    def head_outer(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Per head (q, p) @ (p, q): both (m, q, k, p) -> (m, k, q, q)."""
        q = rows.shape[1]
        rows, columns = (t.transpose(1, 2).reshape(-1, q, self.p) for t in (rows, columns))
        return torch.bmm(rows, columns.mT).view(self.m, self.k, q, q)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows that are computed together: a block of a batch, one packed sequence, or a pack of equal lengths seen as a
    batch."""

    rows: slice
    span: slice | None = None
    nseq: int | None = None

    def tokens(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        if self.nseq is not None:
            return (
                t.view(self.nseq, -1, *t.shape[2:])[self.rows]
                if t.is_contiguous()
                else t[0].unflatten(0, (self.nseq, -1))[self.rows]
            )
        return t[self.rows] if self.span is None else t[:, self.span]

    def states(self, t: Tensor) -> Tensor:
        return t[self.rows]


def _pieces(x: Tensor, cu_seqlens: Tensor | None) -> Iterator[_Piece]:
    """Cuts a call into pieces whose chunks fit the cache."""
    if x.numel() == 0:
        return
    spans = None if cu_seqlens is None else sequence_spans(cu_seqlens, x.shape[1])
    length = x.shape[1] if spans is None else common_length(spans)
    if spans is not None and not length:
        for i, (start, end) in enumerate(spans):
            if end > start:
                yield _Piece(slice(i, i + 1), slice(start, end))
        return
    nrows = x.shape[0] if spans is None else len(spans)
    tokens = min(DEFAULT_CHUNK_SIZE, max(length or 1, 1))
    block = max(1, CHUNK_ELEMENTS // max(1, tokens * x.shape[2] * x.shape[3])) if x.device.type == "cpu" else nrows
    for row in range(0, nrows, block):
        yield _Piece(slice(row, min(row + block, nrows)), nseq=None if spans is None else nrows)


def _power(exponents: Tensor) -> Tensor:
    """2 to the exponents, in place; exactly 0 where the result would be tiny."""
    return F.threshold_(exponents, SMALLEST_EXPONENT[exponents.dtype], float("-inf")).exp2_()


def _upper(chunk: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(q, q): 0 on and below the diagonal, -inf above."""
    return torch.full((chunk, chunk), float("-inf"), dtype=dtype, device=device).triu_(1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32 accumulates everything; float64 inputs stay float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
