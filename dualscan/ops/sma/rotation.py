"""Rotation by position, and states that are independent of where counting began.

A head whose decay is a complex number, or whose features turn with the position, is an ordinary head with rotated
queries and keys: only the difference of two positions counts. So every call may count from 0, if the state that it
hands on is turned to the origin of the next.
"""

import torch
from torch import Tensor

from dualscan.ops.varlen import sequence_index


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + n/2}) by `angles`.

    Args:
        x: `(..., n)`, n even.
        angles: broadcasts to `(..., n / 2)`, radians.

    Returns:
        Like x: [a cos - b sin, a sin + b cos] for x = [a, b].

    Example:
        >>> rotate(torch.tensor([1.0, 0.0]), torch.tensor([torch.pi / 2])).round().tolist()
        [-0.0, 1.0]
    """
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def positions(seqlen: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """`(seqlen,)` float64: the place of every token in its sequence, from 0."""
    place = torch.arange(seqlen, device=device)
    if cu_seqlens is not None:
        place = place - cu_seqlens[sequence_index(cu_seqlens, seqlen)]
    return place.double()


def advance(state: Tensor, rates: Tensor, seqlen: int, cu_seqlens: Tensor | None) -> Tensor:
    """Turns states to the origin of the next call.

    Args:
        state: `(batch or nseq, nheads, headdim, n)` after the last token.
        rates: broadcasts to `(nheads, n / 2)`, radians a token.
        seqlen: tokens of the call.
        cu_seqlens: as in `ssd`; every sequence has its own length then.

    Returns:
        Like state.
    """
    if cu_seqlens is None:
        return rotate(state, -seqlen * rates.unsqueeze(-2))
    lengths = cu_seqlens.diff().double()
    return rotate(state, -lengths[:, None, None, None] * rates.unsqueeze(-2))
