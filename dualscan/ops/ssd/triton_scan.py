"""The sequential kernel of SSD and what surrounds it (section 6 of arXiv 2405.21060, one chunk after the other).

With cs the cumulative sum of the log-decay inside a chunk, L_ij = exp(cs_i - cs_j) for i >= j, and s the input scale,

    forward:  Y  = (C Bᵀ ∘ L) (s X)   + exp(cs) C S         S' = exp(cs_Q) S + Bᵀ (exp(cs_Q - cs) s X)
    backward: dX = s (B Cᵀ ∘ Lᵀ) dY + s exp(cs_Q - cs) B G  G' = exp(cs_Q) G + Cᵀ (exp(cs) dY)

where S is the state at the chunk's start and G the gradient of the state at its end. The second line is the first with
B and C exchanged, dY for X and time reversed, so one kernel serves both: `scan_kernel` with query, key and value. It
also gives the states alone, which the split of a long sequence and the parameter gradients need.

Sums of log-decays are kept in powers of two: exp2 is one instruction. Every exponent is <= 0.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dualscan.ops import _triton
from dualscan.ops.ssd import configs
from dualscan.ops.ssd.hopper import triton_scan_hopper as hopper
from dualscan.ops.ssd.triton_combine import SEGMENTS_AT_ONCE, combine_kernel

# For the split of sequences: programs of the sequential kernel that a multiprocessor holds; a chunk's states, and the
# joining of one program's, in units of a chunk's full work; the fewest tokens worth a segment, and the most segments.
# A join costs little while the L2 cache holds the states, and more beyond: few segments are as good as any number then.
RESIDENT = 2
# States of so many columns and more take a multiprocessor for themselves on Hopper.
WIDE_STATE = 256
STATES_COST = 0.35
JOIN_COST = 4.0
SHORTEST_SEGMENT = 256
MOST_SEGMENTS = 64
# Rows of a state that a program of the decoding step holds.
STEP_ROWS = 32

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1000.0)


@triton.jit
def load_tile(
    source, batch, lane, row, end, column, stride_b, stride_l, stride_h, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows [row, row + ROWS) of a head or group, as (ROWS, COLUMNS); zeros beyond `end` and `width`."""
    if TMA:
        tile = source.load([batch, lane, row, column]).reshape(ROWS, COLUMNS)
    else:
        rows, columns = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        base = source + batch.to(tl.int64) * stride_b + lane.to(tl.int64) * stride_h + row.to(tl.int64) * stride_l
        inside = (row + rows < end)[:, None] & (columns < width)[None, :]
        tile = tl.load(base + rows[:, None] * stride_l + columns[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(
    target, tile, batch, lane, row, end, column, stride_b, stride_l, stride_h, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The counterpart of `load_tile`: nothing is written beyond `end` and `width`."""
    if TMA:
        target.store([batch, lane, row, column], tile.reshape(1, 1, ROWS, COLUMNS))
    else:
        rows, columns = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        base = target + batch.to(tl.int64) * stride_b + lane.to(tl.int64) * stride_h + row.to(tl.int64) * stride_l
        inside = (row + rows < end)[:, None] & (columns < width)[None, :]
        tl.store(base + rows[:, None] * stride_l + columns[None, :], tile, mask=inside)


@triton.jit
def step_size(raw, bias, low, high, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr):
    """Δ = clamp(softplus(dt + dt_bias)), and its value before the clamp. log1p(u) = log(1 + u) u / ((1 + u) - 1)."""
    value = raw + bias
    if SOFTPLUS:
        u = tl.exp(tl.minimum(value, 20.0))
        w = 1.0 + u
        small = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
        value = tl.where(value > 20.0, value, small)
    clamped = value
    if CLAMP:
        clamped = tl.minimum(tl.maximum(value, low), high)
    return clamped, value


@triton.jit
def decay_kernel(
    dt, decay, bias, scale_out, sums_out, chunks, nheads, padded, low, high,
    dt_b, dt_l, dt_h, decay_b, decay_l, decay_h,
    Q: tl.constexpr, HEADS: tl.constexpr, HAS_DT: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Input scales and sums of log-decays of every chunk, head by head: `(nheads, padded)`, 0 and constant past an end.

    `decay` is A `(nheads,)`, multiplied by the step size, or a log-decay per token and head (PER_TOKEN).
    """
    c = tl.program_id(0)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, Q)
    batch = tl.load(chunks + c * 3).to(tl.int64)
    rows = tl.load(chunks + c * 3 + 1).to(tl.int64) + q
    inside = (rows < tl.load(chunks + c * 3 + 2))[:, None] & (heads < nheads)[None, :]
    if HAS_DT:
        raw = tl.load(dt + batch * dt_b + rows[:, None] * dt_l + heads[None, :] * dt_h, mask=inside, other=0.0)
        shift = tl.zeros([HEADS], tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias + heads, mask=heads < nheads, other=0.0).to(tl.float32)
        scale, _ = step_size(raw.to(tl.float32), shift[None, :], low, high, SOFTPLUS, CLAMP)
    else:
        scale = tl.full([Q, HEADS], 1.0, tl.float32)
    if PER_TOKEN:
        place = batch * decay_b + rows[:, None] * decay_l + heads[None, :] * decay_h
        log_decay = tl.load(decay + place, mask=inside, other=0.0).to(tl.float32)
    else:
        log_decay = scale * tl.load(decay + heads, mask=heads < nheads, other=0.0).to(tl.float32)[None, :]
    scale = tl.where(inside, scale, 0.0)
    powers = tl.where(inside, tl.maximum(log_decay, LOWEST), 0.0).to(sums_out.dtype.element_ty) * LOG2E
    out = heads.to(tl.int64)[None, :] * padded + c * Q + q[:, None]
    mask = (heads < nheads)[None, :] & (q >= 0)[:, None]
    tl.store(scale_out + out, scale, mask=mask)
    tl.store(sums_out + out, tl.cumsum(powers, 0), mask=mask)


@triton.jit
def scan_kernel(
    query, key, value, out, saved, counterpart, kept, scale, sums, D, initial, final, segments, D_h, D_p,
    query_b, query_l, query_h, key_b, key_l, key_h, value_b, value_l, value_h, out_b, out_l, out_h,
    nheads, heads_per_group, headdim, d_state, padded,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    REVERSE: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr, KEPT: tl.constexpr, ENTRIES: tl.constexpr,
    HAS_D: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: P columns of one head over one segment, the state (N, P) in registers.

    Grid `(nheads * cdiv(headdim, P), segments)`. `segments` is a table of `_triton.Plan`.
    OUTPUT writes `out`; SAVE writes every chunk's state on entry to `saved` (chunk, head, N, columns); KEPT writes its
    inner product with `counterpart`, of the same layout, summed over columns, to `kept` (chunk, head, block, N). With
    ENTRIES `final` has a state a segment, and `kept` the sum of its log-decays (segment, head); else `final` has one a
    sequence, which its last segment writes (REVERSE: its first).
    """
    blocks = tl.cdiv(headdim, P)
    h = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * P
    segment = tl.program_id(1)
    batch = tl.load(segments + segment * 7)
    start = tl.load(segments + segment * 7 + 1)
    end = tl.load(segments + segment * 7 + 2)
    first_chunk = tl.load(segments + segment * 7 + 3)
    group = h // heads_per_group
    nchunks = tl.cdiv(end - start, Q)
    q, n, p = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, P)
    columns = column + p
    state_place = (segment.to(tl.int64) * nheads + h) * headdim * d_state + columns[None, :] * d_state + n[:, None]
    state_inside = (columns < headdim)[None, :] & (n < d_state)[:, None]
    state = tl.zeros([N, P], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + state_place, mask=state_inside, other=0.0)
    if HAS_D:
        skip = tl.load(D + h * D_h + columns * D_p, mask=columns < headdim, other=0.0).to(tl.float32)
    decayed = 0.0
    for i in tl.range(0, nchunks, num_stages=STAGES):
        c = nchunks - 1 - i if REVERSE else i
        row = start + c * Q
        place = h.to(tl.int64) * padded + (first_chunk + c) * Q
        k = load_tile(key, batch, group, row, end, 0, key_b, key_l, key_h, d_state, Q, N, TMA)
        v = load_tile(value, batch, h, row, end, column, value_b, value_l, value_h, headdim, Q, P, TMA)
        s = tl.load(scale + place + q)
        cs = tl.load(sums + place + q)
        last = tl.load(sums + place + Q - 1)
        if ENTRIES:
            decayed += last.to(tl.float32)
        from_start = tl.exp2(cs.to(tl.float32))
        to_end = tl.exp2((last - cs).to(tl.float32))
        low = state.to(v.dtype)
        if SAVE:
            entry = ((first_chunk + c).to(tl.int64) * nheads + h) * N * (blocks * P)
            tl.store(saved + entry + n[:, None] * (blocks * P) + columns[None, :], low)
        if KEPT:
            lane = (first_chunk + c) * nheads + h
            if TMA:
                other = counterpart.load([lane * N, column])
            else:
                other = tl.load(counterpart + entry + n[:, None] * (blocks * P) + columns[None, :])
            inner = tl.sum(other.to(tl.float32) * state, 1)
            tl.store(kept + (lane.to(tl.int64) * blocks + column // P) * N + n, inner)
        if OUTPUT:
            u = load_tile(query, batch, group, row, end, 0, query_b, query_l, query_h, d_state, Q, N, TMA)
            weights = tl.dot(u, tl.trans(k), input_precision=PRECISION)
            if REVERSE:
                gap = tl.where(q[:, None] <= q[None, :], cs[None, :] - cs[:, None], float("-inf"))
                weights *= tl.exp2(gap.to(tl.float32))
                y = tl.dot(u, low, input_precision=PRECISION) * to_end[:, None]
            else:
                gap = tl.where(q[:, None] >= q[None, :], cs[:, None] - cs[None, :], float("-inf"))
                weights *= tl.exp2(gap.to(tl.float32)) * s[None, :]
                y = tl.dot(u, low, input_precision=PRECISION) * from_start[:, None]
            y = tl.dot(weights.to(v.dtype), v, y, input_precision=PRECISION)
            if REVERSE:
                y *= s[:, None]
            if HAS_D:
                y += skip[None, :] * v
            store_tile(out, y.to(v.dtype), batch, h, row, end, column, out_b, out_l, out_h, headdim, Q, P, TMA)
        share = from_start if REVERSE else to_end * s
        scaled = (v * share[:, None]).to(v.dtype)
        state = tl.dot(tl.trans(k), scaled, state * tl.exp2(last.to(tl.float32)), input_precision=PRECISION)
    if HAS_FINAL:
        target = segment if ENTRIES else tl.load(segments + segment * 7 + 4)
        edges = tl.load(segments + segment * 7 + 5)
        wanted = ENTRIES | ((edges & (1 if REVERSE else 2)) != 0)
        state_place += (target - segment).to(tl.int64) * nheads * headdim * d_state
        tl.store(final + state_place, state, mask=state_inside & wanted)
    if ENTRIES:
        tl.store(kept + segment * nheads + h, decayed)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """What sizes, strides and dtypes decide: configuration, segments, which kernels run, how they start again.

    A program holds `columns` of headdim. `every` chunks are a super-chunk: the backward has one state for each.
    `ragged` is whether a chunk may end early.
    """

    config: configs.Config
    segment: int
    columns: int
    every: int
    tma: bool
    hopper: bool
    ragged: bool
    strides: tuple[int, ...]
    decays: dict[str, object]
    launchers: dict[Hashable, _triton.Launcher]


_FAMILIES: dict[Hashable, Family] = {}
MOST_FAMILIES = 512


def _family(key: Hashable, call: "Call", nseq: int, described: list[Tensor]) -> Family:
    x, B, headdim = call.x, call.B, call.x.shape[3]
    config = configs.choose(headdim, B.shape[3], x.dtype, _triton.capability(x.device))
    # Descriptors that are not pipelined (one stage) gave an illegal memory access once: such tiles take pointers.
    # Nor does y have a descriptor whose heads are no multiple of 16 bytes, whatever the strides of the inputs.
    tma = config.stages > 1 and _triton.has_tma(x.device) and _triton.describable(*described)
    tma = tma and headdim * x.element_size() % 16 == 0
    fast = tma and hopper.fits(*described)
    tma = tma and (fast or call.dense)
    columns, every = (configs.HOPPER_TILE, configs.HOPPER_EVERY) if fast else (config.columns, 1)
    resident = 1 if fast and B.shape[3] >= WIDE_STATE else RESIDENT
    programs = nseq * x.shape[2] * _triton.cdiv(headdim, columns)
    dt = (0, 0, 0) if call.dt is None else call.dt.stride()
    per_token = call.decay.ndim == 3
    if len(_FAMILIES) >= MOST_FAMILIES:
        _FAMILIES.clear()
    _FAMILIES[key] = family = Family(
        config=config,
        segment=_segment(x.shape[1], programs, config.chunk, every, resident * _triton.multiprocessors(x.device)),
        columns=columns,
        every=every,
        tma=tma,
        hopper=fast,
        ragged=not call.dense or x.shape[1] % config.chunk > 0,
        strides=(*dt, *(call.decay.stride() if per_token else (0, 0, 0))),
        decays={
            "Q": config.chunk,
            "HAS_DT": call.dt is not None,
            "PER_TOKEN": per_token,
            "HAS_BIAS": call.bias is not None,
            "SOFTPLUS": call.softplus,
            "CLAMP": call.limit != (0.0, math.inf),
        },
        launchers={},
    )
    return family


@lru_cache(maxsize=256)
def _segment(seqlen: int, programs: int, chunk: int, every: int, slots: int) -> int:
    """Tokens a segment, whole super-chunks: what makes the fewest rounds of chunks, on the kernels' own measure.

    The GPU holds `slots` programs. With more segments than one, the states of all but the last are computed first, at
    `STATES_COST` of a chunk's full work, and joined, at `JOIN_COST` for each program's.
    """
    chunks = _triton.cdiv(seqlen, chunk)

    def cost(segments: int) -> float:
        rounds = _triton.cdiv(chunks, segments * every) * every
        full = _triton.cdiv(programs * segments, slots) * rounds
        if segments == 1:
            return full
        states = STATES_COST * _triton.cdiv(programs * (segments - 1), slots) * rounds
        return full + states + JOIN_COST * programs * segments / slots

    most = max(1, min(MOST_SEGMENTS, seqlen // SHORTEST_SEGMENT))
    segments = min(range(1, most + 1), key=cost) if programs else 1
    # A whole sequence takes one super-chunk more than it has, so that a packed one of any length is one segment.
    supers = _triton.cdiv(chunks, every) + 1 if segments == 1 else _triton.cdiv(chunks, segments * every)
    return supers * every * chunk


@dataclass(slots=True, eq=False)
class Call:
    """One call's tensors, family, plan and decays, shared by forward and backward."""

    x: Tensor
    dt: Tensor | None
    decay: Tensor
    B: Tensor
    C: Tensor
    bias: Tensor | None
    dense: bool
    softplus: bool
    limit: tuple[float, float]
    family: Family = field(init=False)
    plan: _triton.Plan = field(init=False)
    scale: Tensor = field(init=False)
    sums: Tensor = field(init=False)

    def prepare(
        self, cu_seqlens: Tensor | None, dy: Tensor | None, *others: Tensor | None, result: Tensor | None = None
    ) -> None:
        """Finds family and plan, and computes the step sizes and decay sums of every chunk.

        `others` are the arguments besides the call's own that go to kernels, `result` the gradient of x.
        """
        x, kind = self.x, _triton.kind
        batch, seqlen, nheads, _ = x.shape
        nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        own = (x, self.dt, self.decay, self.B, self.C, self.bias, dy, result, *others)
        key = (x.device, nseq, self.dense, self.softplus, self.limit, *map(kind, own))
        family = _FAMILIES.get(key)
        if family is None:
            described = [t for t in (x, self.B, self.C, dy, result) if t is not None]
            family = _family(key, self, nseq, described)
        self.family, chunk = family, family.config.chunk
        self.plan = plan = _triton.plan(cu_seqlens, batch, seqlen, chunk, family.every, family.segment, x.device)
        nchunks = plan.chunks.shape[0]
        padded = nchunks * chunk
        self.scale = torch.empty(nheads, padded, dtype=torch.float32, device=x.device)
        wide = torch.float64 if x.dtype == torch.float32 else torch.float32
        self.sums = torch.empty(nheads, padded, dtype=wide, device=x.device)
        heads = min(16, configs.power_of_two(nheads))
        self.launch(
            decay_kernel, (nchunks, _triton.cdiv(nheads, heads)),
            (self.dt, self.decay, self.bias, self.scale, self.sums, plan.chunks, nheads, padded, *self.limit,
             *family.strides),
            HEADS=heads, num_warps=2, **family.decays,
        )  # fmt: skip

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], name: Hashable = None, **constants: Any
    ) -> None:
        """Starts a kernel; `name` tells the launches of one kernel within a call apart."""
        launchers, name = self.family.launchers, (id(kernel), name)
        launcher = launchers.get(name)
        if launcher is None:
            launcher = launchers[name] = _triton.Launcher()
        launcher(kernel, grid, arguments, **constants)

    @property
    def padded(self) -> int:
        """Tokens with every chunk filled up."""
        return self.scale.shape[1]

    @property
    def blocks(self) -> int:
        """Blocks of columns of headdim."""
        return _triton.cdiv(self.x.shape[3], self.family.columns)

    def chunk_states(self) -> Tensor:
        """Room for one state a super-chunk and head, in the inputs' dtype, padded to whole tiles."""
        n, width = configs.power_of_two(self.B.shape[3]), self.blocks * self.family.columns
        shape = (self.plan.supers.shape[0], self.x.shape[2], n, width)
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device)

    def tiles(self, t: Tensor, columns: int) -> object:
        """What a kernel reads a tensor through: a descriptor, or the tensor."""
        return _triton.descriptor(TensorDescriptor, t, self.family.config.chunk, columns) if self.family.tma else t

    def state_tiles(self, saved: Tensor, rows: int) -> object:
        """What a kernel reads chunk states through."""
        width = saved.shape[-1]
        tile = [rows, self.family.columns]
        shape = [saved.numel() // width, width]
        return _triton.describe(TensorDescriptor, saved, shape, [width, 1], tile) if self.family.tma else saved

    def scan(
        self, value: Tensor, initial: Tensor | None, final: Tensor | None, *, reverse: bool = False,
        entries: bool = False, out: Tensor | None = None, D: Tensor | None = None, saved: Tensor | None = None,
        counterpart: Tensor | None = None, kept: Tensor | None = None, fine: bool = False,
    ) -> None:  # fmt: skip
        """Launches `scan_kernel` over every segment; with `entries` over those that others start from.

        On Hopper `fine` and `saved` have what a super-chunk starts with as exact as float32 makes it.
        """
        plan, config, query, key = self.plan, self.family.config, *((self.B, self.C) if reverse else (self.C, self.B))
        segments = plan.segments if not entries else plan.after if reverse else plan.before
        output, (nheads, headdim), n, p = out is not None, value.shape[2:], key.shape[3], self.family.columns
        skip = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.ndim == 2 else 0)
        fine = fine or saved is not None
        name = (reverse, entries, output, saved is None, kept is None, fine)
        flags = {
            "REVERSE": reverse, "OUTPUT": output, "SAVE": saved is not None, "KEPT": kept is not None and not entries,
            "ENTRIES": entries, "HAS_D": D is not None, "HAS_INITIAL": initial is not None,
            "HAS_FINAL": final is not None,
        }  # fmt: skip
        grid = (nheads * self.blocks, segments.shape[0])
        shared = (kept, self.scale, self.sums, D, initial, final, segments, *skip)
        sizes = (nheads, nheads // key.shape[2], headdim, n)
        if self.family.hopper:
            # States alone are computed in slices of the narrow kernel, with an output in one.
            columns = n if output else min(n, hopper.NARROW.value)
            tiles, states = hopper.tiles, hopper.state_tiles
            described = (
                tiles(query, columns), tiles(key, columns), tiles(value), tiles(out), out, states(saved, columns),
                states(counterpart, columns),
            )  # fmt: skip
            self.launch(
                hopper.scan_hopper_kernel, (*grid, n // columns),
                (*described, *shared, 0 if out is None else out.stride(1), *sizes, value.shape[1], self.padded),
                name, Q=config.chunk, N=columns, P=p, EVERY=self.family.every, RAGGED=self.family.ragged,
                FINE=fine, **flags, num_warps=8 if columns > hopper.NARROW.value else 4,
            )  # fmt: skip
            return
        wide = configs.power_of_two(n)
        others = None if counterpart is None else self.state_tiles(counterpart, wide)
        left = None if out is None else self.tiles(out, p)
        described = (self.tiles(query, wide), self.tiles(key, wide), self.tiles(value, p), left, saved, others)
        strides = [step for t in (query, key, value, out) for step in ((0, 0, 0) if t is None else t.stride()[:3])]
        self.launch(
            scan_kernel, grid, (*described, *shared, *strides, *sizes, self.padded), name,
            Q=config.chunk, N=wide, P=p, STAGES=config.stages if output else config.states_stages,
            TMA=self.family.tma, PRECISION=config.precision,
            num_warps=config.warps if output else config.states_warps, **flags,
        )  # fmt: skip

    def entries(
        self, value: Tensor, initial: Tensor | None, *, reverse: bool = False, fine: bool = True
    ) -> Tensor | None:
        """States at the entry of every segment `(segments, h, p, n)`: the given ones where a sequence is one segment.

        Else the segments' own contributions are computed in parallel and joined.
        """
        plan, (nheads, headdim), d_state = self.plan, value.shape[2:], self.B.shape[3]
        if not plan.split:
            return initial
        inner = plan.after if reverse else plan.before
        shape, kind = (nheads, headdim, d_state), {"dtype": torch.float32, "device": value.device}
        ends, decays = torch.empty(inner.shape[0], *shape, **kind), torch.empty(inner.shape[0], nheads, **kind)
        starts, block = torch.empty(plan.segments.shape[0], *shape, **kind), 1024
        self.scan(value, None, ends, reverse=reverse, entries=True, kept=decays, fine=fine)
        self.launch(
            combine_kernel, (nheads, _triton.cdiv(headdim * d_state, block), plan.sequences.shape[0]),
            (ends, decays, initial, starts, plan.sequences, nheads, headdim * d_state), (reverse, initial is None),
            BLOCK=block, REVERSE=reverse, INNER=not plan.ragged, HAS_INITIAL=initial is not None,
            AT_ONCE=SEGMENTS_AT_ONCE,
        )  # fmt: skip
        return starts

    def last_states(self) -> Tensor:
        """Room for one state a sequence."""
        shape = (self.plan.sequences.shape[0], *self.x.shape[2:], self.B.shape[3])
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)


def forward(
    x: Tensor, dt: Tensor | None, decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_states: Tensor | None, cu_seqlens: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns `y` (b, l, h, p) in x's dtype and final states (b or nseq, h, p, n) in float32.

    And, to `keep`, the states at the start of every super-chunk, which the backward else computes again; no elements
    otherwise.
    """
    states = torch.empty(configs.saved_states(x, B, cu_seqlens) if keep else (0,), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return torch.empty_like(x), no_tokens(x, B, initial_states, cu_seqlens), states
    with _triton.on_device(x):
        x, B, C = arranged(x, B, C)
        call = Call(x, dt, decay, B, C, dt_bias, cu_seqlens is None, dt_softplus, (dt_min, dt_max))
        call.prepare(cu_seqlens, None, D, initial_states)
        y, final = torch.empty(x.shape, dtype=x.dtype, device=x.device), call.last_states()
        saved = states if call.family.hopper and states.numel() else None
        initial = None if initial_states is None else initial_states.contiguous()
        starts = call.entries(x, initial, fine=saved is not None)
        call.scan(x, starts, final, out=y, D=D, saved=saved)
        return y, final, states


def arranged(x: Tensor, B: Tensor, *others: Tensor) -> list[Tensor]:
    """The tensors as the kernels take them, copied where they must be: rows of adjacent elements, and for Hopper more.

    There the sizes alone decide which kernels run, forward and backward, whatever the layouts were.
    """
    if configs.for_hopper(x, B):
        return hopper.arranged(x, B, *others)
    return [_triton.rows_last(t) for t in (x, B, *others)]


def no_tokens(x: Tensor, B: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Final states without a single token: the initial ones."""
    if initial_states is not None:
        return initial_states.clone()
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_zeros((nseq, *x.shape[2:], B.shape[3]), dtype=torch.float32)


@triton.jit
def step_kernel(
    state, x, dt, A, B, C, D, z, bias, y, following, low, high, x_b, x_h, dt_b, dt_h, B_b, B_g, C_b, C_g, z_b, z_h,
    D_h, D_p, nheads, heads_per_group, headdim, d_state,
    P: tl.constexpr, N: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, LOGARITHM: tl.constexpr,
):  # fmt: skip
    """One token: P rows of one head's state (headdim, d_state). Grid `(nheads * cdiv(headdim, P), batch)`.

    With LOGARITHM, `A` holds the logarithm of -A. `following` may be `state`."""
    blocks = tl.cdiv(headdim, P)
    h, batch = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    group = h // heads_per_group
    p, n = (tl.program_id(0) % blocks) * P + tl.arange(0, P), tl.arange(0, N)
    place = ((batch * nheads + h) * headdim + p[:, None]) * d_state + n[None, :]
    inside = (p < headdim)[:, None] & (n < d_state)[None, :]
    previous = tl.load(state + place, mask=inside, other=0.0).to(tl.float32)
    shift = 0.0
    if HAS_BIAS:
        shift = tl.load(bias + h).to(tl.float32)
    scale, _ = step_size(tl.load(dt + batch * dt_b + h * dt_h).to(tl.float32), shift, low, high, SOFTPLUS, CLAMP)
    rate = tl.load(A + h).to(tl.float32)
    if LOGARITHM:
        rate = -tl.exp(rate)
    decay = tl.exp2(tl.maximum(scale * rate, LOWEST) * LOG2E)
    value = tl.load(x + batch * x_b + h * x_h + p, mask=p < headdim, other=0.0).to(tl.float32)
    key = tl.load(B + batch * B_b + group * B_g + n, mask=n < d_state, other=0.0).to(tl.float32)
    query = tl.load(C + batch * C_b + group * C_g + n, mask=n < d_state, other=0.0).to(tl.float32)
    current = previous * decay + (value * scale)[:, None] * key[None, :]
    tl.store(following + place, current.to(following.dtype.element_ty), mask=inside)
    out = tl.sum(current * query[None, :], 1)
    if HAS_D:
        out += tl.load(D + h * D_h + p * D_p, mask=p < headdim, other=0.0).to(tl.float32) * value
    if HAS_Z:
        gate = tl.load(z + batch * z_b + h * z_h + p, mask=p < headdim, other=0.0).to(tl.float32)
        out *= gate * tl.sigmoid(gate)
    tl.store(y + (batch * nheads + h) * headdim + p, out.to(y.dtype.element_ty), mask=p < headdim)


def step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float,
    *, in_place: bool = False, logarithm: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of the recurrence: `y` (b, h, p) in x's dtype and the next state in the state's dtype.

    With `in_place` the next state takes the place of `state`, which is contiguous; with `logarithm` A is that of -A.
    """
    batch, nheads, headdim = x.shape
    d_state = B.shape[2]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    following = state if in_place else torch.empty(state.shape, dtype=state.dtype, device=x.device)
    if state.numel() == 0:
        return y, following
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
    z = z if z is None or z.stride(-1) == 1 else z.contiguous()
    skip = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.ndim == 2 else 0)
    rows, limit = min(configs.power_of_two(headdim), STEP_ROWS), (dt_min, dt_max)
    tensors = (state.contiguous(), x, dt, A, B, C, D, z, dt_bias)
    key = (x.device, dt_softplus, limit, logarithm, *map(_triton.kind, tensors))
    launcher = _STEPS.get(key)
    if launcher is None:
        if len(_STEPS) >= MOST_FAMILIES:
            _STEPS.clear()
        launcher = _STEPS[key] = _triton.Launcher()
    with _triton.on_device(x):
        launcher(
            step_kernel, (nheads * _triton.cdiv(headdim, rows), batch),
            (*tensors, y, following, *limit, *x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2],
             *((0, 0) if z is None else z.stride()[:2]), *skip, nheads, nheads // B.shape[1], headdim, d_state),
            P=rows, N=configs.power_of_two(d_state), HAS_D=D is not None, HAS_Z=z is not None,
            HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus, CLAMP=limit != (0.0, math.inf), LOGARITHM=logarithm,
            num_warps=4,
        )  # fmt: skip
    return y, following


_STEPS: dict[Hashable, _triton.Launcher] = {}
