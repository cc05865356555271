"""The page's file: matrices as they were, nothing that a browser would fetch, written whole or not at all."""

import base64
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualscan.data.tokenizer import ByteTokenizer, train_bpe
from dualscan.inspect import page as pages
from dualscan.inspect.page import pack, token_labels, write_page
from dualscan.inspect.report import VIEWS
from tests.inspect.conftest import TEXT, TOKENIZER, TOKENS

quick = settings(max_examples=20, deadline=None, derandomize=True)


def unpack(holder: dict[str, str], sizes: list[tuple[int, int]]) -> list[Tensor]:
    """The inverse of `pack`, for groups of so many matrices of so many cells."""
    codes, scales = (
        np.frombuffer(zlib.decompress(base64.b64decode(holder[name])), dtype=dtype).astype(np.float64)
        for name, dtype in (("codes", "<i1"), ("scales", "<f4"))
    )
    groups, start, first = [], 0, 0
    for count, cells in sizes:
        group = torch.zeros(count, cells, cells, dtype=torch.float64)
        for matrix in group:
            for i in range(cells):
                row = codes[start : start + i + 1]
                matrix[i, : i + 1] = torch.from_numpy(np.sign(row) * (row / 127) ** 2 * scales[first])
                start, first = start + i + 1, first + 1
        groups.append(group)
    assert (start, first) == (len(codes), len(scales))
    return groups


@quick
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.floats(1e-6, 1e6))
def test_packed_matrices_come_back_within_the_stated_error(heads: int, few: int, many: int, scale: float) -> None:
    groups = [torch.randn(1, few, few).tril() * scale, torch.randn(heads, many, many).tril() * scale]
    for matrices, back in zip(groups, unpack(pack(groups), [(1, few), (heads, many)]), strict=True):
        assert ((back - matrices).abs() <= 0.008 * matrices.abs().amax(-1, keepdim=True)).all()
        assert (back.sign() * matrices.sign() >= 0).all()


def test_a_matrix_of_zeros_is_packed():
    assert unpack(pack([torch.zeros(1, 3, 3)]), [(1, 3)])[0].abs().max() == 0


class Elements(HTMLParser):
    """Every element with its attributes, and the text of the scripts by id."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if tag == "script":
            key = attributes.get("id")
            self.scripts[key] = self.scripts.get(key, "") + data


def test_page_refers_to_nothing_outside_itself(page_file):
    text = page_file.read_text(encoding="utf-8")
    parsed = Elements(text)
    references = [
        value for _, attributes in parsed.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert references == ["data:,"]
    (policy,) = [a["content"] for tag, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)


def test_page_holds_the_report(page_file, seen):
    parsed = Elements(page_file.read_text(encoding="utf-8"))
    data = json.loads(parsed.scripts["data"])
    characters = [chr(byte) if byte < 128 else f"\\x{byte:x}" for byte in TEXT.encode()]
    assert data["tokens"] == ["⟨start⟩", *characters]
    assert data["title"] == "a <small> model"
    assert data["target"] == "<"
    assert (data["mapBlock"], data["meanBlock"]) == (seen.map_block, seen.mean_block) == (3, 1)
    cells = -(-len(TOKENS) // 3)
    for layer, expected in zip(data["layers"], seen.layers, strict=True):
        assert (layer["index"], layer["kind"]) == (expected.index, expected.kind)
        for view in VIEWS:
            mean, maps = unpack(layer["maps"][view], [(1, len(TOKENS)), (layer["heads"], cells)])
            for actual, wanted in ((mean[0], expected.mean[view]), (maps, expected.maps[view])):
                assert ((actual - wanted).abs() <= 0.008 * wanted.abs().amax(-1, keepdim=True)).all()
        if expected.half_lives is None:
            assert layer["halfLives"] is None
        else:
            torch.testing.assert_close(
                torch.tensor(layer["halfLives"]).double(), expected.half_lives, rtol=1e-4, atol=0
            )
    for view in VIEWS:
        (back,) = unpack(data["rollout"][view], [(1, len(TOKENS))])
        assert ((back[0] - seen.rollout[view]).abs() <= 0.008 * seen.rollout[view].amax(-1, keepdim=True)).all()
        torch.testing.assert_close(
            torch.tensor(data["attribution"][view]).double(), seen.attribution[view], rtol=1e-4, atol=1e-12
        )


def test_a_failed_write_keeps_the_old_page(seen, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old", encoding="utf-8")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    words = dict.fromkeys((seen.target, *dict(seen.predictions)), "w")
    labels = token_labels(TOKENIZER, TOKENS)
    monkeypatch.setattr(pages.os, "replace", fail)
    with pytest.raises(OSError, match=r"cannot write .*page\.html: No space left on device"):
        write_page(path, seen, labels, words=words, title="", about="")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="give --out a folder that exists"):
        write_page(tmp_path / "absent" / "page.html", seen, labels, words=words, title="", about="")


def test_labels_of_tokens_that_are_no_characters():
    assert token_labels(ByteTokenizer(), [0xE2, 65, 256, 9, 7]) == ["\\xe2", "A", "⟨start⟩", "\t", "\\x07"]
    bpe = train_bpe(["the cat and the dog and the cow"] * 4, vocab_size=280)
    ids = bpe.encode("the dog")
    assert "".join(token_labels(bpe, ids)) == "the dog"
    assert token_labels(bpe, [bpe.eos_id]) == ["⟨start⟩"]
