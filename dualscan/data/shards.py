"""Token streams on disk, memory-mapped: the corpus may be larger than memory and opens at once.

A folder holds `tokens-00000.bin`, ... (raw little-endian uint16 or uint32 ids, documents running on from file to
file), `documents.bin` (start and UTF-8 bytes of each document, little-endian int64 pairs) and `index.json` (dtype,
counts, tokenizer). The folder is written under another name and renamed when it is complete, so that it is either
whole or not there.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dualscan.data.packing import encode_documents, token_dtype
from dualscan.data.sources import Document
from dualscan.data.tokenizer import Tokenizer

FORMAT = "dualscan token shards 1"
INDEX_FILE = "index.json"
DOCUMENTS_FILE = "documents.bin"
_WRITE_TOKENS = 1 << 20


class TokenShards:
    """A folder of token shards as one token source.

    Args:
        folder: a folder that `write_shards` made.

    Raises:
        FileNotFoundError: the folder, its index or one of its files is missing.
        ValueError: the index is something else, or a file has another size than it says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.eos_id: int = index["eos_id"]
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer: str = index["tokenizer"]
        self.nbytes: int = index["nbytes"]
        dtype = np.dtype(index["dtype"])
        counts = [shard["ntokens"] for shard in index["shards"]]
        self._maps = [_map(self.folder / shard["file"], dtype, (shard["ntokens"],)) for shard in index["shards"]]
        # Position at which each shard ends; the last is the length.
        self._ends = np.cumsum(counts)
        table = _map(self.folder / DOCUMENTS_FILE, np.dtype("<i8"), (index["ndocuments"], 2))
        self.document_starts = np.ascontiguousarray(table[:, 0])
        self.document_nbytes = np.ascontiguousarray(table[:, 1])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """S[start:stop]: a view of the file, or a copy where it crosses from one shard to the next."""
        first, last = np.searchsorted(self._ends, (start, max(stop - 1, start)), side="right").tolist()
        pieces = []
        for shard in range(first, min(last + 1, len(self._maps))):
            origin = int(self._ends[shard]) - len(self._maps[shard])
            pieces.append(self._maps[shard][max(start - origin, 0) : max(stop - origin, 0)])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [self._maps[0][:0]])


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    shard_tokens: int = 1 << 27,
    overwrite: bool = False,
    progress: bool = True,
) -> TokenShards:
    """Encodes documents into a folder of token shards.

    Args:
        documents: the documents, read once and never all in memory.
        tokenizer: what encodes them; its fingerprint is noted.
        folder: where to; it must not hold anything, unless `overwrite`.
        shard_tokens: tokens in each file (the default makes files of 256 MiB in uint16).
        overwrite: replace shards that are already there, once the new ones are complete.
        progress: show a progress bar.

    Returns:
        The opened shards.

    Raises:
        ValueError: there is no document, `shard_tokens` < 1, or the folder is taken.
        OSError: the disk is full, for one; what was there before is still there.
    """
    folder = Path(folder)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens}; a shard needs at least 1 token.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the shards.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / INDEX_FILE).is_file():
            raise ValueError(f"{folder} holds other files; name a new or an empty folder for the shards.")
        if not overwrite:
            raise ValueError(
                f"{folder} already holds token shards; open them with TokenShards, or pass overwrite=True."
            )
    partial, old = (folder.with_name(f"{folder.name}.{kind}-{os.getpid()}") for kind in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(documents, tokenizer, partial, shard_tokens, progress)
        if folder.is_dir():
            os.replace(folder, old)
        os.replace(partial, folder)
    finally:
        # Anything but success leaves no new folder, and puts the old one back.
        if old.is_dir() and not folder.is_dir():
            os.replace(old, folder)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
    return TokenShards(folder)


def _write(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path, shard_tokens: int, progress: bool
) -> None:
    dtype = token_dtype(tokenizer.vocab_size).newbyteorder("<")
    shards = _ShardWriter(folder, shard_tokens)
    end = np.array([tokenizer.eos_id], dtype=dtype)
    ntokens = ndocuments = total = 0
    with (
        open(folder / DOCUMENTS_FILE, "wb") as table,
        tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=not progress) as bar,
    ):
        for ids, nbytes in encode_documents(documents, tokenizer):
            table.write(struct.pack("<qq", ntokens, nbytes))
            shards.append(np.concatenate([ids.astype(dtype), end]))
            ntokens, ndocuments, total = ntokens + len(ids) + 1, ndocuments + 1, total + nbytes
            bar.update(nbytes)
    shards.flush()
    if not ndocuments:
        raise ValueError("there is no document to write; give at least one.")
    index = {
        "format": FORMAT,
        "dtype": dtype.str,
        "ntokens": ntokens,
        "ndocuments": ndocuments,
        "nbytes": total,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer": tokenizer.fingerprint,
        "shards": [{"file": file, "ntokens": count} for file, count in shards.files.items()],
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _ShardWriter:
    """Appends tokens to files of at most `shard_tokens` each, a few megabytes at a time."""

    def __init__(self, folder: Path, shard_tokens: int) -> None:
        self.files: dict[str, int] = {}
        self._folder, self._shard_tokens = folder, shard_tokens
        self._pending: list[np.ndarray] = []
        self._npending = 0

    def append(self, tokens: np.ndarray) -> None:
        self._pending.append(tokens)
        self._npending += len(tokens)
        if self._npending >= _WRITE_TOKENS:
            self.flush()

    def flush(self) -> None:
        tokens = np.concatenate(self._pending) if self._pending else np.empty(0)
        while len(tokens):
            name = f"tokens-{max(len(self.files) - 1, 0):05d}.bin"
            if self.files.get(name, self._shard_tokens) == self._shard_tokens:
                name = f"tokens-{len(self.files):05d}.bin"
                self.files[name] = 0
            count = min(self._shard_tokens - self.files[name], len(tokens))
            with open(self._folder / name, "ab") as stream:
                stream.write(tokens[:count].tobytes())
            self.files[name] += count
            tokens = tokens[count:]
        self._pending, self._npending = [], 0


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no token shards ({INDEX_FILE} is missing); make them with write_shards."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); write the shards again.") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f'{path} is no index of token shards (its format is not "{FORMAT}"); write the shards again.')
    return index


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    expected = int(np.prod(shape)) * dtype.itemsize
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the token shards; write them again.")
    size = path.stat().st_size
    if size != expected:
        what = "truncated" if size < expected else "too long"
        raise ValueError(f"{path} is {what}: {size} bytes, expected {expected}; write the shards again.")
    # A plain view of the map: slicing np.memmap itself costs several times as much.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=shape))
