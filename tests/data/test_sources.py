"""Documents from every kind of file, the embedded text against its manifest, and what is refused."""

import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Iterator
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualscan.data import _files
from dualscan.data.sources import Document, documents, embedded, text_files
from tests.data.strategies import texts

zstandard = pytest.importorskip("zstandard")

ROWS = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in ("first", "second ☃", "third\nline"))
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def read(path) -> list[str]:
    return [document.text for document in documents(path)]


@pytest.mark.parametrize("suffix", PACK)
def test_text_and_jsonl_in_every_archive(suffix, tmp_path):
    (tmp_path / f"a.txt{suffix}").write_bytes(PACK[suffix]("one ☃\ntwo\n".encode()))
    (tmp_path / f"b.JSONL{suffix}").write_bytes(PACK[suffix](ROWS.encode()))
    assert read(tmp_path / f"a.txt{suffix}") == ["one ☃\ntwo\n"]
    assert list(documents(tmp_path / f"b.JSONL{suffix}"))[1] == Document("second ☃", f"b.JSONL{suffix}:2")
    assert read(tmp_path) == ["one ☃\ntwo\n", "first", "second ☃", "third\nline"]


@given(parts=st.lists(texts.filter(str.strip), min_size=1, max_size=5))
def test_jsonl_round_trip(parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl.zst"
    rows = "\n".join(json.dumps({"text": part}, ensure_ascii=False) for part in parts)
    # Two frames in one file, cut anywhere, as parallel packers write them.
    packed = rows.encode()
    path.write_bytes(zstandard.compress(packed[: len(packed) // 2]) + zstandard.compress(packed[len(packed) // 2 :]))
    assert read(path) == parts


def test_large_zst_reads_as_it_was(tmp_path):
    text = "".join(f"line {hashlib.sha256(str(n).encode()).hexdigest()}\n" for n in range(5000))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(text.encode()))
    assert read(tmp_path / "a.txt.zst") == [text]


def test_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read(tmp_path / "a.txt") == ["one\ntwo\nthree\n"]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one\\r\\n"}\r\n\r\n{"text": "two"}')
    assert read(tmp_path / "b.jsonl") == ["one\r\n", "two"]


def test_folder_is_recursive_sorted_and_passes_over_the_rest(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b.rst.gz", "c.text", ".hidden.txt", ".git/x.txt", "picture.png", "a.tar.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(name.encode()) if name.endswith(".gz") else name.encode())
    assert [file.relative_to(tmp_path).as_posix() for file in text_files(tmp_path)] == [
        "a/b.rst.gz",
        "a/z.md",
        "b.txt",
        "c.text",
    ]
    assert read(str(tmp_path)) == ["a/b.rst.gz", "a/z.md", "b.txt", "c.text"]


def test_a_named_file_is_text_whatever_its_name(tmp_path):
    (tmp_path / "program.py").write_text("print(1)\n", encoding="utf-8")
    assert read(tmp_path / "program.py") == ["print(1)\n"]


def test_white_space_documents_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "b"}\n', encoding="utf-8")
    assert read(tmp_path) == ["b"]


def test_documents_come_lazily(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nnot JSON\n', encoding="utf-8")
    stream = documents(path)
    assert next(stream).text == "one"
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        next(stream)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.xz", "a.txt.zst"])
def test_empty_file(name, tmp_path):
    suffix = "." + name.rsplit(".", 1)[1]
    (tmp_path / name).write_bytes(PACK.get(suffix, bytes)(b" \n"))
    with pytest.raises(ValueError, match=rf"{name} is empty; give a file with text"):
        read(tmp_path / name)


def test_missing_and_textless(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"holds no text file; expected names ending in \.txt"):
        read(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        read(tmp_path)


def test_not_utf8_names_file_byte_and_position(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text \(byte 0xe9 at position 3\)"):
        read(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl line 2 is not UTF-8 text \(byte 0xe9"):
        read(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"content": "x", "id": 1}', r'line 2 has no "text" \(it has: content, id\)'),
        ('{"text": 3}', r'line 2 has no "text" \(it has: text\).*a string "text"'),
        ("[1]", r"a list instead of an object"),
        ('{"text": "x"', "line 2 is not JSON"),
        ('{"text": "\\ud800"}', "line 2 holds a lone surrogate"),
    ],
)
def test_bad_rows_name_file_and_line(row, message, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + row + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl " + message if message.startswith("line") else message):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "other"])
def test_damaged_archives(suffix, damage, tmp_path):
    packed = PACK[suffix]("".join(f"{n * n}\n" for n in range(20000)).encode())
    middle = len(packed) // 2
    content = {
        "truncated": packed[:-9],
        "overwritten": packed[:middle] + bytes(b ^ 0xFF for b in packed[middle : middle + 64]) + packed[middle + 64 :],
        "other": b"this is no archive at all",
    }[damage]
    (tmp_path / f"a.txt{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt\{suffix} is a damaged or truncated \{suffix} file"):
        read(tmp_path / f"a.txt{suffix}")


def test_zst_without_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"text"))

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(_files.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"a\.txt\.zst needs the zstandard library; pip install dualscan\[data\]"):
        read(tmp_path / "a.txt.zst")


def test_embedded_text_is_what_the_manifest_says():
    manifest = json.loads((resources.files("dualscan.data") / "text" / "manifest.json").read_text(encoding="utf-8"))
    entries = manifest["documents"]
    titles = {split: [e["title"] for e in entries if e["split"] == split] for split in ("train", "validation")}
    assert len(set(titles["train"] + titles["validation"])) == len(entries) == 9
    assert [document.name for document in embedded()] == titles["train"] + titles["validation"]
    assert [document.name for document in embedded("train")] == titles["train"]
    assert [document.name for document in embedded("validation")] == titles["validation"]
    for document, entry in zip(embedded(), entries, strict=True):
        content = document.text.encode("ascii")
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
    sizes = {split: sum(e["bytes"] for e in entries if e["split"] == split) for split in titles}
    assert 900_000 <= sizes["train"] <= 1_000_000
    assert 60_000 <= sizes["validation"] <= 120_000


def test_embedded_text_is_clean():
    for document in embedded():
        text = document.text
        # "licence" and "license" are Shakespeare's own words too ("the licence of ink"), the others are not.
        foreign = re.search(
            r"(?i)gutenberg|copyright|trademark|e-?text|ebook|www\.|http|public domain|license agree", text
        )
        assert foreign is None, (document.name, foreign)
        assert not set(text) & set("\r\t{}|_*~<>@#$%^\\"), document.name
        assert all(character == "\n" or " " <= character <= "~" for character in text)
        assert "\n\n\n" not in text
        assert " \n" not in text
        assert text == text.strip() + "\n"
        assert "by William Shakespeare" in text[:100]


def test_embedded_splits_share_no_passage():
    """No 80 characters of the held-out play occur in the training plays: not a scene under another title either."""

    def passages(plays: Iterator[Document]) -> set[str]:
        joined = [" ".join(play.text.lower().split()) for play in plays]
        return {text[i : i + 80] for text in joined for i in range(len(text) - 79)}

    assert not passages(embedded("train")) & passages(embedded("validation"))


def test_embedded_refuses_another_split():
    with pytest.raises(ValueError, match="split='test' is unknown"):
        list(embedded("test"))  # pyrefly: ignore[bad-argument-type]
