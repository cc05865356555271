"""From prompt to text: tokens become characters as they are made, and stop strings end the text exactly."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dualscan.data import tokenizer as on_disk
from dualscan.data.tokenizer import ByteTokenizer, HFTokenizer, StreamDecoder, Tokenizer
from dualscan.generate.engine import stream
from dualscan.generate.sampling import Sampling
from dualscan.models import hub

if TYPE_CHECKING:
    from dualscan.models.lm import MambaLM


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> ByteTokenizer | HFTokenizer:
    """Reads the tokenizer beside a checkpoint: the same name as for `dualscan.load`.

    Args:
        name: a folder with `byte_tokenizer.json` or `tokenizer.json`, or such a file; or the name of a repository of
            the Hugging Face hub, whose weights are not fetched.
        revision: branch, tag or commit of the repository.

    Returns:
        The tokenizer: `encode`, `decode`, `eos_id`, and `save` for writing it beside a model.

    Raises:
        FileNotFoundError: no such folder or repository, or there is no tokenizer in it.
        OSError: the hub cannot be reached.
        ValueError: a folder holds both kinds, or the file is damaged.
    """
    path = Path(name)
    return on_disk.load_tokenizer(path if path.exists() else hub.find(name, revision=revision, weights=False))


class StopFilter:
    """Passes text on until one of the stop strings appears, wherever the pieces were cut.

    The longest tail that could still become a stop string is held back until the next piece decides.

    Args:
        stops: stop strings; none passes everything on at once.

    Raises:
        ValueError: an empty stop string.

    Example:
        >>> stop = StopFilter(["END"])
        >>> [stop.feed(piece) for piece in ("the E", "N", "D of it")], stop.stopped
        (['the ', '', ''], True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("an empty stop string would stop before the first character; leave it out.")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The part that can be shown now; nothing any more after a stop string, which is not shown."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        tail = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0
        )
        self._held = text[len(text) - tail :]
        return text[: len(text) - tail]

    def flush(self) -> str:
        """What was held back and has not become a stop string."""
        held, self._held = self._held, ""
        return held


def stream_text(
    model: "MambaLM",
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    opening: Sequence[int] | None = None,
    state_dtype: torch.dtype | None = None,
) -> Iterator[str]:
    """Continues a text, piece by piece.

    The prompt stands at the beginning of a document, which is what the end-of-document id as the first input means to
    a model that was trained here; another program's model begins as its tokenizer says. The text ends at the next
    end-of-document id, at a stop string, or after `max_tokens`.

    Args:
        model: the language model.
        tokenizer: the one it was trained with.
        prompt: what the text begins with; may be empty.
        max_tokens: tokens to make at most.
        sampling: how a token is drawn; None is plain sampling at temperature 1.
        stop: strings that end the text; they are not part of it.
        seed: equal seeds write equal texts on one device.
        opening: ids before the prompt; None takes those that the model was trained with.
        state_dtype: in which states are kept from token to token, as in `dualscan.generate.engine.generate`.

    Yields:
        Non-empty pieces of text that join to the continuation, without the prompt.
    """
    # Something has to come before the first token.
    ids = [*(_opening(model, tokenizer) if opening is None else opening), *tokenizer.encode(prompt)]
    ids = ids or [tokenizer.eos_id]
    prompt_ids = torch.tensor([ids], dtype=torch.int64)
    decoder, stop_filter = StreamDecoder(tokenizer), StopFilter(stop)
    tokens = stream(
        model,
        prompt_ids,
        max_tokens=max_tokens,
        sampling=sampling,
        stop_ids=(tokenizer.eos_id,),
        seed=seed,
        state_dtype=state_dtype,
    )
    for token in tokens:
        if token.item() == tokenizer.eos_id:
            break
        if piece := stop_filter.feed(decoder.feed(int(token.item()))):
            yield piece
        if stop_filter.stopped:
            return
    if rest := stop_filter.feed(decoder.flush()) + stop_filter.flush():
        yield rest


def _opening(model: "MambaLM", tokenizer: Tokenizer) -> list[int]:
    """The ids that a model's texts begin with."""
    ours = [tokenizer.eos_id]
    if model.source is None:
        return ours
    opening = tokenizer.opening()
    # What transformers stores for this package may have been trained by either.
    return ours if model.source.family == "dualscan_hf" and not opening else opening
