"""What the chunked form works on: the pieces of a call, the two layouts, and the decays of every chunk.

`m` is batch rows x groups, `k` the heads of one group, `c` a chunk and `q` its tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.ops.varlen import common_length, sequence_spans

DEFAULT_CHUNK_SIZE = 64
# exp of this is exactly 0 in float64: a log-decay clamped here still resets the state, and sums of it stay precise.
LOWEST_LOG_DECAY = -1000.0
# Decays of less than exp of this become exactly 0: on a CPU exp is 100 times slower where it underflows, and a matrix
# product is as slow with subnormal numbers.
SMALLEST_EXPONENT = {torch.float32: -69.0, torch.float64: -665.0}
# Elements of x in a chunk of rows that are computed together: the working set stays in the second-level cache.
CHUNK_ELEMENTS = 2**17


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows computed together: a block of a batch, one packed sequence, or equal-length sequences seen as a batch."""

    rows: slice
    span: slice | None = None
    nseq: int | None = None

    def tokens(self, t: Tensor) -> Tensor:
        """The piece of a tensor with batch and time dimensions: a view."""
        if self.nseq is not None:
            return t[0].unflatten(0, (self.nseq, -1))[self.rows]
        return t[self.rows] if self.span is None else t[:, self.span]

    def states(self, t: Tensor | None) -> Tensor | None:
        """The piece of a tensor with one row a sequence."""
        return None if t is None else t[self.rows]


def pieces(x: Tensor, cu_seqlens: Tensor | None) -> Iterator[Piece]:
    """Cuts a call into pieces; sequences without tokens are left out."""
    if x.numel() == 0:
        return
    spans = None if cu_seqlens is None else sequence_spans(cu_seqlens, x.shape[1])
    length = x.shape[1] if spans is None else common_length(spans)
    if spans is not None and not length:
        yield from (Piece(slice(i, i + 1), slice(start, end)) for i, (start, end) in enumerate(spans) if end > start)
        return
    nrows, together = x.shape[0] if spans is None else len(spans), x.shape[0] if spans is None else len(spans)
    if x.device.type == "cpu":
        tokens = min(DEFAULT_CHUNK_SIZE, length or 1)
        most = max(1, CHUNK_ELEMENTS // (tokens * x.shape[2] * x.shape[3]))
        together = -(-nrows // -(-nrows // most))  # as equal as they come
    for row in range(0, nrows, together):
        yield Piece(slice(row, min(row + together, nrows)), nseq=None if spans is None else nrows)


@dataclass(frozen=True, slots=True)
class Layout:
    """The caller's (b, l, h, p) and (b, l, g, n), and one row per (batch row, group) inside."""

    batch: int
    ngroups: int
    k: int
    p: int
    n: int

    @classmethod
    def of(cls, x: Tensor, B: Tensor) -> "Layout":
        """Reads the sizes off a piece."""
        return cls(x.shape[0], B.shape[2], x.shape[2] // B.shape[2], x.shape[3], B.shape[3])

    @property
    def m(self) -> int:
        """Rows inside."""
        return self.batch * self.ngroups

    def heads(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(b, q, h, p) -> (m, q, k, p): a view for one group, else one copy."""
        t = t.to(dtype)
        if self.ngroups == 1:
            return t
        t = t.unflatten(2, (self.ngroups, self.k)).transpose(1, 2)
        return t.reshape(self.m, t.shape[2], self.k, self.p)

    def group(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(b, q, g, n) -> (m, q, n): a view for one group, else one copy."""
        t = t.to(dtype)
        return t.squeeze(2) if self.ngroups == 1 else t.transpose(1, 2).reshape(self.m, t.shape[1], self.n)

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

    def state_in(self, state: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(b, h, p, n) -> (m, n, k * p), a fresh tensor; None is zero."""
        if state is None:
            return torch.zeros(self.m, self.n, self.k * self.p, dtype=dtype, device=device)
        state = state.to(dtype).reshape(self.m, self.k * self.p, self.n)
        return state.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def state_out(self, state: Tensor) -> Tensor:
        """(m, n, k * p) -> (b, h, p, n)."""
        return state.transpose(1, 2).reshape(self.batch, self.ngroups * self.k, self.p, self.n)

    def decay_state(self, state: Tensor, total: Tensor) -> Tensor:
        """exp(cs_Q) S for a state (m, n, k * p) and `total` (m, 1, k, 1), as a fresh tensor."""
        return (state.view(self.m, self.n, self.k, self.p) * total).view(state.shape)

    def head_product(self, weights: Tensor, values: Tensor) -> Tensor:
        """Per head (q, q) @ (q, p): weights (m, k, q, q), values (m, q, k, p) -> (m, q, k, p)."""
        q = values.shape[1]
        out = torch.bmm(weights.reshape(-1, q, q), values.transpose(1, 2).reshape(-1, q, self.p))
        return out.view(self.m, self.k, q, self.p).transpose(1, 2)

    def head_outer(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Per head (q, p) @ (p, q): both (m, q, k, p) -> (m, k, q, q)."""
        q = rows.shape[1]
        left, right = (t.transpose(1, 2).reshape(-1, q, self.p) for t in (rows, columns))
        return torch.bmm(left, right.mT).view(self.m, self.k, q, q)


@dataclass(frozen=True, slots=True)
class Decays:
    """What the log-decays of a piece give, for every chunk.

    The prefix sums and their differences are float64: one steep token would cost every mild one after it its precision.
    """

    sums: Tensor  # (m, c, k, q) cs, float64
    upper: Tensor  # (q, q) -inf above the diagonal, else 0
    scale: Tensor | None  # (m, c, k, 1, q)
    from_start: Tensor  # (m, c, q, k, 1) exp(cs_i)
    to_end: Tensor  # (m, c, q, k, 1) exp(cs_Q - cs_j)
    total: Tensor  # (m, c, 1, k, 1) exp(cs_Q)

    @classmethod
    def build(cls, scale: Tensor | None, log_decay: Tensor, layout: Layout, chunk: int, dtype: torch.dtype) -> "Decays":
        """From `scale` and `log_decay` (b, l, h) of a piece."""
        pad = -log_decay.shape[1] % chunk

        def by_chunk(t: Tensor) -> Tensor:  # (b, l, h) -> (m, c, k, q)
            t = F.pad(t, (0, 0, 0, pad)).unflatten(2, (layout.ngroups, -1)).permute(0, 2, 3, 1)
            return t.flatten(0, 1).unflatten(-1, (-1, chunk)).transpose(1, 2)

        sums = by_chunk(log_decay.clamp(min=LOWEST_LOG_DECAY).double()).cumsum(-1)
        last = sums[..., -1:]
        columns = (0, 1, 3, 2)
        return cls(
            sums=sums,
            upper=torch.full((chunk, chunk), float("-inf"), dtype=dtype, device=sums.device).triu_(1),
            scale=None if scale is None else by_chunk(scale.to(dtype)).unsqueeze(-2),
            from_start=exp_(sums.to(dtype, copy=True)).permute(columns).unsqueeze(-1),
            to_end=exp_((last - sums).to(dtype)).permute(columns).unsqueeze(-1),
            total=exp_(last.to(dtype, copy=True)).unsqueeze(2),
        )

    def mask(self, c: int, q: int) -> Tensor:
        """L of chunk `c`: (m, k, q, q), exp(cs_i - cs_j) on and below the diagonal, 0 above.

        The upper triangle is masked before the exponential, where it could overflow.
        """
        sums, upper = self.sums[:, c, :, :q], self.upper[:q, :q]
        return exp_((sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(upper.dtype).add_(upper))

    def token_scale(self, c: int, q: int) -> Tensor:
        """s_j of chunk `c`: (m, q, k, 1)."""
        assert self.scale is not None
        return self.scale[:, c, :, 0, :q].transpose(1, 2).unsqueeze(-1)

    def inputs_to_end(self, c: int, q: int) -> Tensor:
        """exp(cs_Q - cs_j) s_j of chunk `c`: (m, q, k, 1)."""
        to_end = self.to_end[:, c, :q]
        return to_end if self.scale is None else to_end * self.token_scale(c, q)


def exp_(exponents: Tensor) -> Tensor:
    """exp in place; exactly 0 where the result would be tiny.

    Unlike exp2, exp rounds an element the same wherever it stands in memory: a sequence has the same bits in any batch.
    """
    lowest = SMALLEST_EXPONENT[exponents.dtype]
    return torch.threshold_(exponents.clamp_(min=lowest).exp_(), 2 * math.exp(lowest), 0.0)
