"""Documents as one stream of token ids, and windows of it with `cu_seqlens`.

The stream S holds the documents' tokens with the end-of-document id after each. Position i is the *target* S[i]; its
*input* is S[i - 1], and the end-of-document id for i = 0, so that the id that closes a document also opens the next. A
document of n tokens therefore covers n + 1 positions: inputs (eos, t1, ..., tn), targets (t1, ..., tn, eos). Every
token is predicted exactly once, and cutting S anywhere loses none.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from dualscan.data.sources import Document
from dualscan.data.tokenizer import Tokenizer

# Targets that stand for no token; torch.nn.functional.cross_entropy leaves them out by default.
IGNORE_INDEX = -100
# Documents are encoded together up to about this many characters, which is enough to keep every core busy.
_BATCH_CHARACTERS = 1 << 20


class TokenSource(Protocol):
    """A stream S of tokens, wherever it lies: `TokenStream`, `TokenShards`, `TokenView`."""

    @property
    def eos_id(self) -> int:
        """The end-of-document id."""
        ...

    @property
    def document_starts(self) -> np.ndarray:
        """`(ndocuments,)` int64: the position of each document's first target, ascending from 0."""
        ...

    @property
    def document_nbytes(self) -> np.ndarray:
        """`(ndocuments,)` int64: the UTF-8 bytes of each document's text."""
        ...

    def __len__(self) -> int:
        """Number of positions, one end-of-document id for each document included."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """S[start:stop] as an integer array; 0 <= start <= stop <= len."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class TokenStream:
    """A token stream in memory.

    Args:
        tokens: `(length,)` integers: the documents' ids, the end-of-document id after each.
        document_starts: `(ndocuments,)` ascending positions, the first 0.
        document_nbytes: `(ndocuments,)` UTF-8 bytes of each document.
        eos_id: the end-of-document id.

    Raises:
        TypeError: an array that is not of integers.
        ValueError: wrong rank, no document, boundaries out of order, or a document without its end-of-document id.

    Example:
        >>> stream = TokenStream.from_ids([[5, 6], [7]], eos_id=0)
        >>> stream.tokens.tolist(), stream.document_starts.tolist()
        ([5, 6, 0, 7, 0], [0, 3])
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    document_nbytes: np.ndarray
    eos_id: int

    def __post_init__(self) -> None:
        for name in ("tokens", "document_starts", "document_nbytes"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
                raise TypeError(
                    f"{name} must be a numpy array of integers, got {getattr(array, 'dtype', type(array).__name__)}."
                )
            if array.ndim != 1 or not len(array):
                raise ValueError(f"{name} has shape {array.shape}; expected one dimension with at least one entry.")
        starts = self.document_starts
        if len(self.document_nbytes) != len(starts):
            raise ValueError(
                f"document_nbytes has {len(self.document_nbytes)} entries, document_starts {len(starts)}; match them."
            )
        if starts[0] != 0 or starts[-1] >= len(self.tokens) or (np.diff(starts) <= 0).any():
            raise ValueError(
                f"document_starts must ascend from 0 to below {len(self.tokens)} (the number of tokens); sort them."
            )
        ends = self.tokens[np.append(starts[1:], len(self.tokens)) - 1]
        if (ends != self.eos_id).any():
            document = int(np.flatnonzero(ends != self.eos_id)[0])
            raise ValueError(
                f"document {document} ends with id {ends[document]}, not with eos_id={self.eos_id}; append it to each."
            )

    @classmethod
    def from_ids(
        cls, ids: Iterable[Iterable[int]], *, eos_id: int, nbytes: Iterable[int] | None = None
    ) -> "TokenStream":
        """The stream of some documents given as ids; `nbytes` are their sizes as text (default: one byte a token)."""
        arrays = [np.array(list(document), dtype=np.int64) for document in ids]
        sizes = [len(array) for array in arrays] if nbytes is None else list(nbytes)
        return cls._from_arrays(arrays, sizes, eos_id, np.dtype(np.int64))

    @classmethod
    def from_documents(cls, documents: Iterable[Document], tokenizer: Tokenizer) -> "TokenStream":
        """Encodes documents into memory, 2 bytes a token up to a vocabulary of 65536 and 4 beyond.

        Raises:
            ValueError: there is no document.
        """
        dtype = token_dtype(tokenizer.vocab_size)
        encoded = [(ids.astype(dtype), nbytes) for ids, nbytes in encode_documents(documents, tokenizer)]
        return cls._from_arrays([ids for ids, _ in encoded], [nbytes for _, nbytes in encoded], tokenizer.eos_id, dtype)

    @classmethod
    def _from_arrays(cls, arrays: list[np.ndarray], sizes: list[int], eos_id: int, dtype: np.dtype) -> "TokenStream":
        if not arrays:
            raise ValueError("there is no document; give at least one.")
        end = np.array([eos_id], dtype=dtype)
        lengths = np.array([len(array) + 1 for array in arrays], dtype=np.int64)
        return cls(
            tokens=np.concatenate([part for array in arrays for part in (array, end)]),
            document_starts=np.cumsum(lengths) - lengths,
            document_nbytes=np.array(sizes, dtype=np.int64),
            eos_id=eos_id,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """S[start:stop], a view."""
        return self.tokens[start:stop]


class TokenView:
    """Some consecutive documents of a token source, themselves a source.

    Args:
        source: the whole.
        first: number of the first document.
        last: number after the last document.

    Raises:
        ValueError: the range is empty or outside the source.
    """

    def __init__(self, source: TokenSource, first: int, last: int) -> None:
        count = len(source.document_starts)
        if not 0 <= first < last <= count:
            raise ValueError(f"documents [{first}, {last}) of a source of {count}; give 0 <= first < last <= {count}.")
        self._source = source
        self._start = int(source.document_starts[first])
        self._stop = int(source.document_starts[last]) if last < count else len(source)
        self.eos_id = source.eos_id
        self.document_starts = source.document_starts[first:last] - self._start
        self.document_nbytes = source.document_nbytes[first:last]

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self, start: int, stop: int) -> np.ndarray:
        """S[start:stop] of the view."""
        return self._source.read(self._start + start, self._start + stop)


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that tokens are kept in: uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """Encodes documents, several at a time.

    Args:
        documents: the documents, read lazily.
        tokenizer: what encodes them.

    Returns:
        An iterator of each document's ids, `(ntokens,)` integers without the end-of-document id, and its UTF-8 bytes.
    """
    texts: list[str] = []
    characters = 0

    def encode() -> Iterator[tuple[np.ndarray, int]]:
        encoded = tokenizer.encode_batch(texts)
        yield from ((ids, len(text.encode("utf-8"))) for text, ids in zip(texts, encoded, strict=True))

    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield from encode()
            texts, characters = [], 0
    yield from encode()


def gather_windows(source: TokenSource, starts: np.ndarray, seqlen: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows of `seqlen` positions that begin at `starts`.

    Args:
        source: the stream.
        starts: `(nwindows,)` positions, each in [0, len(source)).
        seqlen: window length; a window that reaches past the end is padded.

    Returns:
        Inputs and targets, both `(nwindows, seqlen)` int64. Padding is the end-of-document id in the inputs and -100
        in the targets.

    Example:
        >>> stream = TokenStream.from_ids([[5, 6], [7]], eos_id=0)
        >>> [array.tolist() for array in gather_windows(stream, np.array([0, 4]), 2)]
        [[[0, 5], [7, 0]], [[5, 6], [0, -100]]]
    """
    inputs = np.full((len(starts), seqlen), source.eos_id, dtype=np.int64)
    targets = np.full((len(starts), seqlen), IGNORE_INDEX, dtype=np.int64)
    for row, start in enumerate(starts.tolist()):
        stop = min(start + seqlen, len(source))
        before = min(start, 1)
        span = source.read(start - before, stop)
        targets[row, : stop - start] = span[before:]
        inputs[row, 1 - before : stop - start] = span[:-1]
    return inputs, targets


def window_cu_seqlens(source: TokenSource, starts: np.ndarray, seqlen: int) -> np.ndarray:
    """The boundaries of windows laid end to end: every window start, every document start, the start of padding.

    Args:
        source: the stream.
        starts: `(nwindows,)` positions, each in [0, len(source)).
        seqlen: window length.

    Returns:
        `(nsequences + 1,)` int32 from 0 to nwindows * seqlen, strictly ascending.

    Example:
        >>> stream = TokenStream.from_ids([[5, 6], [7]], eos_id=0)
        >>> window_cu_seqlens(stream, np.array([0, 2]), 4).tolist()
        [0, 3, 4, 5, 7, 8]
    """
    boundaries = source.document_starts
    first = np.searchsorted(boundaries, starts, side="right")
    last = np.searchsorted(boundaries, starts + seqlen, side="left")
    pieces = []
    for row, (start, low, high) in enumerate(zip(starts.tolist(), first.tolist(), last.tolist(), strict=True)):
        pieces += [[row * seqlen], boundaries[low:high] + (row * seqlen - start)]
        if len(source) < start + seqlen:
            # Padding is a sequence of its own: it begins where a further document would.
            pieces.append([row * seqlen + len(source) - start])
    pieces.append([len(starts) * seqlen])
    return np.concatenate(pieces).astype(np.int32)


def bytes_before(source: TokenSource, positions: np.ndarray) -> np.ndarray:
    """Text bytes behind the targets before each position, in proportion within a document.

    Exact at document boundaries, hence over any number of whole documents, for every tokenizer; exact everywhere for
    bytes.

    Args:
        source: the stream.
        positions: `(n,)` positions from 0 to len(source).

    Returns:
        `(n,)` int64.
    """
    starts = source.document_starts
    ends = np.append(starts[1:], len(source)) - 1
    total = np.cumsum(source.document_nbytes)
    # Within a document the bytes grow over its tokens; its end-of-document id adds none.
    knots = np.stack([starts, ends], axis=1).ravel()
    values = np.stack([total - source.document_nbytes, total], axis=1).ravel()
    return np.rint(np.interp(positions, knots, values)).astype(np.int64)
