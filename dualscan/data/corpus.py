"""From a path to two token sources, one to train on and one held out."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from dualscan.data.packing import TokenSource, TokenStream, TokenView
from dualscan.data.shards import INDEX_FILE, TokenShards, write_shards
from dualscan.data.sources import Document, documents, embedded, text_files
from dualscan.data.tokenizer import Tokenizer

# Files of this many bytes in all go to shards rather than to memory, where the caller names a cache folder.
SHARD_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedCorpus:
    """Text ready for training.

    Attributes:
        train: the tokens to train on.
        validation: the tokens held out, of other documents (or of the end of the only one).
        tokenizer: what encoded both.
        name: what the text is, for people.
    """

    train: TokenSource
    validation: TokenSource
    tokenizer: Tokenizer
    name: str


def prepare(
    source: str | Path | None,
    tokenizer: Tokenizer,
    *,
    validation: str | Path | None = None,
    validation_fraction: float = 0.1,
    cache: str | Path | None = None,
) -> TokenizedCorpus:
    """Reads, encodes and splits a text.

    Without `validation` the end of the text is held out: whole documents, cut at the document start nearest to the
    wanted fraction of tokens; of a single document its tail, from the line start nearest to the fraction of
    characters. The embedded text has its own held-out play.

    Args:
        source: a text file, a JSON-lines file or a folder of those (see `dualscan.data.sources.documents`); None is
            the embedded text.
        tokenizer: what encodes it.
        validation: held-out text of its own, like `source`; then all of `source` trains.
        validation_fraction: part of the text to hold out, between 0 and 1; unused for the embedded text and with
            `validation`.
        cache: a folder for the tokens of texts of 64 MiB and more, which are then memory-mapped and found again by the
            next call. None keeps every text in memory.

    Returns:
        The two token sources.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a text is empty, too short to split or damaged, or the fraction is out of range.

    Example:
        >>> from dualscan.data.tokenizer import ByteTokenizer
        >>> corpus = prepare(None, ByteTokenizer())
        >>> len(corpus.train), len(corpus.validation)
        (954976, 100936)
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction} is outside (0, 1); 0.1 holds out a tenth.")
    if source is None and validation is None:
        train, held_out = (TokenStream.from_documents(embedded(split), tokenizer) for split in ("train", "validation"))
        return TokenizedCorpus(
            train=train, validation=held_out, tokenizer=tokenizer, name="embedded text (Shakespeare)"
        )
    if validation is not None:
        train, held_out = (_encode(path, tokenizer, None, cache) for path in (source, validation))
    else:
        whole = _encode(source, tokenizer, validation_fraction, cache)
        cut = _document_cut(whole, validation_fraction)
        train, held_out = TokenView(whole, 0, cut), TokenView(whole, cut, len(whole.document_starts))
    return TokenizedCorpus(
        train=train, validation=held_out, tokenizer=tokenizer, name="embedded text" if source is None else str(source)
    )


def split_document(document: Document, validation_fraction: float) -> tuple[Document, Document]:
    """Cuts one document in two at the line start nearest to the fraction; at a space or anywhere in a single line.

    Raises:
        ValueError: the text is too short for two parts with text.

    Example:
        >>> [part.text for part in split_document(Document("one\\ntwo\\nthree\\n", "doc"), 0.4)]
        ['one\\ntwo\\n', 'three\\n']
    """
    text = document.text
    wanted = len(text) * (1 - validation_fraction)
    # Both parts must hold more than white space.
    low, high = len(text) - len(text.lstrip()) + 1, len(text.rstrip()) - 1
    if low > high:
        raise ValueError(
            f"{document.name} is too short to hold out a part of it; give more text, or a validation file."
        )
    for separator in ("\n", " "):
        before = text.rfind(separator, low - 1, max(round(wanted), low)) + 1
        after = text.find(separator, max(round(wanted), low), high) + 1
        cuts = [cut for cut in (before, after) if low <= cut <= high]
        if cuts:
            break
    else:
        cuts = [min(max(round(wanted), low), high)]
    cut = min(cuts, key=lambda cut: abs(cut - wanted))
    return Document(text[:cut], f"{document.name} (start)"), Document(text[cut:], f"{document.name} (end)")


def _encode(
    path: str | Path | None, tokenizer: Tokenizer, fraction: float | None, cache: str | Path | None
) -> TokenSource:
    """The tokens of one path, at least two documents if `fraction` is given; from the cache where the text is large."""
    if path is None:
        return TokenStream.from_documents(embedded(), tokenizer)
    files = text_files(path)
    if cache is None or sum(file.stat().st_size for file in files) < SHARD_BYTES:
        return TokenStream.from_documents(_at_least_two(documents(path), fraction), tokenizer)
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([state, tokenizer.fingerprint, fraction]).encode()).hexdigest()[:16]
    folder = Path(cache) / f"{Path(path).stem}-{key}"
    if (folder / INDEX_FILE).is_file():
        return TokenShards(folder)
    return write_shards(_at_least_two(documents(path), fraction), tokenizer, folder)


def _at_least_two(source: Iterator[Document], fraction: float | None) -> Iterable[Document]:
    if fraction is None:
        return source
    first = list(itertools.islice(source, 2))
    return split_document(first[0], fraction) if len(first) == 1 else itertools.chain(first, source)


def _document_cut(source: TokenSource, fraction: float) -> int:
    """The number of the document whose start is nearest to the cut, at least one on either side."""
    starts = source.document_starts[1:]
    wanted = len(source) * (1 - fraction)
    after = min(int(starts.searchsorted(wanted)), len(starts) - 1)
    before = max(after - 1, 0)
    return 1 + min((before, after), key=lambda index: abs(int(starts[index]) - wanted))
