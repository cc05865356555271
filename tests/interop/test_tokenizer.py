"""Our tokenizers in transformers: the same ids and the same text."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dualscan.data.tokenizer import ByteTokenizer, HFTokenizer, train_bpe
from dualscan.interop import to_transformers_tokenizer

TEXTS = ("", "né 日本", " two  spaces\n\ttab ", "<|endoftext|> spelt out", "\x00\x7f\u2028🦭")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_same_ids_and_text(kind: str, tmp_path: Path) -> None:
    ours: ByteTokenizer | HFTokenizer = ByteTokenizer()
    if kind == "bpe":
        ours = train_bpe(["the cat sat on the mat, the cat, né"] * 3, 300)
    to_transformers_tokenizer(ours).save_pretrained(tmp_path)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.eos_token_id, theirs.pad_token_id) == (ours.vocab_size, ours.eos_id, ours.eos_id)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == text
