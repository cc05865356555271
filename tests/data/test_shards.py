"""Token shards: the same stream as in memory, whole or not there at all."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualscan.data import shards as shards_module
from dualscan.data.packing import TokenStream
from dualscan.data.shards import TokenShards, write_shards
from dualscan.data.sources import Document
from dualscan.data.tokenizer import ByteTokenizer
from tests.data.strategies import texts

TOKENIZER = ByteTokenizer()
DOCUMENTS = [Document(text, text) for text in ("hello", "né ☃", "a longer third document")]


class Wide(ByteTokenizer):
    """A vocabulary that needs 32 bits an id."""

    vocab_size = 70_000
    eos_id = 69_999


def write(folder, **options) -> TokenShards:
    return write_shards(DOCUMENTS, TOKENIZER, folder, progress=False, **options)


@given(parts=st.lists(texts, min_size=1, max_size=6), shard_tokens=st.integers(1, 80), data=st.data())
def test_shards_are_the_stream_in_memory(parts, shard_tokens, data, tmp_path_factory):
    documents = [Document(text, "d") for text in parts]
    for tokenizer in (TOKENIZER, Wide()):
        folder = tmp_path_factory.mktemp("shards") / "tokens"
        stream = TokenStream.from_documents(documents, tokenizer)
        shards = write_shards(documents, tokenizer, folder, shard_tokens=shard_tokens, progress=False)
        assert (len(shards), shards.eos_id, shards.vocab_size) == (len(stream), tokenizer.eos_id, tokenizer.vocab_size)
        assert shards.read(0, len(shards)).tolist() == stream.tokens.tolist()
        assert shards.read(0, 1).dtype == stream.tokens.dtype
        assert shards.document_starts.tolist() == stream.document_starts.tolist()
        assert shards.document_nbytes.tolist() == stream.document_nbytes.tolist()
        assert shards.nbytes == sum(len(text.encode()) for text in parts)
        start = data.draw(st.integers(0, len(stream)))
        stop = data.draw(st.integers(start, len(stream)))
        assert shards.read(start, stop).tolist() == stream.tokens[start:stop].tolist()
        assert len(list(folder.glob("tokens-*.bin"))) == -(-len(stream) // shard_tokens)


def test_several_writes_go_to_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_WRITE_TOKENS", 4)
    shards = write(tmp_path / "tokens", shard_tokens=30)
    assert shards.read(0, len(shards)).tolist() == TokenStream.from_documents(DOCUMENTS, TOKENIZER).tokens.tolist()
    assert [path.stat().st_size for path in sorted((tmp_path / "tokens").glob("tokens-*"))] == [60, 16]


def test_index_says_what_is_inside(tmp_path):
    shards = write(tmp_path / "tokens", shard_tokens=30)
    index = json.loads((tmp_path / "tokens" / "index.json").read_text(encoding="utf-8"))
    assert index["dtype"] == "<u2"
    assert (index["ntokens"], index["ndocuments"], index["nbytes"]) == (38, 3, 35)
    assert [shard["ntokens"] for shard in index["shards"]] == [30, 8]
    assert index["tokenizer"] == shards.tokenizer == TOKENIZER.fingerprint


def test_reads_inside_one_shard_are_views_of_the_file(tmp_path):
    shards = write(tmp_path / "tokens")
    assert not shards.read(3, 9).flags.owndata
    assert not shards.read(3, 9).flags.writeable


def test_interrupted_writing_leaves_nothing(tmp_path):
    def interrupted():
        yield DOCUMENTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), TOKENIZER, tmp_path / "tokens", progress=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"holds no token shards \(index\.json is missing\)"):
        TokenShards(tmp_path / "tokens")


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_failure_keeps_what_was_there(moment, tmp_path, monkeypatch):
    before = write(tmp_path / "tokens").read(0, 38).tolist()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if moment == "writing":
        monkeypatch.setattr(shards_module._ShardWriter, "flush", full)
    else:
        real = os.replace
        monkeypatch.setattr(
            shards_module.os, "replace", lambda a, b: full() if ".partial" in os.fspath(a) else real(a, b)
        )
    with pytest.raises(OSError, match="No space left"):
        write_shards([Document("other", "o")], TOKENIZER, tmp_path / "tokens", overwrite=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    assert TokenShards(tmp_path / "tokens").read(0, 38).tolist() == before


def test_overwrite_replaces(tmp_path):
    write(tmp_path / "tokens", shard_tokens=5)
    shards = write_shards([Document("x", "x")], TOKENIZER, tmp_path / "tokens", overwrite=True, progress=False)
    assert shards.read(0, 2).tolist() == [ord("x"), 256]
    assert len(list((tmp_path / "tokens").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_an_empty_folder_may_be_written_to(tmp_path):
    (tmp_path / "tokens").mkdir()
    assert len(write(tmp_path / "tokens")) == 38


def test_folders_that_are_taken(tmp_path):
    write(tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"already holds token shards.*overwrite=True"):
        write(tmp_path / "tokens")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files"):
            write(tmp_path / "other", overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file"):
        write(tmp_path / "other" / "notes.txt")


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="shard_tokens=0"):
        write(tmp_path / "tokens", shard_tokens=0)
    with pytest.raises(ValueError, match="there is no document"):
        write_shards([], TOKENIZER, tmp_path / "tokens", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_noticed(tmp_path):
    folder = tmp_path / "tokens"
    write(folder, shard_tokens=30)
    whole = (folder / "tokens-00001.bin").read_bytes()
    (folder / "tokens-00001.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"tokens-00001\.bin is truncated: 14 bytes, expected 16"):
        TokenShards(folder)
    (folder / "tokens-00001.bin").write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="too long: 17 bytes"):
        TokenShards(folder)
    (folder / "tokens-00001.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens-00001\.bin is missing"):
        TokenShards(folder)
    (folder / "tokens-00001.bin").write_bytes(whole)
    (folder / "documents.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"documents\.bin is truncated: 0 bytes, expected 48"):
        TokenShards(folder)
    (folder / "index.json").write_text('{"format": "else"}', encoding="utf-8")
    with pytest.raises(ValueError, match="no index of token shards"):
        TokenShards(folder)
    (folder / "index.json").write_text('{"form', encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        TokenShards(folder)


def test_progress_bar_counts_bytes(tmp_path, capsys):
    write_shards(DOCUMENTS, TOKENIZER, tmp_path / "tokens")
    assert "35.0B" in capsys.readouterr().err


def test_documents_bin_is_starts_and_bytes(tmp_path):
    write(tmp_path / "tokens")
    table = np.fromfile(tmp_path / "tokens" / "documents.bin", dtype="<i8").reshape(-1, 2)
    assert table.tolist() == [[0, 5], [6, 7], [14, 23]]
