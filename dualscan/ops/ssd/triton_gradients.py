"""The chunk-parallel kernels of the SSD backward: dB, dC and everything that goes to the step size and the decay.

For one chunk, with the notation of `triton_scan` and sums over the heads of a group,

    dC = Σ exp(cs) dY Sᵀ + (Σ W s_j) B,              W  = (dY Xᵀ) ∘ L
    dB = Σ s exp(cs_Q - cs) X Gᵀ + (Σ Wᵀ s_j) C,     Wᵀ = (X dYᵀ) ∘ Lᵀ

which are one formula with the roles of the scan's two directions: one kernel, launched twice. Its row sums give

    r_i  = Σ_j (W ∘ C Bᵀ)_ij s_j + f_i,     f_i = exp(cs_i) dy_i · S C_i          (what token i reads)
    ds_j = Σ_i (W ∘ C Bᵀ)_ij     + g_j,    g_j = exp(cs_Q - cs_j) x_j · G B_j    (the input scale's gradient)

and the log-decay's gradient at token t of the chunk is

    Σ_{i ≥ t} (r_i - s_i (ds_i - g_i)) + Σ_{j < t} s_j g_j + exp(cs_Q) <S, G>:

what is read from before t, what is written before t and survives the chunk, and what passes through it. Both sides take
W from the same float32 products, so that what must cancel in the suffix sum cancels, and leave out its diagonal, where
nothing decays. The shorter y · dy - x · dx of stored low-precision tensors would lose it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops.ssd import configs
from dualscan.ops.ssd.hopper import triton_gradients_hopper, triton_scan_hopper
from dualscan.ops.ssd.triton_scan import LOWEST, RESIDENT, Call, arranged, load_tile, step_size

# Programs a multiprocessor that Hopper's gradient kernel is cut into at least: a wave of long ones ends raggedly. Each
# has sums of its own, so that there are fewer where memory is to be saved.
WAVES, FEW_WAVES = 12, 6
# Most registers of a thread of that kernel: three programs a multiprocessor.
GRADIENT_REGISTERS = 168


@triton.jit
def gradient_kernel(
    value, other, query, key, state, out, rows_out, inner_out, products, overlaps, dD, scale, sums, chunks,
    value_b, value_l, value_h, other_b, other_l, other_h, query_b, query_l, query_h, key_b, key_l, key_h,
    out_part, out_b, out_l, out_h, nheads, heads_per_group, heads_per_program, headdim, d_state, padded,
    Q: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, P: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, ADD: tl.constexpr, REVERSE: tl.constexpr, ACROSS: tl.constexpr, VECTOR_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one chunk, `heads_per_program` heads of one group, N of the NT state columns.

    Grid `(chunks, groups * parts, NT // N)`. dC from dY, X, C, B, S; with REVERSE dB from X, dY, B, C, G. ADD adds to
    what is there. `rows_out` gets the row sums of (W ∘ C Bᵀ)_ij s_j; with ACROSS, at token t, its sum over j < t <= i,
    which is what the suffix sums would make of them, without a difference. Sums over parts are left to the caller;
    those over the blocks of columns in `rows_out` and `inner_out` (block, head, token) to `decay_gradient_kernel`.
    """
    c, part_lane, n_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = heads_per_group // heads_per_program
    group, part = part_lane // parts, part_lane % parts
    batch = tl.load(chunks + c * 3)
    row = tl.load(chunks + c * 3 + 1)
    end = tl.load(chunks + c * 3 + 2)
    if row >= end:
        return
    q, n, p = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, P)
    n_first = n_block * N
    u = load_tile(query, batch, group, row, end, n_first, query_b, query_l, query_h, d_state, Q, N, TMA)
    k = load_tile(key, batch, group, row, end, n_first, key_b, key_l, key_h, d_state, Q, N, TMA)
    weights = tl.dot(u, tl.trans(k), input_precision=PRECISION)
    # What a token writes and reads itself has no decay: left out of the sums that the decay's gradient is made of.
    diagonal = q[:, None] == q[None, :]
    if not REVERSE:
        slot = (n_block * tl.cdiv(nheads, heads_per_group) + group).to(tl.int64) * padded + c * Q + q
        overlap = tl.sum(tl.where(diagonal, weights, 0.0), 1)
        tl.store(overlaps + slot, overlap, mask=(q >= 0) & (part == 0))
    weights = tl.where(diagonal, 0.0, weights)
    total = tl.zeros([Q, N], tl.float32)
    dweights = tl.zeros([Q, Q], tl.float32)
    first_head = group * heads_per_group + part * heads_per_program
    for i in tl.range(0, heads_per_program * BLOCKS, num_stages=STAGES):
        h = first_head + i // BLOCKS
        block = i % BLOCKS
        column = block * P
        v = load_tile(value, batch, h, row, end, column, value_b, value_l, value_h, headdim, Q, P, TMA)
        o = load_tile(other, batch, h, row, end, column, other_b, other_l, other_h, headdim, Q, P, TMA)
        if TMA:
            S = state.load([(c * nheads + h) * NT + n_first, column])
        else:
            entry = ((c.to(tl.int64) * nheads + h) * NT + n_first) * (BLOCKS * P) + column
            S = tl.load(state + entry + n[:, None] * (BLOCKS * P) + p[None, :])
        place = h.to(tl.int64) * padded + c * Q
        s = tl.load(scale + place + q)
        cs = tl.load(sums + place + q)
        last = tl.load(sums + place + Q - 1)
        # Inside the chunk.
        inside = tl.dot(v, tl.trans(o), input_precision=PRECISION)
        if not REVERSE:
            product = tl.sum(tl.where(diagonal, inside, 0.0), 1)
            slot = (block * nheads + h).to(tl.int64) * padded + c * Q + q
            tl.store(products + slot, product, mask=(q >= 0) & (n_block == 0))
        if REVERSE:
            share = tl.exp2((last - cs).to(tl.float32))
            gap = tl.where(q[:, None] <= q[None, :], cs[None, :] - cs[:, None], float("-inf"))
            inside *= tl.exp2(gap.to(tl.float32))
            pairs = tl.sum(inside * weights, 1)
            dweights += inside * s[:, None]
        else:
            share = tl.exp2(cs.to(tl.float32))
            gap = tl.where(q[:, None] >= q[None, :], cs[:, None] - cs[None, :], float("-inf"))
            inside *= tl.exp2(gap.to(tl.float32)) * s[None, :]
            pairs = tl.sum(inside * weights, 1)
            dweights += inside
        # Out of the state at the chunk's start; with REVERSE into the state at its end.
        inner = tl.sum(tl.dot(u, S, input_precision=PRECISION) * v, 1) * share
        weight = share * s if REVERSE else share
        total = tl.dot((v * weight[:, None]).to(v.dtype), tl.trans(S), total, input_precision=PRECISION)
        slot = ((n_block * BLOCKS + block) * nheads + h).to(tl.int64) * padded + c * Q + q
        if ACROSS and not REVERSE:
            before = tl.cumsum(inside * weights, 1)
            across = tl.sum(tl.where(q[:, None] > q[None, :], before, 0.0), 0)
            # Of token t the sum that ends at t - 1; the last one is zero, as the first token's is.
            tl.store(rows_out + slot - q + (q + 1) % Q, across)
        else:
            tl.store(rows_out + slot, pairs)
        tl.store(inner_out + slot, inner)
        if VECTOR_D:
            product = tl.sum(v.to(tl.float32) * o.to(tl.float32), 0)
            place = (c.to(tl.int64) * nheads + h) * (BLOCKS * P) + column + p
            tl.store(dD + place, product, mask=(p >= 0) & (n_block == 0))
    high = dweights.to(k.dtype)
    total = tl.dot(high, k, total, input_precision=PRECISION)
    if k.dtype != tl.float32:
        # The rounding of the sum over heads: once a program, it costs nothing to keep.
        total = tl.dot((dweights - high.to(tl.float32)).to(k.dtype), k, total, input_precision=PRECISION)
    place = part.to(tl.int64) * out_part + batch.to(tl.int64) * out_b + group * out_h + row.to(tl.int64) * out_l
    place = out + place + q[:, None] * out_l + n_first + n[None, :]
    within = (row + q < end)[:, None] & (n_first + n < d_state)[None, :]
    if ADD:
        total += tl.load(place, mask=within, other=0.0)
    tl.store(place, total.to(out.dtype.element_ty), mask=within)


@triton.jit
def decay_gradient_kernel(
    reads, dscale, from_state, into_state, products, overlaps, kept, scale, sums, dt, decay, bias, ddt, ddecay, dA,
    dbias, dD, supers, nheads, heads_per_group, padded, low, high, dt_b, dt_l, dt_h, decay_b, decay_l, decay_h, out_b,
    out_l,
    Q: tl.constexpr, EVERY: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr, STATES: tl.constexpr, OVERLAPS: tl.constexpr, ACROSS: tl.constexpr, HAS_DT: tl.constexpr,
    PER_TOKEN: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
    SCALAR_D: tl.constexpr,
):  # fmt: skip
    """From the gradients of scale and sums to those of dt and the decay: `decay_kernel`, backward.

    One super-chunk a program. dt's gradient and a log-decay's are written per token; A's, the bias's and a scalar D's
    as one sum a super-chunk `(super-chunks, nheads)`. `reads` and `dscale` come in PAIRS pieces for each of the EVERY
    chunks that a token reads from, or writes to; `from_state` and `into_state` in STATES, `overlaps` in OVERLAPS
    pieces. ACROSS is `gradient_kernel`'s.
    """
    T: tl.constexpr = Q * EVERY
    u = tl.program_id(0)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, T)
    batch = tl.load(supers + u * 4).to(tl.int64)
    first = tl.load(supers + u * 4 + 1)
    end = tl.load(supers + u * 4 + 2)
    first_chunk = tl.load(supers + u * 4 + 3)
    rows = first.to(tl.int64) + q
    known = heads < nheads
    inside = (rows < end)[:, None] & known[None, :]
    own = (q // Q)[:, None]
    lanes = heads.to(tl.int64)[None, :] * padded + first_chunk * Q + q[:, None]
    stride = nheads * padded.to(tl.int64)
    ds = tl.zeros([T, HEADS], tl.float32)
    read = tl.zeros([T, HEADS], tl.float32)
    out_of = tl.zeros([T, HEADS], tl.float32)
    into = tl.zeros([T, HEADS], tl.float32)
    for other in tl.static_range(EVERY):
        earlier = inside & (own >= other)
        later = inside & (own <= other) & (first + other * Q < end)
        for piece in tl.static_range(PAIRS):
            place = lanes + (other * PAIRS + piece) * stride
            read += tl.load(reads + place, mask=earlier, other=0.0)
            ds += tl.load(dscale + place, mask=later, other=0.0)
    for piece in tl.static_range(STATES):
        out_of += tl.load(from_state + lanes + piece * stride, mask=inside, other=0.0)
        into += tl.load(into_state + lanes + piece * stride, mask=inside, other=0.0)
    s = tl.load(scale + lanes, mask=inside, other=0.0)
    last = tl.zeros([HEADS], sums.dtype.element_ty)
    for chunk in tl.static_range(EVERY):
        place = heads.to(tl.int64) * padded + (first_chunk + chunk) * Q + Q - 1
        last += tl.load(sums + place, mask=known & (first + chunk * Q < end), other=0.0)
    tail = tl.zeros([HEADS], tl.float32)
    for block in tl.static_range(BLOCKS):
        entries = ((u * nheads + heads).to(tl.int64)[:, None] * BLOCKS + block) * N + tl.arange(0, N)[None, :]
        tail += tl.sum(tl.load(kept + entries, mask=(known & (first < end))[:, None], other=0.0), 1)
    tail *= tl.exp2(last.to(tl.float32))
    product = tl.zeros([T, HEADS], tl.float32)
    overlap = tl.zeros([T, HEADS], tl.float32)
    for block in tl.static_range(BLOCKS):
        product += tl.load(products + lanes + block * stride, mask=inside, other=0.0)
    for block in tl.static_range(OVERLAPS):
        group = block * tl.cdiv(nheads, heads_per_group) + heads // heads_per_group
        place = group.to(tl.int64)[None, :] * padded + first_chunk * Q + q[:, None]
        overlap += tl.load(overlaps + place, mask=inside, other=0.0)
    if SCALAR_D:
        tl.store(dD + u * nheads + heads, tl.sum(product, 0), mask=known)
    # What the tokens before this one wrote into the state at the end. Loaded one token late, rather than taken from a
    # sum with this one's own: where a head decays fast that is larger by all the digits there are.
    before = inside & (q > 0)[:, None]
    written = tl.zeros([T, HEADS], tl.float32)
    for piece in tl.static_range(STATES):
        written += tl.load(into_state + lanes + piece * stride - 1, mask=before, other=0.0)
    written *= tl.load(scale + lanes - 1, mask=before, other=0.0)
    if ACROSS:
        dlog = read + tl.cumsum(out_of, 0, reverse=True)
    else:
        dlog = tl.cumsum(read + out_of - s * ds, 0, reverse=True)
    dlog += tl.cumsum(written, 0) + tail[None, :]
    ds += into
    ds += product * overlap
    if HAS_DT:
        raw = tl.load(dt + batch * dt_b + rows[:, None] * dt_l + heads[None, :] * dt_h, mask=inside, other=0.0)
        shift = tl.zeros([HEADS], tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias + heads, mask=known, other=0.0).to(tl.float32)
        value, free = step_size(raw.to(tl.float32), shift[None, :], low, high, SOFTPLUS, CLAMP)
    if PER_TOKEN:
        per_token = batch * decay_b + rows[:, None] * decay_l + heads[None, :] * decay_h
        log_decay = tl.load(decay + per_token, mask=inside, other=0.0).to(tl.float32)
    else:
        a = tl.load(decay + heads, mask=known, other=0.0).to(tl.float32)
        log_decay = value * a[None, :]
    dlog = tl.where(inside & (log_decay >= LOWEST), dlog, 0.0)
    out = batch * out_b + rows[:, None] * out_l + heads[None, :]
    if PER_TOKEN:
        tl.store(ddecay + out, dlog.to(ddecay.dtype.element_ty), mask=inside)
    else:
        tl.store(dA + u * nheads + heads, tl.sum(tl.where(inside, dlog * value, 0.0), 0), mask=known)
        ds += dlog * a[None, :]
    if HAS_DT:
        if CLAMP:
            ds = tl.where((free >= low) & (free <= high), ds, 0.0)
        if SOFTPLUS:
            ds *= tl.sigmoid(raw.to(tl.float32) + shift[None, :])
        tl.store(ddt + out, ds.to(ddt.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            tl.store(dbias + u * nheads + heads, tl.sum(tl.where(inside, ds, 0.0), 0), mask=known)


@triton.jit
def total_kernel(
    dA_parts, dbias_parts, dD_parts, dA, dbias, dD, nchunks, nheads,
    HEADS: tl.constexpr, CHUNKS: tl.constexpr, HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """Sums over chunks of what a head has one gradient of. Grid `(cdiv(nheads, HEADS),)`."""
    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    a = tl.zeros([CHUNKS, HEADS], tl.float32)
    bias = tl.zeros([CHUNKS, HEADS], tl.float32)
    d = tl.zeros([CHUNKS, HEADS], tl.float32)
    for first in range(0, nchunks, CHUNKS):
        c = first + tl.arange(0, CHUNKS)
        inside = (c < nchunks)[:, None] & (heads < nheads)[None, :]
        place = c.to(tl.int64)[:, None] * nheads + heads[None, :]
        if HAS_A:
            a += tl.load(dA_parts + place, mask=inside, other=0.0)
        if HAS_BIAS:
            bias += tl.load(dbias_parts + place, mask=inside, other=0.0)
        if HAS_D:
            d += tl.load(dD_parts + place, mask=inside, other=0.0)
    if HAS_A:
        tl.store(dA + heads, tl.sum(a, 0).to(dA.dtype.element_ty), mask=heads < nheads)
    if HAS_BIAS:
        tl.store(dbias + heads, tl.sum(bias, 0).to(dbias.dtype.element_ty), mask=heads < nheads)
    if HAS_D:
        tl.store(dD + heads, tl.sum(d, 0).to(dD.dtype.element_ty), mask=heads < nheads)


class Tensors(NamedTuple):
    """The arguments that have gradients, or these."""

    x: Tensor
    dt: Tensor | None
    decay: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None

    def heads(self, first: int, last: int) -> "Tensors":
        """Views of some heads: of whole groups, or of a part of one."""
        nheads, per_group = self.x.shape[2], self.x.shape[2] // self.B.shape[2]
        if last - first == nheads:
            return self
        groups = slice(first // per_group, _triton.cdiv(last, per_group))
        x, dt = self.x[:, :, first:last], None if self.dt is None else self.dt[:, :, first:last]
        decay = self.decay[..., first:last]
        D, bias = (None if t is None else t[first:last] for t in (self.D, self.dt_bias))
        initial = None if self.initial_states is None else self.initial_states[:, first:last]
        return Tensors(x, dt, decay, self.B[:, :, groups], self.C[:, :, groups], D, bias, initial)

    def rows(self, rows: slice) -> "Tensors":
        """Views of some rows of the batch."""
        others = self.shared()
        return Tensors(*(t if t is None or name in others else t[rows] for name, t in self._asdict().items()))

    def shared(self) -> dict[str, Tensor]:
        """Those that all rows of the batch have in common."""
        named = {"decay": None if self.decay.ndim == 3 else self.decay, "D": self.D, "dt_bias": self.dt_bias}
        return {name: t for name, t in named.items() if t is not None}


def backward(
    dy: Tensor | None, dfinal: Tensor | None, states: Tensor, x: Tensor, dt: Tensor | None, decay: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, dt_bias: Tensor | None, initial_states: Tensor | None, cu_seqlens: Tensor | None,
    dt_softplus: bool, dt_min: float, dt_max: float, keep: bool = False, *, into: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, dt, decay, B, C, D, dt_bias and initial_states; an empty tensor for an argument that was None.

    `states` are those that the forward kept; of no elements, they are computed again, and the batch is taken a part at
    a time unless it was to `keep` them. `into` has memory for some of the gradients, by the names of `Tensors`, with
    adjacent elements in the last dimension; the batch is taken as a whole then.
    """
    if x.numel() == 0:
        dstates = x.new_empty(0) if initial_states is None else torch.zeros_like(initial_states)
        if initial_states is not None and dfinal is not None:
            dstates.copy_(dfinal)
        grads = [x.new_empty(0) if t is None else torch.zeros_like(t) for t in (x, dt, decay, B, C, D, dt_bias)]
        return *grads, dstates
    if dy is None:
        dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    with _triton.on_device(x):
        dy = dy if _triton.describable(dy) and dy.stride(-1) == 1 else dy.contiguous()
        x, B, C, dy = arranged(x, B, C, dy)
        inputs = Tensors(x, dt, decay, B, C, D, dt_bias, initial_states)
        given = into or {}
        made = {
            name: given[name] if name in given else torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for name, t in inputs._asdict().items()
            if t is not None
        }
        grads, steps = Tensors(*map(made.get, Tensors._fields)), (dt_softplus, (dt_min, dt_max))
        whole = keep or into is not None or cu_seqlens is not None or states.numel()
        size = x.shape[0] if whole else configs.rows_at_once(x, B)
        if size == x.shape[0]:
            _heads(inputs, grads, dy, states, dfinal, cu_seqlens, steps, WAVES)
        else:
            _in_parts(inputs, grads, dy, states, dfinal, steps, size)
    return tuple(x.new_empty(0) if t is None else t for t in grads)


def _in_parts(
    inputs: Tensors, grads: Tensors, dy: Tensor, states: Tensor, dfinal: Tensor | None,
    steps: tuple[bool, tuple[float, float]], size: int,
) -> None:  # fmt: skip
    """Writes all gradients, `size` rows of the batch at a time."""
    starts = range(0, dy.shape[0], size)
    parts = {name: t.new_empty((len(starts), *t.shape)) for name, t in grads.shared().items()}
    for i, first in enumerate(starts):
        rows = slice(first, min(first + size, dy.shape[0]))
        own = grads.rows(rows)._replace(**{name: t[i] for name, t in parts.items()})
        last = None if dfinal is None else dfinal[rows]
        _heads(inputs.rows(rows), own, dy[rows], states, last, None, steps, FEW_WAVES)
    for name, total in grads.shared().items():
        total.copy_(parts[name].sum(0))


def _heads(
    inputs: Tensors, result: Tensors, dy: Tensor, states: Tensor, dfinal: Tensor | None, cu_seqlens: Tensor | None,
    steps: tuple[bool, tuple[float, float]], waves: int,
) -> None:  # fmt: skip
    """Writes all gradients, some heads at a time."""
    x, B, grads = inputs.x, inputs.B, result
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slices = [(0, x.shape[2])] if states.numel() else configs.slices_of_heads(x, B, nseq, RESIDENT)
    split = len(slices) > B.shape[2]
    if split:
        # Sums over the heads of a group, of which a slice adds its own.
        grads = grads._replace(B=grads.B.float(), C=grads.C.float())
    for first, last in slices:
        add = split and first % (x.shape[2] // B.shape[2]) > 0
        _slice(
            inputs.heads(first, last), grads.heads(first, last), dy[:, :, first:last], states,
            None if dfinal is None else dfinal[:, first:last], cu_seqlens, steps, add, waves,
        )  # fmt: skip
    if split:
        result.B.copy_(grads.B)
        result.C.copy_(grads.C)


def _slice(
    inputs: Tensors, grads: Tensors, dy: Tensor, states: Tensor, dfinal: Tensor | None, cu_seqlens: Tensor | None,
    steps: tuple[bool, tuple[float, float]], add: bool, waves: int,
) -> None:  # fmt: skip
    """Writes the gradients of some heads; with `add` those of B and C are added to what is there."""
    x, dt, decay, B, C, D, bias, initial = inputs
    initial, dlast = (None if t is None else t.contiguous() for t in (initial, dfinal))
    call = Call(x, dt, decay, B, C, bias, cu_seqlens is None, *steps)
    call.prepare(cu_seqlens, dy, D, initial, dlast, *grads[1:], result=grads.x)
    dinitial = grads.initial_states
    if dinitial is not None and not dinitial.is_contiguous():
        dinitial = call.last_states()
    S, G = states, call.chunk_states()
    if S.shape != G.shape or not call.family.hopper:
        S = call.chunk_states()
        call.scan(x, call.entries(x, initial), None, saved=S)
    # Inner products of S and G, summed over columns (over the state's rows, where it is transposed).
    rows = configs.HOPPER_TILE if call.family.hopper else S.shape[2]
    kept = torch.empty(*S.shape[:2], call.blocks, rows, dtype=torch.float32, device=x.device)
    call.scan(
        dy, call.entries(dy, dlast, reverse=True), dinitial, reverse=True, out=grads.x, D=D, saved=G, counterpart=S,
        kept=kept,
    )  # fmt: skip
    dD = _vector_D(call, D)
    if call.family.hopper:
        pieces = _hopper_gradients(call, grads, dy, S, G, dD, add, waves)
    else:
        pieces = _plain_gradients(call, grads, dy, S, G, dD, add)
    if dD is not None:
        assert grads.D is not None
        grads.D.copy_(dD.sum(0)[:, : x.shape[3]])
    _decay_gradients(call, grads, kept, D, pieces)
    if dinitial is not None and dinitial is not grads.initial_states:
        assert grads.initial_states is not None
        grads.initial_states.copy_(dinitial)


class Pieces(NamedTuple):
    """What the decay's gradient is made of, float32: see `decay_gradient_kernel`."""

    reads: Tensor
    dscale: Tensor
    from_state: Tensor
    into_state: Tensor
    products: Tensor
    overlaps: Tensor


def _across(x: Tensor) -> bool:
    """Whether the decay's gradient inside a chunk is summed without differences.

    What passes by a token is a difference of sums otherwise, exact to their last digit; float32 is to be more exact.
    """
    return x.dtype == torch.float32


def _pieces(call: Call, pairs: int, states: int, overlaps: int) -> Pieces:
    """Room for them: so many pieces of each."""
    nheads, ngroups = call.x.shape[2], call.B.shape[2]
    sizes = [(pairs, nheads), (pairs, nheads), (states, nheads), (states, nheads)]
    sizes += [(call.blocks, nheads), (overlaps, ngroups)]
    options = {"dtype": torch.float32, "device": call.x.device}
    return Pieces(*(torch.empty(*size, call.padded, **options) for size in sizes))


def _vector_D(call: Call, D: Tensor | None) -> Tensor | None:
    """Room for a vector D's gradient a chunk; an empty chunk's program writes nothing."""
    if D is None or D.ndim == 1:
        return None
    make = torch.zeros if call.plan.ragged else torch.empty
    shape = (call.plan.chunks.shape[0], call.x.shape[2], call.blocks * call.family.columns)
    return make(shape, dtype=torch.float32, device=call.x.device)


def _hopper_gradients(
    call: Call, grads: Tensors, dy: Tensor, S: Tensor, G: Tensor, dD: Tensor | None, add: bool, waves: int
) -> Pieces:
    """Writes dB, dC and, per chunk, a vector D's gradient; returns what the decay's gradient is made of."""
    x, B, C, supers, every = call.x, call.B, call.C, call.plan.supers, call.family.every
    (nheads, headdim), (ngroups, d_state) = x.shape[2:], B.shape[2:]
    tile, blocks, per_group, count = configs.HOPPER_TILE, call.blocks, nheads // ngroups, supers.shape[0]
    n = min(d_state, triton_scan_hopper.NARROW.value)
    halves, pairs = d_state // n, every * (every + 1) // 2
    programs = count * (2 * every * halves + pairs)
    parts = _head_parts(per_group, programs * ngroups, waves * _triton.multiprocessors(x.device))
    float32 = {"dtype": torch.float32, "device": x.device}
    totals = torch.empty(2, parts, call.padded, ngroups * d_state, **float32)
    squares = torch.empty(parts, ngroups, count, pairs, tile, tile, **float32)
    pieces = _pieces(call, every * blocks, halves * blocks, 1)
    tiles, states = triton_scan_hopper.tiles, triton_scan_hopper.state_tiles
    call.launch(
        triton_gradients_hopper.gradient_hopper_kernel, (programs, ngroups * parts),
        (tiles(x), tiles(dy), tiles(B, n), tiles(C, n), states(S, n), states(G, n), totals, squares, *pieces, dD,
         call.scale, call.sums, supers, totals.stride(2), totals.stride(0), nheads, ngroups, per_group,
         per_group // parts, headdim, d_state, x.shape[1], call.padded),
        Q=tile, N=n, HALVES=halves, P=tile, BLOCKS=blocks, EVERY=every, RAGGED=call.family.ragged,
        VECTOR_D=dD is not None, num_warps=4, maxnreg=GRADIENT_REGISTERS,
    )  # fmt: skip
    call.launch(
        triton_gradients_hopper.finish_kernel, (count * every, ngroups * halves, 2),
        (totals, squares, B, C, grads.B, grads.C, supers, totals.stride(2), *B.stride()[:3], *C.stride()[:3],
         *grads.B.stride()[:3], *grads.C.stride()[:3], totals.stride(0), squares.stride(0), d_state, call.padded,
         parts),
        add, Q=tile, N=n, HALVES=halves, EVERY=every, ADD=add, num_warps=4,
    )  # fmt: skip
    return pieces


def _plain_gradients(
    call: Call, grads: Tensors, dy: Tensor, S: Tensor, G: Tensor, dD: Tensor | None, add: bool
) -> Pieces:
    """As `_hopper_gradients`, by two launches of `gradient_kernel`."""
    x, B, C, config, plan = call.x, call.B, call.C, call.family.config, call.plan
    nheads, headdim = x.shape[2:]
    ngroups, d_state = B.shape[2:]
    n, n_total, p, blocks = config.gradient_rows, S.shape[2], call.family.columns, call.blocks
    nchunks, per_group = plan.chunks.shape[0], nheads // ngroups
    parts, dB, dC = 1, grads.B[None], grads.C[None]
    if not add:
        parts = _head_parts(per_group, nchunks * ngroups * (n_total // n), _triton.multiprocessors(x.device))
    if parts > 1:
        dB, dC = (torch.empty(parts, *B.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    count = n_total // n
    pieces = _pieces(call, count * blocks, count * blocks, count)
    sizes = (nheads, per_group, per_group // parts, headdim, d_state, call.padded)
    reading = (dy, x, C, B, S, dC, pieces.reads, pieces.from_state, pieces.products, pieces.overlaps)
    writing = (x, dy, B, C, G, dB, pieces.dscale, pieces.into_state, None, None)
    for reverse, (value, other, query, key, state, out, *rest) in enumerate((reading, writing)):
        call.launch(
            gradient_kernel, (nchunks, ngroups * parts, count),
            (call.tiles(value, p), call.tiles(other, p), call.tiles(query, n), call.tiles(key, n),
             call.state_tiles(state, n), out, *rest, dD, call.scale, call.sums, plan.chunks,
             *value.stride()[:3], *other.stride()[:3], *query.stride()[:3], *key.stride()[:3], *out.stride()[:4],
             *sizes),
            (reverse, add), Q=config.chunk, N=n, NT=n_total, P=p, BLOCKS=blocks, STAGES=config.gradient_stages,
            TMA=call.family.tma, ADD=add, REVERSE=bool(reverse), ACROSS=_across(x),
            VECTOR_D=dD is not None and bool(reverse), PRECISION=config.precision, num_warps=config.gradient_warps,
        )  # fmt: skip
    if parts > 1:
        grads.B.copy_(dB.sum(0))
        grads.C.copy_(dC.sum(0))
    return pieces


def _decay_gradients(call: Call, grads: Tensors, kept: Tensor, D: Tensor | None, pieces: Pieces) -> None:
    """Writes the gradients of dt, of A or the log-decay, of the bias, and of a scalar D."""
    nheads, supers, family = call.x.shape[2], call.plan.supers, call.family
    per_token = grads.decay if call.decay.ndim == 3 else None
    # One gradient a head: a sum a super-chunk first.
    totals = (
        None if per_token is not None else grads.decay,
        grads.dt_bias,
        grads.D if D is None or D.ndim == 1 else None,
    )
    count = supers.shape[0]
    parts = [None if t is None else torch.empty(count, nheads, dtype=torch.float32, device=t.device) for t in totals]
    heads = min(16 // min(family.every, 2), configs.power_of_two(nheads))
    tokens = grads.dt if per_token is None else per_token
    call.launch(
        decay_gradient_kernel, (count, _triton.cdiv(nheads, heads)),
        (*pieces, kept, call.scale, call.sums, call.dt, call.decay, call.bias, grads.dt, per_token, *parts, supers,
         nheads, nheads // call.B.shape[2], call.padded, *call.limit, *family.strides,
         *((0, 0) if tokens is None else tokens.stride()[:2])),
        HEADS=heads, EVERY=family.every, N=kept.shape[3], BLOCKS=kept.shape[2],
        PAIRS=pieces.reads.shape[0] // family.every, STATES=pieces.from_state.shape[0],
        OVERLAPS=pieces.overlaps.shape[0], ACROSS=_across(call.x), SCALAR_D=parts[2] is not None,
        num_warps=2 * min(family.every, 4), **family.decays,
    )  # fmt: skip
    if any(t is not None for t in totals):
        call.launch(
            total_kernel, (_triton.cdiv(nheads, 4),), (*parts, *totals, count, nheads),
            HEADS=4, CHUNKS=128, HAS_A=totals[0] is not None, HAS_BIAS=totals[1] is not None,
            HAS_D=totals[2] is not None, num_warps=4,
        )  # fmt: skip


def _head_parts(per_group: int, programs: int, wanted: int) -> int:
    """Into how many parts a group's heads are split: the smallest divisor that makes as many programs as wanted."""
    divisors = (k for k in range(1, per_group + 1) if per_group % k == 0)
    return next((k for k in divisors if programs * k >= wanted), per_group)
