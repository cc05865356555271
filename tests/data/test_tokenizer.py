"""Tokenizers: round trips, bytes behind ids, streaming, files, and what they refuse."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualscan.data import _files
from dualscan.data.sources import embedded
from dualscan.data.tokenizer import ByteTokenizer, HFTokenizer, StreamDecoder, load_tokenizer, train_bpe
from tests.data.strategies import texts

tokenizers = pytest.importorskip("tokenizers")


def bpe() -> HFTokenizer:
    return train_bpe([document.text for document in embedded("validation")], 400)


def sentencepiece_like() -> HFTokenizer:
    """Spaces as U+2581 and unknown characters as byte tokens, the way SentencePiece models are converted."""
    pieces = ["<unk>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", *"helo", "he", "ll"]
    model = tokenizers.models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[("h", "e"), ("l", "l")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decode = tokenizers.decoders
    tokenizer.decoder = decode.Sequence(
        [decode.Replace("▁", " "), decode.ByteFallback(), decode.Fuse(), decode.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return HFTokenizer(tokenizer)


BPE = bpe()
SENTENCEPIECE_LIKE = sentencepiece_like()
BYTE_LEVEL = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
EVERY = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE, SENTENCEPIECE_LIKE], ids=["bytes", "bpe", "pieces"])


@BYTE_LEVEL
@given(text=texts)
def test_round_trip_and_exact_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode("utf-8"))
    assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.eos_id for token in ids)


@EVERY
@given(batch=st.lists(texts, max_size=4))
def test_batch_is_each_text_alone(tokenizer, batch):
    assert [ids.tolist() for ids in tokenizer.encode_batch(batch)] == [tokenizer.encode(text) for text in batch]


@EVERY
@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_text(tokenizer, data):
    """Any ids under bytes and byte-level BPE, those that cut characters apart or never were text included."""
    if tokenizer.token_bytes() is None:
        ids = tokenizer.encode(data.draw(texts))
    else:
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    decoder = StreamDecoder(tokenizer)
    for _ in range(2):  # flush starts afresh
        assert "".join([decoder.feed(token) for token in ids] + [decoder.flush()]) == tokenizer.decode(ids)


@EVERY
@given(text=texts.filter(lambda text: "\ufffd" not in text))
def test_streaming_writes_whole_characters(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(token) for token in tokenizer.encode(text)]
    assert not [piece for piece in pieces if "\ufffd" in piece]
    assert decoder.flush() == ""


@given(ids=st.lists(st.integers(2 + 0x80, SENTENCEPIECE_LIKE.vocab_size - 1), max_size=30))
def test_streaming_survives_ids_that_are_no_text(ids):
    """Byte tokens that are no UTF-8, which a model may well write: characters are replaced, no letter is lost."""
    decoder = StreamDecoder(SENTENCEPIECE_LIKE)
    written = "".join([decoder.feed(token) for token in ids] + [decoder.flush()])
    letters = SENTENCEPIECE_LIKE.decode([token for token in ids if token > 2 + 0xFF])
    assert [c for c in written if c in "helo"] == [c for c in letters if c in "helo"]


def test_streaming_holds_back_an_incomplete_character():
    for tokenizer in (ByteTokenizer(), SENTENCEPIECE_LIKE):
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.feed(token) for token in tokenizer.encode("o☃")]
        assert pieces[-3:] == ["", "", "☃"]
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.feed(token) for token in tokenizer.encode("o☃")[:-1]] + [decoder.flush()]
        assert "".join(pieces).lstrip("o") == "\ufffd" * len("".join(pieces).lstrip("o")) != ""


def test_byte_tokenizer_is_utf8():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    # The end of a document and the rows a model pads its embedding with write nothing.
    assert tokenizer.decode([97, 256, 271, 98]) == "ab"


def test_byte_level_tables_agree_with_the_library():
    """Our decoding through each id's bytes against the library's decoder: every id alone, and added tokens."""
    raw = tokenizers.Tokenizer.from_str(BPE._tokenizer.to_str())
    raw.add_tokens(["  two spaces", "né"])
    ours = HFTokenizer(raw)
    for ids in [[index] for index in range(ours.vocab_size)] + [ours.encode("a  two spacesb né ☃")]:
        assert ours.decode(ids) == raw.decode(ids, skip_special_tokens=True)
    assert ours.decode(ours.encode("a  two spacesb")) == "a  two spacesb"


def test_bpe_learns_merges_and_is_deterministic():
    text = next(embedded("validation")).text
    assert len(BPE.encode(text)) < 0.7 * len(text)
    assert BPE.vocab_size == 400
    assert bpe().fingerprint == BPE.fingerprint != ByteTokenizer().fingerprint


def test_special_tokens_in_a_text_are_text():
    text = "before <|endoftext|> after"
    assert BPE.eos_id not in BPE.encode(text)
    assert BPE.decode(BPE.encode(text)) == text


def test_truncation_and_padding_of_a_file_are_switched_off():
    raw = tokenizers.Tokenizer.from_str(BPE._tokenizer.to_str())
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    assert HFTokenizer(raw).encode("a longer text than that") == BPE.encode("a longer text than that")


def test_no_byte_lengths_where_ids_do_not_add_up():
    raw = tokenizers.Tokenizer.from_str(BPE._tokenizer.to_str())
    raw.normalizer = tokenizers.normalizers.NFC()
    assert HFTokenizer(raw).byte_lengths() is None
    raw = tokenizers.Tokenizer.from_str(BPE._tokenizer.to_str())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert HFTokenizer(raw).byte_lengths() is None
    assert SENTENCEPIECE_LIKE.byte_lengths() is None


@EVERY
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "model")
    loaded = load_tokenizer(tmp_path / "model")
    assert (loaded.vocab_size, loaded.eos_id, loaded.fingerprint) == (
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.fingerprint,
    )
    assert loaded.encode("hello né") == tokenizer.encode("hello né")
    assert not [path for path in (tmp_path / "model").iterdir() if "tmp" in path.name]


def test_load_takes_a_file_and_transformers_reads_it(tmp_path):
    BPE.save(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == BPE.eos_id
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == BPE.eos_id
    assert theirs("to be or not to be")["input_ids"] == BPE.encode("to be or not to be")


def test_eos_token_is_read_from_the_config_beside_it(tmp_path):
    raw = tokenizers.Tokenizer.from_str(BPE._tokenizer.to_str())
    raw.add_special_tokens(["<stop>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_id == BPE.eos_id
    for named in ("<stop>", {"content": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}), encoding="utf-8")
        assert load_tokenizer(tmp_path).eos_id == raw.token_to_id("<stop>")


def test_ids_with_gaps_count_the_largest():
    model = tokenizers.models.WordLevel({"a": 0, "</s>": 7, "b": 3}, unk_token="a")
    assert HFTokenizer(tokenizers.Tokenizer(model)).vocab_size == 8


def test_load_refuses_what_is_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer: expected byte_tokenizer\.json or tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{not json", encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(ValueError, match="not a tokenizer of the tokenizers library"):
        load_tokenizer(tmp_path)
    (tmp_path / "byte_tokenizer.json").write_text('{"type": "words"}', encoding="utf-8")
    with pytest.raises(ValueError, match="holds both"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"'words'.*save the tokenizer again"):
        load_tokenizer(tmp_path / "byte_tokenizer.json")


def test_bad_arguments():
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match=r"none of the end-of-document tokens.*pass eos_token"):
        HFTokenizer(raw)
    with pytest.raises(ValueError, match="eos_token='<x>' is not among the tokenizer's 1 tokens"):
        HFTokenizer(raw, eos_token="<x>")
    with pytest.raises(ValueError, match=r"vocab_size=256.*at least 257"):
        train_bpe(["text"], 256)
    with pytest.raises(ValueError, match="got no text"):
        train_bpe([""], 300)
    for tokenizer in (ByteTokenizer(), BPE):
        with pytest.raises(ValueError, match="lone surrogate"):
            tokenizer.encode("a\ud800")
        with pytest.raises(ValueError, match="lone surrogate"):
            tokenizer.encode_batch(["a\ud800"])
        with pytest.raises(ValueError, match="-1 is negative"):
            tokenizer.decode([-1])


def test_missing_extra_names_the_install_command(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(_files.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"train_bpe needs the tokenizers library; pip install dualscan\[data\]"):
        train_bpe(["text"], 300)


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    ByteTokenizer().save(tmp_path)
    before = (tmp_path / "byte_tokenizer.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        ByteTokenizer().save(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_byte_lengths_dtype():
    for tokenizer in (ByteTokenizer(), BPE):
        lengths = tokenizer.byte_lengths()
        assert lengths is not None
        assert lengths.dtype == np.int64
        assert lengths.shape == (tokenizer.vocab_size,)
        assert lengths[tokenizer.eos_id] == 0
