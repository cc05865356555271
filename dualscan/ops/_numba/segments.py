"""Sequences cut into blocks of tokens: what the workers of a kernel share out among themselves."""

from functools import lru_cache

import torch
from torch import Tensor

from dualscan.ops._numba.vector import device_function
from dualscan.ops.varlen import sequence_spans

# A row of the table: the batch row, the first token, the number of tokens, the number of blocks before this sequence.
FIELDS = 4


def table(batch: int, seqlen: int, cu_seqlens: Tensor | None, block: int) -> tuple[Tensor, int]:
    """The sequences of a call as `(nseq, 4)` int64, and the number of blocks of `block` tokens in all of them.

    A sequence without tokens has one block, so that its states are seen to.
    """
    if cu_seqlens is None:
        return _dense(batch, seqlen, block)
    return _table([(0, start, end - start) for start, end in sequence_spans(cu_seqlens, seqlen)], block)


@lru_cache(64)
def _dense(batch: int, seqlen: int, block: int) -> tuple[Tensor, int]:
    return _table([(row, 0, seqlen) for row in range(batch)], block)


def _table(sequences: list[tuple[int, int, int]], block: int) -> tuple[Tensor, int]:
    rows, before = [], 0
    for row, start, length in sequences:
        rows.append((row, start, length, before))
        before += max(-(-length // block), 1)
    return torch.tensor(rows, dtype=torch.int64).view(-1, FIELDS), before


@device_function
def sequence_of(segments, nseq, block, first):
    """The sequence that a block belongs to, by bisection; `first` is a sequence at or before it."""
    low, high = first, nseq - 1
    while low < high:
        middle = (low + high + 1) // 2
        if segments[4 * middle + 3] <= block:
            low = middle
        else:
            high = middle - 1
    return low
