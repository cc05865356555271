"""Text that appears as it is made, cut exactly at stop strings."""

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualscan.data.tokenizer import ByteTokenizer
from dualscan.generate.sampling import Sampling
from dualscan.generate.text import StopFilter, stream_text
from dualscan.models.lm import MambaLM
from dualscan.models.presets import preset


@settings(deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_any_cut_gives_the_text_before_the_first_stop(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stop_filter = StopFilter(stops)
    shown = "".join(stop_filter.feed(piece) for piece in pieces) + stop_filter.flush()
    # The first to be complete ends the text; of several complete at once the one that begins first.
    complete = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not complete:
        assert (shown, stop_filter.stopped) == (text, False)
        return
    assert stop_filter.stopped
    assert text.startswith(shown)
    assert any(text[len(shown) :].startswith(stop) for stop in stops)
    assert len(shown) <= min(complete)


def test_text_is_shown_as_soon_as_it_cannot_become_a_stop():
    stop_filter = StopFilter(["\n\nTHE END"])
    assert stop_filter.feed("one\n") == "one"
    assert stop_filter.feed("two\n\nTHE") == "\ntwo"
    assert stop_filter.feed("Y") == "\n\nTHEY"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty stop string"):
        StopFilter(["", "a"])


class Script(torch.nn.Module):
    """A model that says a fixed text whatever it reads, one byte after the other."""

    def __init__(self, text: str):
        super().__init__()
        self.config = preset("tiny")
        self.ids = [*text.encode(), ByteTokenizer.eos_id]
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, *, state=None, logits_to_keep=0, reuse_state=False):
        position = 0 if state is None else state + 1
        logits = torch.full((1, 1, 272), -30.0)
        logits[0, 0, self.ids[position]] = 30.0
        return logits, position


def continuation(text, **options):
    options: dict[str, Any] = {"max_tokens": 100, "sampling": Sampling(temperature=0), **options}
    return list(stream_text(cast("MambaLM", Script(text)), ByteTokenizer(), "prompt", **options))


def test_pieces_join_to_the_text_and_end_at_the_document():
    pieces = continuation("né à Gand, 中文")
    assert "".join(pieces) == "né à Gand, 中文"
    assert all(pieces)
    assert "中" in pieces, "a character appears when its last byte is there"


def test_stop_strings_span_tokens():
    assert "".join(continuation("one two three", stop=["wo th"])) == "one t"
    assert "".join(continuation("one two three", stop=["threes", "x"])) == "one two three"


def test_max_tokens_may_cut_a_character():
    assert "".join(continuation("né", max_tokens=2)) == "n\ufffd"


def test_a_real_model_writes_from_an_empty_prompt():
    model = MambaLM(preset("tiny"))
    texts = ["".join(stream_text(model, ByteTokenizer(), "", max_tokens=30, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0]
