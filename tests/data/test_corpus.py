"""From a path to tokens: what trains, what is held out, and what the cache keeps."""

import itertools
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualscan.data import corpus as corpus_module
from dualscan.data.corpus import TokenizedCorpus, prepare, split_document
from dualscan.data.sources import Document, embedded
from dualscan.data.tokenizer import ByteTokenizer, train_bpe
from tests.data.strategies import texts

TOKENIZER = ByteTokenizer()


def contents(source, tokenizer=TOKENIZER) -> list[str]:
    """The documents of a token source as text."""
    ends = [*source.document_starts.tolist(), len(source)]
    return [tokenizer.decode(source.read(a, b - 1)) for a, b in itertools.pairwise(ends)]


def split(corpus: TokenizedCorpus) -> tuple[list[str], list[str]]:
    return contents(corpus.train), contents(corpus.validation)


def test_embedded_text_by_default():
    corpus = prepare(None, TOKENIZER)
    assert split(corpus) == tuple([d.text for d in embedded(part)] for part in ("train", "validation"))
    assert "embedded" in corpus.name
    assert corpus.tokenizer is TOKENIZER


def test_bpe_gives_the_same_text():
    tokenizer = train_bpe((document.text for document in embedded("validation")), 300)
    corpus = prepare(None, tokenizer)
    assert contents(corpus.train, tokenizer) == [document.text for document in embedded("train")]
    assert corpus.train.document_nbytes.tolist() == [len(document.text) for document in embedded("train")]


def test_several_documents_hold_out_whole_ones(tmp_path):
    rows = [f"document {n:02d} of the same length" for n in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    for fraction, held_out in ((0.1, 2), (0.25, 5), (0.5, 10), (0.001, 1), (0.999, 19)):
        corpus = prepare(tmp_path / "a.jsonl", TOKENIZER, validation_fraction=fraction)
        assert split(corpus) == (rows[:-held_out], rows[-held_out:])


@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=12), fraction=st.floats(0.01, 0.99))
def test_the_cut_is_the_nearest_document_start(lengths, fraction, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in lengths), encoding="utf-8")
    train, validation = split(prepare(path, TOKENIZER, validation_fraction=fraction))
    assert [len(text) for text in train + validation] == lengths
    total = sum(lengths) + len(lengths)
    distances = [abs(sum(lengths[:n]) + n - total * (1 - fraction)) for n in range(1, len(lengths))]
    assert distances[len(train) - 1] == min(distances)


def test_one_document_holds_out_its_tail_from_a_line_start(tmp_path):
    lines = [f"line {n}\n" for n in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    train, validation = split(prepare(str(tmp_path / "a.txt"), TOKENIZER, validation_fraction=0.2))
    assert (train, validation) == (["".join(lines[:80])], ["".join(lines[80:])])


@given(text=texts.filter(lambda text: len(text.strip()) > 1), fraction=st.floats(0.01, 0.99))
def test_split_document_loses_nothing(text, fraction):
    head, tail = split_document(Document(text, "d"), fraction)
    assert head.text + tail.text == text
    assert head.text.strip()
    assert tail.text.strip()


@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=12),
    separator=st.sampled_from("\n "),
    fraction=st.floats(0.01, 0.99),
)
def test_split_document_takes_the_nearest_start(lengths, separator, fraction):
    words = ["x" * length for length in lengths]
    text = separator.join(words)
    head, _ = split_document(Document(text, "d"), fraction)
    starts = [len(separator.join(words[:n])) + 1 for n in range(1, len(words))]
    wanted = len(text) * (1 - fraction)
    assert len(head.text) in starts
    assert abs(len(head.text) - wanted) <= min(abs(start - wanted) for start in starts) + 1


def test_validation_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("train on this", encoding="utf-8")
    (tmp_path / "b.txt").write_text("not on this", encoding="utf-8")
    corpus = prepare(tmp_path / "a.txt", TOKENIZER, validation=tmp_path / "b.txt")
    assert split(corpus) == (["train on this"], ["not on this"])
    corpus = prepare(None, TOKENIZER, validation=tmp_path / "b.txt")
    assert split(corpus) == ([document.text for document in embedded()], ["not on this"])


def test_large_texts_go_to_the_cache_and_are_found_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus_module, "SHARD_BYTES", 100)
    (tmp_path / "a.txt").write_text("a line of text\n" * 20, encoding="utf-8")
    plain = split(prepare(tmp_path / "a.txt", TOKENIZER))
    assert not (tmp_path / "cache").exists()
    cached = prepare(tmp_path / "a.txt", TOKENIZER, cache=tmp_path / "cache")
    assert split(cached) == plain
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert "tokenizing" in capsys.readouterr().err
    assert split(prepare(tmp_path / "a.txt", TOKENIZER, cache=tmp_path / "cache")) == plain
    assert "tokenizing" not in capsys.readouterr().err
    # Another fraction of a single document, another tokenizer or another text is another set of tokens.
    prepare(tmp_path / "a.txt", TOKENIZER, cache=tmp_path / "cache", validation_fraction=0.5)
    tokenizer = train_bpe(["a line of text"], 260)
    assert contents(prepare(tmp_path / "a.txt", tokenizer, cache=tmp_path / "cache").train, tokenizer) == plain[0]
    (tmp_path / "a.txt").write_text("another line\n" * 20, encoding="utf-8")
    assert split(prepare(tmp_path / "a.txt", TOKENIZER, cache=tmp_path / "cache"))[0][0].startswith("another")
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_the_data_extra_is_loaded_only_where_it_is_needed():
    program = """
import sys
from dualscan.data.corpus import prepare
from dualscan.data.loader import Loader
from dualscan.data.tokenizer import ByteTokenizer
next(Loader(prepare(None, ByteTokenizer()).train, batch_size=1, seqlen=8))
print({"tokenizers", "zstandard", "lzma"} & set(sys.modules) - before)
"""
    # torch may load lzma by itself, hence the comparison with what is there before.
    program = "import sys, torch; before = set(sys.modules)" + program
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()", done.stdout


def test_small_texts_stay_out_of_the_cache(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    prepare(tmp_path / "a.txt", TOKENIZER, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 10, float("nan")])
def test_fraction_refused(fraction):
    with pytest.raises(ValueError, match=rf"validation_fraction={fraction} is outside \(0, 1\)"):
        prepare(None, TOKENIZER, validation_fraction=fraction)


def test_bad_texts(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        prepare(tmp_path / "none.txt", TOKENIZER)
    (tmp_path / "a.txt").write_text("x\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.txt is too short to hold out a part"):
        prepare(tmp_path / "a.txt", TOKENIZER)
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.txt is empty"):
        prepare(tmp_path / "b.txt", TOKENIZER)
