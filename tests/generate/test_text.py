"""Text that appears as it is made, cut exactly at stop strings."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dualscan
from dualscan.data.tokenizer import ByteTokenizer, HFTokenizer
from dualscan.generate.sampling import Sampling
from dualscan.generate.text import StopFilter, stream_text
from dualscan.models.lm import MambaLM
from dualscan.models.presets import preset
from dualscan.models.weights import Source


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
        self.config, self.source = preset("tiny"), None
        self.ids = [*text.encode(), ByteTokenizer.eos_id]
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, *, state=None, logits_to_keep=0, reuse_state=False, state_dtype=None):
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


def opened(tokenizer: Any, family: str | None) -> list[int]:
    """What `stream_text` gives a model of a family to read for the prompt "AB"."""
    model, read = MambaLM(preset("tiny")), []
    if family is not None:
        model.source = Source(family=family, config={}, dtypes={})
    model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    next(stream_text(model, tokenizer, "AB", max_tokens=1, sampling=Sampling(temperature=0)), None)
    return read[0][0].tolist()


def test_a_text_begins_as_its_model_was_trained():
    """Here, with the end of the document before it; elsewhere, as the tokenizer says."""
    library = pytest.importorskip("tokenizers")
    vocabulary = {"<eos>": 0, "<s>": 1, "A": 2, "B": 3}
    plain = library.Tokenizer(library.models.BPE(vocabulary, []))
    plain.add_special_tokens(["<eos>", "<s>"])
    template = library.Tokenizer.from_str(plain.to_str())
    template.post_processor = library.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    expected = {
        (None, plain): [0, 2, 3],
        (None, template): [0, 2, 3],
        ("mamba2", plain): [2, 3],
        ("mamba2", template): [1, 2, 3],
        ("dualscan_hf", plain): [0, 2, 3],
        ("dualscan_hf", template): [1, 2, 3],
    }
    for (family, tokenizer), ids in expected.items():
        assert opened(HFTokenizer(tokenizer), family) == ids, family


def test_the_tokenizer_beside_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The names that `dualscan.load` takes: a folder, or a repository, whose weights stay where they are."""
    ByteTokenizer().save(tmp_path)
    for name in (tmp_path, str(tmp_path), tmp_path / "byte_tokenizer.json"):
        assert dualscan.load_tokenizer(name).encode("né") == [110, 195, 169]
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert dualscan.load_tokenizer("someone/something", revision="v1").eos_id == 256
    assert (asked["name"], asked["revision"]) == ("someone/something", "v1")
    assert "*.json" in asked["allow_patterns"]
    assert not any("safetensors" in what or "bin" in what for what in asked["allow_patterns"])


def test_no_tokenizer(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: expected byte_tokenizer\.json"):
        dualscan.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        dualscan.load_tokenizer(tmp_path / "nowhere")
