"""Documents from files: plain text, JSON lines (both also .gz, .xz, .zst), folders of those, and the embedded text.

A text file is one document; a JSON-lines file has one document a line, in the field `text`. Text is UTF-8, a leading
byte-order mark is dropped, and line ends in text files become `\\n` on every platform. Documents of white space alone
are left out.
"""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Generator, Iterator
from importlib import resources
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from dualscan.data._files import require

JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")
_CHUNK = 1 << 16


class Document(NamedTuple):
    """One text.

    Attributes:
        text: its characters, not all white space.
        name: where it comes from, for messages.
    """

    text: str
    name: str


def documents(path: str | Path) -> Iterator[Document]:
    """The documents of a file or a folder, one after the other.

    A file is JSON lines when its name ends in .jsonl or .ndjson and otherwise text, whatever its name; .gz, .xz and
    .zst are unpacked on the way. A folder is searched recursively, in the order of its files' relative paths, for
    names ending in .txt, .text, .md, .rst, .jsonl or .ndjson, packed or not; hidden files and folders are passed over.

    Args:
        path: the file or folder.

    Returns:
        An iterator that holds one text file, or one line of a JSON-lines file, at a time.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: there is no text in it, or a file is not UTF-8, a damaged archive, or a line without `text`; names
        the file and line. ImportError: a .zst file without the `data` extra.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.jsonl").write_text('{"text": "one"}\\n{"text": "two"}\\n', encoding="utf-8")
        >>> [document.text for document in documents(folder)]
        ['one', 'two']
    """
    path = Path(path)
    empty = True
    for file in text_files(path):
        for document in _read_jsonl(file) if _stem_suffix(file) in JSONL_SUFFIXES else _read_text(file):
            if document.text.strip():
                empty = False
                yield document
    if empty:
        raise ValueError(f"{path} is empty; give a file with text.")


def text_files(path: str | Path) -> list[Path]:
    """The files that `documents(path)` reads, in its order.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder without any file of a known name.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give a text file, a JSON-lines file or a folder of those.")
    found = [
        file for file in path.rglob("*") if file.is_file() and _stem_suffix(file) in JSONL_SUFFIXES + TEXT_SUFFIXES
    ]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not found:
        known = " ".join(TEXT_SUFFIXES + JSONL_SUFFIXES)
        raise ValueError(
            f"{path} holds no text file; expected names ending in {known} (and {' '.join(COMPRESSED_SUFFIXES)})."
        )
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def embedded(split: Literal["train", "validation"] | None = None) -> Iterator[Document]:
    """The text inside the package: plays by William Shakespeare, public domain, one document each.

    Args:
        split: "train" (eight plays, 955 kB), "validation" (one held-out play, 101 kB), or None for both, in this order.

    Raises:
        ValueError: another split.

    Example:
        >>> [document.name for document in embedded("validation")]
        ['The Two Gentlemen of Verona']
    """
    if split not in (None, "train", "validation"):
        raise ValueError(f'split={split!r} is unknown; use "train", "validation" or None for both.')
    folder = resources.files("dualscan.data") / "text"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    with (folder / manifest["file"]).open("rb") as packed, gzip.open(packed, "rb") as lines:
        for entry, line in zip(manifest["documents"], lines, strict=True):
            if split in (None, entry["split"]):
                yield Document(text=json.loads(line)["text"], name=entry["title"])


def _stem_suffix(file: Path) -> str:
    """The suffix that names the content: `.jsonl` of `a.jsonl.gz`."""
    name = Path(file.name.lower())
    return (name.with_suffix("") if name.suffix in COMPRESSED_SUFFIXES else name).suffix


def _read_text(file: Path) -> Iterator[Document]:
    with _opened(file) as stream:
        text = _decode(stream.read(), str(file))
    yield Document(text=text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"), name=file.name)


def _read_jsonl(file: Path) -> Iterator[Document]:
    with _opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{file} line {number}"
            text = _decode(line, where).removeprefix("\ufeff").strip()
            if not text:
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error}); each line must be one JSON object.") from error
            content = row.get("text") if isinstance(row, dict) else None
            if not isinstance(content, str):
                fields = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__} instead of an object"
                raise ValueError(
                    f'{where} has no "text" (it has: {fields}); each line must be an object with a string "text".'
                )
            if not _encodable(content):
                raise ValueError(f"{where} holds a lone surrogate, which UTF-8 cannot write; repair the line.")
            yield Document(text=content, name=f"{file.name}:{number}")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 text (byte 0x{content[error.start]:02x} at position {error.start}); "
            "convert it to UTF-8, or give text, JSON lines or a folder of those."
        ) from error


@contextlib.contextmanager
def _opened(file: Path) -> Generator[IO[bytes], None, None]:
    """The unpacked bytes of a file; damage found in an archive on the way becomes a ValueError."""
    suffix = file.suffix.lower()
    damage: tuple[type[Exception], ...] = (EOFError,)
    with contextlib.ExitStack() as stack:
        stream: Any = stack.enter_context(open(file, "rb"))
        if suffix == ".gz":
            damage = (EOFError, gzip.BadGzipFile, zlib.error)
            stream = stack.enter_context(gzip.open(stream, "rb"))
        elif suffix == ".xz":
            import lzma  # Not every Python is built with it, and only .xz files need it.

            damage = (EOFError, lzma.LZMAError)
            stream = stack.enter_context(lzma.open(stream, "rb"))
        elif suffix == ".zst":
            zstandard = require("zstandard", f"reading {file.name}")
            damage = (EOFError, zstandard.ZstdError)
            stream = io.BufferedReader(_ZstdReader(stream, zstandard.ZstdDecompressor()))
        try:
            yield stream
        except damage as error:
            raise ValueError(
                f"{file} is a damaged or truncated {suffix} file ({error}); make or fetch it again."
            ) from error


class _ZstdReader(io.RawIOBase):
    """The unpacked bytes of a Zstandard file; unlike the library's own reader it notices a cut-off end."""

    def __init__(self, packed: IO[bytes], decompressor: Any) -> None:
        self._packed = packed
        self._decompressor = decompressor
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._packed.read(_CHUNK)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._ready = b"".join(self._unpack(chunk))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _unpack(self, chunk: bytes) -> Iterator[bytes]:
        while chunk:
            self._frame = self._frame or self._decompressor.decompressobj()
            yield self._frame.decompress(chunk)
            chunk = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
