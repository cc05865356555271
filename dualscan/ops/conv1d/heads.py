"""The heads of sequences: the first `halo = width - 1` tokens, which see the initial state; and the final states.

Two layouts with the same methods: `RowHeads`, each row of the batch is a sequence, and `PackedHeads`, one row holds
them all. "Windows" are `[initial state, first tokens]`, `(nseq, halo + longest, channels)`, time in the middle and
oldest first.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowHeads(NamedTuple):
    """One sequence per row; everything is a slice."""

    nseq: int
    halo: int
    seqlen: int

    @property
    def longest(self) -> int:
        """Tokens in a head."""
        return min(self.halo, self.seqlen)

    def take(self, x: Tensor) -> Tensor:
        """`(nseq, longest, channels)`: the heads of `x`."""
        return x[:, : self.longest]

    def put(self, y: Tensor, values: Tensor) -> None:
        """Writes the heads of `y`."""
        y[:, : self.longest] = values

    def add(self, dx: Tensor, values: Tensor) -> None:
        """Adds to the heads of `dx`."""
        dx[:, : self.longest] += values

    def clear(self, values: Tensor, start: int, end: int) -> None:
        """Zeroes the heads in `values`, the part `[start, end)` of a row; no part that is asked for has any."""

    def final(self, x: Tensor, windows: Tensor) -> Tensor:
        """`(nseq, halo, channels)`: the last `halo` entries of `[initial state, sequence]`."""
        return windows[:, self.seqlen :] if self.seqlen <= self.halo else x[:, self.seqlen - self.halo :]

    def add_final(self, dx: Tensor, dwindows: Tensor, dfinal: Tensor) -> None:
        """The backward of `final`, added to `dx` and to the initial state's part of `dwindows`."""
        kept = self.halo - self.longest
        dwindows[:, self.seqlen : self.seqlen + kept] += dfinal[:, :kept]
        dx[:, self.seqlen - self.longest :] += dfinal[:, kept:]


class PackedHeads(NamedTuple):
    """All sequences in one row; ragged, so a head may have fewer tokens than `longest`.

    Attributes:
        nseq: sequences.
        halo: `width - 1`.
        longest: longest possible head, `min(halo, seqlen)`.
        is_token: `(nseq, longest)` bool, whether the sequence is long enough to have this token.
        tokens: positions in the row of the head tokens, in the order of `is_token`'s True elements.
        from_tokens: `(nseq, halo)` bool, whether this entry of the final state is a token rather than an older initial
            entry.
        final_tokens: positions of those tokens, in the order of `from_tokens`'s True elements.
        older: `(nseq, halo, 1)` index into the initial state of the other entries (any valid index where it is a
            token).
    """

    nseq: int
    halo: int
    longest: int
    is_token: Tensor
    tokens: Tensor
    from_tokens: Tensor
    final_tokens: Tensor
    older: Tensor

    @classmethod
    def locate(cls, cu_seqlens: Tensor, halo: int, seqlen: int) -> "PackedHeads":
        """Finds the heads in a packed row of `seqlen` tokens."""
        bounds = cu_seqlens.long()
        start, length = bounds[:-1, None], bounds.diff()[:, None]
        offset = torch.arange(halo, device=bounds.device)
        head = offset[: min(halo, seqlen)]
        is_token = head < length
        last = length + offset
        from_tokens = last >= halo
        return cls(
            len(bounds) - 1,
            halo,
            len(head),
            is_token,
            (start + head)[is_token],
            from_tokens,
            (start + last - halo)[from_tokens],
            last.clamp(max=max(halo - 1, 0))[..., None],
        )

    def take(self, x: Tensor) -> Tensor:
        """`(nseq, longest, channels)`: the heads of `x`, zero where a sequence is shorter."""
        values = x.new_zeros(self.nseq, self.longest, x.shape[2])
        values[self.is_token] = x[0, self.tokens]
        return values

    def put(self, y: Tensor, values: Tensor) -> None:
        """Writes the heads of `y`."""
        y[0, self.tokens] = values[self.is_token].to(y.dtype)

    def add(self, dx: Tensor, values: Tensor) -> None:
        """Adds to the heads of `dx`."""
        dx[0, self.tokens] += values[self.is_token]

    def clear(self, values: Tensor, start: int, end: int) -> None:
        """Zeroes the heads in `values`, the part `[start, end)` of the row."""
        inside = self.tokens[(self.tokens >= start) & (self.tokens < end)]
        values[0, inside - start] = 0

    def final(self, x: Tensor, windows: Tensor) -> Tensor:
        """`(nseq, halo, channels)`: the last `halo` entries of `[initial state, sequence]`."""
        values = windows.take_along_dim(self.older, dim=1)
        values[self.from_tokens] = x[0, self.final_tokens]
        return values

    def add_final(self, dx: Tensor, dwindows: Tensor, dfinal: Tensor) -> None:
        """The backward of `final`, added to `dx` and to the initial state's part of `dwindows`."""
        dx[0, self.final_tokens] += dfinal[self.from_tokens]
        older = dfinal.masked_fill(self.from_tokens[..., None], 0)
        dwindows.scatter_add_(1, self.older.expand_as(older), older)


def locate_heads(x: Tensor, halo: int, cu_seqlens: Tensor | None) -> RowHeads | PackedHeads:
    """The heads of `x` `(batch, seqlen, channels)`."""
    batch, seqlen, _ = x.shape
    return RowHeads(batch, halo, seqlen) if cu_seqlens is None else PackedHeads.locate(cu_seqlens, halo, seqlen)
