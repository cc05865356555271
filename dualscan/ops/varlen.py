"""Packed sequences: everything that reads `cu_seqlens`.

A packed batch holds several sequences one after the other along the time dimension of a batch of one. `cu_seqlens`
holds the
boundaries: sequence `i` is `[cu_seqlens[i], cu_seqlens[i + 1])`. Length-0 and length-1 sequences are allowed.
"""

import itertools

import torch
from torch import Tensor


def validate_cu_seqlens(cu_seqlens: Tensor, *, batch: int, seqlen: int, device: torch.device, name: str) -> None:
    """Checks the packed layout's contract; reads the values only where that needs no synchronisation (CPU).

    Args:
        cu_seqlens: `(nseq + 1,)` int32 boundaries.
        batch: batch size of the packed tensor, must be 1.
        seqlen: total packed length, must equal the last boundary.
        device: device of the packed tensor.
        name: the operator, for the error text.

    Raises:
        TypeError: not an int32 tensor.
        ValueError: wrong rank, device, batch, first or last value, or boundaries that decrease.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name}: cu_seqlens must be an int32 tensor, got {type(cu_seqlens).__name__}.")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(
            f"{name}: cu_seqlens has dtype {cu_seqlens.dtype}; use torch.int32 (cu_seqlens.to(torch.int32))."
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name}: cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected (nseq + 1,).")
    if cu_seqlens.device != device:
        raise ValueError(f"{name}: cu_seqlens is on {cu_seqlens.device}, the tensors on {device}; move it there.")
    if batch != 1:
        raise ValueError(f"{name}: batch={batch} with cu_seqlens; a packed batch has batch 1 (concatenate along time).")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != seqlen:
            raise ValueError(
                f"{name}: cu_seqlens runs from {bounds[0]} to {bounds[-1]}; it must run from 0 to seqlen={seqlen}."
            )
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            if end < start:
                raise ValueError(
                    f"{name}: cu_seqlens must not decrease, but cu_seqlens[{i}]={start} > "
                    f"cu_seqlens[{i + 1}]={end}; sort it."
                )


def sequence_spans(cu_seqlens: Tensor | None, seqlen: int) -> list[tuple[int, int]]:
    """`[start, end)` of every packed sequence, on the host (synchronises on a GPU); one span without `cu_seqlens`."""
    if cu_seqlens is None:
        return [(0, seqlen)]
    bounds = cu_seqlens.tolist()
    return list(itertools.pairwise(bounds))


def common_length(spans: list[tuple[int, int]]) -> int | None:
    """The length that all spans share, or None: equal-length packs are computed as an ordinary batch."""
    lengths = {end - start for start, end in spans}
    return lengths.pop() if len(lengths) == 1 else None


def sequence_index(cu_seqlens: Tensor, seqlen: int) -> Tensor:
    """`(seqlen,)` int64: the number of the sequence that each packed token belongs to.

    Example:
        >>> sequence_index(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 5).tolist()
        [0, 0, 2, 2, 2]
    """
    positions = torch.arange(seqlen, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
