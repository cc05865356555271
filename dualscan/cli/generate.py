"""`dualscan generate`: continues a text and shows it as it is made."""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tyro.conf import Positional

from dualscan.cli._support.arguments import parse
from dualscan.cli._support.checkpoints import find, tokenizer_of
from dualscan.generate.sampling import Sampling
from dualscan.generate.text import stream_text
from dualscan.models.weights import load
from dualscan.train.runtime import pick_device

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateArguments:
    """Continue a text with a trained model.

    Attributes:
        folder: a run's folder (its newest checkpoint) or a checkpoint's, also of transformers or mamba_ssm.
        model: instead of a folder, a folder or a repository of the Hugging Face hub, which is fetched.
        revision: branch, tag or commit of the model's repository.
        tokenizer: a folder, a file or a repository with a tokenizer, where the checkpoint has none.
        prompt: what the text begins with.
        max_tokens: tokens to make at most.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens.
        top_p: keep the smallest set of most likely tokens whose probability reaches this.
        min_p: keep tokens at least this many times as likely as the most likely one.
        repetition_penalty: above 1 makes tokens less likely that the text already has.
        stop: strings that end the text; they are not shown.
        seed: equal seeds write equal texts.
        device: auto takes a GPU if there is one.
        dtype: of the matrices.
        state_dtype: of the states of Mamba-2 layers from token to token; bf16 is half the memory, and rounded.
    """

    folder: Positional[Path | None] = None
    model: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    prompt: str = ""
    max_tokens: int = 400
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    device: str = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"
    state_dtype: Literal["fp32", "bf16"] = "fp32"


def main(argv: Sequence[str]) -> int:
    """Writes text to stdout and the speed to stderr; returns the exit code."""
    arguments = parse(GenerateArguments, argv, prog="dualscan generate")
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
    )
    if (arguments.folder is None) == (arguments.model is None):
        raise ValueError(
            "give a folder, or --model with a folder or a repository of the hub, and not both; "
            "`dualscan generate --help` lists the options."
        )
    folder = find(arguments.folder or arguments.model or "", revision=arguments.revision)
    tokenizer = tokenizer_of(folder, arguments.tokenizer)
    model = load(folder, dtype=_DTYPES[arguments.dtype], device=pick_device(arguments.device))
    pieces = stream_text(
        model,
        tokenizer,
        arguments.prompt,
        max_tokens=arguments.max_tokens,
        sampling=sampling,
        stop=arguments.stop,
        seed=arguments.seed,
        state_dtype=_DTYPES[arguments.state_dtype],
    )
    started = time.perf_counter()
    written = show(arguments.prompt, pieces)
    if sys.stderr.isatty():
        seconds = time.perf_counter() - started
        print(f"[{written} characters, {written / seconds:.0f} a second, from {folder}]", file=sys.stderr)
    return 0


def show(prompt: str, pieces: Iterable[str]) -> int:
    """Prints the prompt and each piece as it comes; returns the number of new characters."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    print(prompt, end="", flush=True)
    written = 0
    for piece in pieces:
        print(piece, end="", flush=True)
        written += len(piece)
    print(flush=True)
    return written
