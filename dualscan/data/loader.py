"""Batches of token windows: a resumable, seeded training loader and a sequential pass for evaluation.

An epoch cuts the stream into windows of `seqlen` positions from a random offset below `seqlen` and takes them in
random order; offset and order depend on the seed and the epoch alone. The order continues from epoch to epoch without
a gap, so that batches are always full. What falls before the offset or after the last whole window (less than two
windows) waits for another epoch's offset.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualscan.data.packing import TokenSource, bytes_before, gather_windows, window_cu_seqlens
from dualscan.data.tokenizer import Tokenizer


class Batch(NamedTuple):
    """Windows of tokens.

    Attributes:
        tokens: `(batch_size, seqlen)` int64 inputs; `(1, batch_size * seqlen)` when packed.
        targets: as `tokens`: the next token of each, -100 where there is none.
        cu_seqlens: `(nsequences + 1,)` int32 boundaries when packed, else None.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None


class EvaluationBatch(NamedTuple):
    """A batch together with the text behind its targets.

    Attributes:
        tokens: as in `Batch`.
        targets: as in `Batch`.
        cu_seqlens: as in `Batch`.
        nbytes: UTF-8 bytes that the targets stand for, for bits per byte.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    nbytes: int


class Loader:
    """Endless training batches; `state_dict` and `load_state_dict` continue exactly, in the middle of an epoch too.

    Args:
        source: the tokens.
        batch_size: windows in a batch, for each rank.
        seqlen: positions in a window.
        packed: False gives `(batch_size, seqlen)` batches in which documents run on into each other; True gives one
            row with `cu_seqlens` at window and document starts, so that no document sees another.
        seed: picks offsets and orders.
        rank: which of the `world_size` shares of each global batch this loader gives.
        world_size: number of loaders that share the source.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a size out of range, or fewer tokens than one window.

    Example:
        >>> from dualscan.data.packing import TokenStream
        >>> loader = Loader(TokenStream.from_ids([range(1, 10)], eos_id=0), batch_size=2, seqlen=4)
        >>> batch = next(loader)
        >>> batch.tokens.shape, bool((batch.tokens[:, 1:] == batch.targets[:, :-1]).all())
        (torch.Size([2, 4]), True)
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        batch_size: int,
        seqlen: int,
        packed: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_sizes(batch_size, seqlen, rank, world_size)
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r} must be an integer that is not negative.")
        if len(source) < seqlen:
            raise ValueError(
                f"the text has {len(source)} tokens, fewer than seqlen={seqlen}; use a shorter seqlen or more text."
            )
        self._source, self._packed = source, packed
        self._batch_size, self._seqlen, self._seed = batch_size, seqlen, seed
        self._rank, self._world_size = rank, world_size
        self._begin_epoch(0)

    @property
    def epochs(self) -> float:
        """Passes over the source so far, with the fraction of the current one."""
        return self._epoch + self._position / len(self._starts)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        starts = self._take(self._world_size * self._batch_size)
        starts = starts[self._rank * self._batch_size : (self._rank + 1) * self._batch_size]
        return _batch(self._source, starts, self._seqlen, self._packed)

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands: plain integers, the same on every rank."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "seqlen": self._seqlen,
            "ntokens": len(self._source),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`; with another batch size or number of ranks, too, the windows go on in order.

        Raises:
            ValueError: a state of another source, seed or window length, or no such state.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(
                f"a loader's state has the keys {', '.join(own)}, got {', '.join(map(str, state)) or 'none'}."
            )
        for key in ("seed", "seqlen", "ntokens"):
            if state[key] != own[key]:
                raise ValueError(
                    f"the saved loader has {key}={state[key]}, not {own[key]}; resume with the same data and sizes."
                )
        self._begin_epoch(state["epoch"])
        if not 0 <= state["position"] <= len(self._starts):
            raise ValueError(
                f"position={state['position']} is outside [0, {len(self._starts)}], an epoch; damaged state."
            )
        self._position = state["position"]

    def _begin_epoch(self, epoch: int) -> None:
        random = np.random.default_rng([self._seed, epoch])
        # At least one whole window must fit behind the offset.
        offset = int(random.integers(min(self._seqlen, len(self._source) - self._seqlen + 1)))
        count = (len(self._source) - offset) // self._seqlen
        self._starts = offset + self._seqlen * random.permutation(count)
        self._epoch, self._position = epoch, 0

    def _take(self, count: int) -> np.ndarray:
        """The next `count` window starts, from as many epochs as that takes."""
        pieces = []
        while count:
            if self._position == len(self._starts):
                self._begin_epoch(self._epoch + 1)
            piece = self._starts[self._position : self._position + count]
            pieces.append(piece)
            self._position += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)


def evaluation_batches(
    source: TokenSource,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seqlen: int,
    packed: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[EvaluationBatch]:
    """One sequential pass in which every token is a target exactly once.

    bits per byte = sum of the targets' negative log-likelihoods / (ln 2 * sum of `nbytes`), over all batches of all
    ranks.

    Args:
        source: the tokens.
        tokenizer: what encoded them; it knows the bytes behind an id. Where ids alone do not tell (a tokenizer that is
            not byte-level or normalises the text) a document's bytes count in proportion to its tokens, which is exact
            over whole documents.
        batch_size: windows in a batch; the last batch may hold fewer.
        seqlen: positions in a window; the last window is padded with targets of -100.
        packed: as in `Loader`.
        rank: this rank takes every `world_size`-th batch.
        world_size: number of ranks.

    Returns:
        An iterator of `EvaluationBatch`.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a size out of range.
    """
    _check_sizes(batch_size, seqlen, rank, world_size)
    starts = np.arange(0, len(source), seqlen)
    nbytes = _byte_counter(source, tokenizer, np.append(starts, len(source)))

    def batches() -> Iterator[EvaluationBatch]:
        for index in range(rank, math.ceil(len(starts) / batch_size), world_size):
            rows = slice(index * batch_size, min((index + 1) * batch_size, len(starts)))
            batch = _batch(source, starts[rows], seqlen, packed)
            yield EvaluationBatch(*batch, nbytes=nbytes(rows.start, rows.stop))

    return batches()


def _batch(source: TokenSource, starts: np.ndarray, seqlen: int, packed: bool) -> Batch:
    inputs, targets = gather_windows(source, starts, seqlen)
    if not packed:
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), None)
    boundaries = torch.from_numpy(window_cu_seqlens(source, starts, seqlen))
    return Batch(torch.from_numpy(inputs.reshape(1, -1)), torch.from_numpy(targets.reshape(1, -1)), boundaries)


def _byte_counter(source: TokenSource, tokenizer: Tokenizer, edges: np.ndarray) -> Callable[[int, int], int]:
    """The function that counts the text bytes from one of the edges to another."""
    lengths = tokenizer.byte_lengths()
    if lengths is None:
        behind = bytes_before(source, edges)
        return lambda first, last: int(behind[last] - behind[first])
    table = lengths
    return lambda first, last: int(table[source.read(int(edges[first]), int(edges[last]))].sum())


def _check_sizes(batch_size: int, seqlen: int, rank: int, world_size: int) -> None:
    for name, value in (("batch_size", batch_size), ("seqlen", seqlen), ("world_size", world_size)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}.")
        if value < 1:
            raise ValueError(f"{name}={value}; it must be at least 1.")
    if not isinstance(rank, int) or not 0 <= rank < world_size:
        raise ValueError(f"rank={rank!r} is outside [0, {world_size}), the ranks of world_size={world_size}.")
    if batch_size * seqlen >= 2**31:
        raise ValueError(
            f"batch_size={batch_size} x seqlen={seqlen} passes 2^31, the limit of int32 cu_seqlens; use smaller ones."
        )
