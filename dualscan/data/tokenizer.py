"""Text to token ids and back: bytes by default, BPE and `tokenizer.json` files through the `tokenizers` library.

A tokenizer saves itself into a folder (a checkpoint's, usually): the byte tokenizer as `byte_tokenizer.json`, every
other one as `tokenizer.json` with the end-of-document token in `tokenizer_config.json`, which are the names that
`transformers` reads too.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dualscan.data._files import require, write_text

BYTES_FILE = "byte_tokenizer.json"
HF_FILE = "tokenizer.json"
HF_CONFIG_FILE = "tokenizer_config.json"
# Spellings of "this document ends here", the most specific first; used where no tokenizer_config.json names one.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer(Protocol):
    """What the package asks of a tokenizer.

    `eos_id` separates documents: it closes each one and, as the first input, opens the next.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids, the largest id plus one."""
        ...

    @property
    def eos_id(self) -> int:
        """The end-of-document id."""
        ...

    @property
    def fingerprint(self) -> str:
        """A short name that is equal for equal tokenizers; token shards remember it."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any end-of-document id: special tokens spelt out in the text are ordinary text."""
        ...

    def opening(self) -> list[int]:
        """The ids that a text begins with, where another program trained the model."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of several texts, as integer arrays."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; incomplete UTF-8 becomes U+FFFD, special and unknown ids nothing."""
        ...

    def token_bytes(self) -> list[bytes] | None:
        """The bytes that each id writes, or None where an id alone does not determine them (not byte-level)."""
        ...

    def byte_lengths(self) -> np.ndarray | None:
        """`(vocab_size,)` int64: source bytes behind each id (0 for special ids), or None where they do not add up."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into a folder, from which `load_tokenizer` reads it."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("né")
        [110, 195, 169]
        >>> tokenizer.decode([110, 195, 169, tokenizer.eos_id])
        'né'
    """

    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of a text."""
        return list(_utf8(text))

    def opening(self) -> list[int]:
        """The ids before a text: the end of the document before it."""
        return [self.eos_id]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The UTF-8 bytes of several texts, as uint8 arrays."""
        return [np.frombuffer(_utf8(text), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; ids from 256 on (end of document, a model's padding rows) write nothing."""
        return _join(ids, self.token_bytes())

    def token_bytes(self) -> list[bytes]:
        """The byte of each id; nothing for the end of a document."""
        return [bytes([value]) for value in range(256)] + [b""]

    def byte_lengths(self) -> np.ndarray:
        """One byte an id, none for the end of a document."""
        return np.array([1] * 256 + [0], dtype=np.int64)

    def save(self, folder: str | Path) -> None:
        """Writes `byte_tokenizer.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"type": "bytes", "vocab_size": self.vocab_size, "eos_id": self.eos_id}
        write_text(folder / BYTES_FILE, json.dumps(content) + "\n")


class HFTokenizer:
    """A tokenizer of the `tokenizers` library (the `tokenizer.json` of Hugging Face checkpoints).

    Truncation and padding that the file may ask for are switched off, and special tokens spelt out in a text are
    encoded as text, so that no document can lose tokens or end itself early.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; it is copied.
        eos_token: the end-of-document token; None looks for one of the usual spellings.

    Raises:
        ValueError: `eos_token` is not in the vocabulary, or None and no usual spelling is.
    """

    def __init__(self, tokenizer: Any, *, eos_token: str | None = None) -> None:
        library = require("tokenizers", "a tokenizer.json tokenizer")
        self._tokenizer = library.Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._spec: dict[str, Any] = json.loads(self._tokenizer.to_str())
        self._vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if eos_token is None:
            eos_token = next((token for token in END_TOKENS if token in self._vocab), None)
            if eos_token is None:
                raise ValueError(
                    f"the tokenizer has none of the end-of-document tokens {', '.join(END_TOKENS)}; pass eos_token=..."
                )
        if eos_token not in self._vocab:
            raise ValueError(
                f"eos_token={eos_token!r} is not among the tokenizer's {len(self._vocab)} tokens; name one that is."
            )
        self.eos_token = eos_token
        self.eos_id = self._vocab[eos_token]
        # Ids may have gaps, so that the number of tokens is not the number of rows an embedding needs.
        self.vocab_size = max(self._vocab.values()) + 1
        self._token_bytes = _byte_table(self._spec, self._vocab, self.vocab_size, self.eos_id)

    @classmethod
    def from_file(cls, path: str | Path, *, eos_token: str | None = None) -> "HFTokenizer":
        """Reads a `tokenizer.json` file; `eos_token` defaults to the one in the `tokenizer_config.json` beside it.

        Raises:
            ValueError: the file is no tokenizer of the `tokenizers` library.
        """
        path = Path(path)
        library = require("tokenizers", f"reading {path.name}")
        text = _read_json_text(path)
        try:
            tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # The library raises bare Exception.
            raise ValueError(
                f"{path} is not a tokenizer of the tokenizers library ({error}); give its tokenizer.json."
            ) from error
        config_path = path.with_name(HF_CONFIG_FILE)
        if eos_token is None and config_path.is_file():
            named = json.loads(_read_json_text(config_path)).get("eos_token")
            eos_token = named.get("content") if isinstance(named, dict) else named
        return cls(tokenizer, eos_token=eos_token)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokenizer's definition and of its end-of-document id."""
        content = json.dumps([self._spec, self.eos_id], sort_keys=True)
        return f"hf-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        _utf8(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def opening(self) -> list[int]:
        """The special ids that the tokenizer itself puts before a text: its beginning-of-sequence id, often nothing."""
        ids = self._tokenizer.encode("", add_special_tokens=True).ids
        return ids[:-1] if ids[-1:] == [self.eos_id] else ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of several texts as int64 arrays, on all cores."""
        for text in texts:
            _utf8(text)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; special ids and ids beyond the vocabulary write nothing."""
        if self._token_bytes is not None:
            return _join(ids, self._token_bytes)
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> list[bytes] | None:
        """The bytes that each id writes; None for a tokenizer that is not byte-level."""
        return self._token_bytes

    def byte_lengths(self) -> np.ndarray | None:
        """Bytes of source text behind each id; None unless the tokenizer is byte-level and leaves the text as it is."""
        reversible = not self._spec.get("normalizer") and '"add_prefix_space": true' not in json.dumps(
            self._spec.get("pre_tokenizer")
        )
        if self._token_bytes is None or not reversible:
            return None
        return np.array([len(piece) for piece in self._token_bytes], dtype=np.int64)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json`, and the end-of-document token to `tokenizer_config.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / HF_FILE, self._tokenizer.to_str())
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos_token}
        write_text(folder / HF_CONFIG_FILE, json.dumps(config) + "\n")


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Trains a byte-level BPE tokenizer: 256 bytes, `<|endoftext|>`, and the most frequent merges.

    Args:
        texts: the training texts, read once.
        vocab_size: number of ids wanted, at least 257; a small text may give fewer.

    Returns:
        A tokenizer under which every text round-trips.

    Raises:
        ValueError: `vocab_size` is too small, or the texts hold nothing.
        ImportError: the `data` extra is not installed.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size={vocab_size} cannot hold the 256 bytes and the end-of-document token; use at least 257."
        )
    library = require("tokenizers", "train_bpe")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_TOKENS[0]],
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer=trainer)
    if not seen:
        raise ValueError("train_bpe got no text; give at least one text that is not empty.")
    return HFTokenizer(tokenizer, eos_token=END_TOKENS[0])


def load_tokenizer(path: str | Path) -> ByteTokenizer | HFTokenizer:
    """Reads the tokenizer of a folder, or one tokenizer file.

    Args:
        path: a folder with `byte_tokenizer.json` or `tokenizer.json`, or such a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a folder holds both, or the file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (BYTES_FILE, HF_FILE) if (path / name).is_file()]
        if len(found) > 1:
            raise ValueError(
                f"{path} holds both {BYTES_FILE} and {HF_FILE}; name the file that is meant, or remove the other."
            )
        if not found:
            raise FileNotFoundError(f"{path} holds no tokenizer: expected {BYTES_FILE} or {HF_FILE}.")
        path = found[0]
    if path.name != BYTES_FILE:
        return HFTokenizer.from_file(path)
    content = json.loads(_read_json_text(path))
    expected = {"type": "bytes", "vocab_size": ByteTokenizer.vocab_size, "eos_id": ByteTokenizer.eos_id}
    if content != expected:
        raise ValueError(f"{path} holds {content}, expected {expected}; save the tokenizer again.")
    return ByteTokenizer()


class StreamDecoder:
    """Turns ids into text as they come, never in the middle of a character.

    The pieces, `flush` included, join to `tokenizer.decode` of all the ids: any ids under a byte-level tokenizer, and
    otherwise ids that spell valid text.

    Args:
        tokenizer: the tokenizer whose ids come.

    Example:
        >>> decoder = StreamDecoder(ByteTokenizer())
        >>> [decoder.feed(i) for i in "né".encode()] + [decoder.flush()]
        ['n', '', 'é', '']
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = tokenizer.token_bytes()
        self._decoder = _WindowDecoder(tokenizer) if pieces is None else _BytesDecoder(pieces)

    def feed(self, token: int) -> str:
        """The text that this id completes, often empty."""
        return self._decoder.feed(token)

    def flush(self) -> str:
        """The text still held back (an incomplete character as U+FFFD); the decoder starts afresh."""
        return self._decoder.flush()


class _BytesDecoder:
    """Ids with known bytes, through Python's incremental UTF-8 decoder."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        return self._utf8.decode(_piece(token, self._pieces))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _WindowDecoder:
    """Ids whose text depends on their neighbours (a leading space, joined word pieces).

    Decodes the ids of the last piece, for context, with the ids since, and writes what these add.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._new: list[int] = []

    def _added(self) -> str:
        context = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._new)[len(context) :]

    def feed(self, token: int) -> str:
        self._new.append(token)
        text = self._added()
        # U+FFFD at the end is, as a rule, a character of which more bytes will come.
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._new = self._new, []
        return text

    def flush(self) -> str:
        text = self._added()
        self._context, self._new = [], []
        return text


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a lone surrogate {text[error.start]!a} at character {error.start} is no UTF-8; leave it out."
        ) from error


def _piece(token: int, pieces: list[bytes]) -> bytes:
    if token < 0:
        raise ValueError(f"token id {token} is negative; ids run from 0 to {len(pieces) - 1}.")
    return pieces[token] if token < len(pieces) else b""


def _join(ids: Sequence[int] | np.ndarray, pieces: list[bytes]) -> str:
    return b"".join(_piece(int(token), pieces) for token in ids).decode("utf-8", errors="replace")


def _byte_table(spec: dict[str, Any], vocab: dict[str, int], vocab_size: int, eos_id: int) -> list[bytes] | None:
    """The bytes of each id of a byte-level tokenizer; None for any other kind."""
    decoder = spec.get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        return None
    # The byte-level alphabet: printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and up.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (value for value in range(256) if value not in printable)
    alphabet = {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(others)}
    silent = {added["id"] for added in spec.get("added_tokens", ()) if added["special"]} | {eos_id}
    table = [b""] * vocab_size
    for token, index in vocab.items():
        if index in silent:
            continue
        # An added token is literal text, which may use characters outside the alphabet (a space, for one).
        inside = all(character in alphabet for character in token)
        table[index] = bytes(alphabet[character] for character in token) if inside else token.encode("utf-8")
    return table


def _read_json_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a tokenizer folder or file.")
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); the file is damaged or something else.") from error
    return text
