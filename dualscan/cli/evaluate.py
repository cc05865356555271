"""`dualscan eval`: bits per byte and perplexity of a model on a text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from dualscan.cli._support.arguments import parse
from dualscan.cli._support.checkpoints import find
from dualscan.data.packing import TokenStream
from dualscan.data.sources import documents
from dualscan.data.tokenizer import load_tokenizer
from dualscan.models.weights import load
from dualscan.train.config import Precision
from dualscan.train.evaluate import evaluate
from dualscan.train.runtime import pick_device, pick_precision


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalArguments:
    """Bits per byte and perplexity of a model on a text.

    Attributes:
        folder: a run's folder (its newest checkpoint) or a checkpoint's, also of transformers or mamba_ssm.
        file: text file, JSON lines (.gz, .xz, .zst too) or a folder of them.
        seqlen: tokens in a window; the state starts afresh at each.
        batch_size: windows read at once.
        device: auto takes a GPU if there is one.
        dtype: of the matrix products: auto takes bf16 where the device computes it faster.
        json: print one JSON object instead of text.
    """

    folder: Positional[Path]
    file: Positional[Path]
    seqlen: int = 1024
    batch_size: int = 4
    device: str = "auto"
    dtype: Precision = "fp32"
    json: bool = False


def main(argv: Sequence[str]) -> int:
    """Prints the result to stdout; returns the exit code."""
    arguments = parse(EvalArguments, argv, prog="dualscan eval")
    folder = find(arguments.folder)
    tokenizer = load_tokenizer(folder)
    source = TokenStream.from_documents(documents(arguments.file), tokenizer)
    device = pick_device(arguments.device)
    result = evaluate(
        load(folder, device=device),
        source,
        tokenizer,
        seqlen=arguments.seqlen,
        batch_size=arguments.batch_size,
        precision=pick_precision(arguments.dtype, device),
        progress=not arguments.json,
    )
    if arguments.json:
        values = {
            "bits_per_byte": result.bits_per_byte,
            "perplexity": result.perplexity,
            "tokens": result.tokens,
            "bytes": result.nbytes,
            "checkpoint": folder.as_posix(),
        }
        print(json.dumps(values))
    else:
        print(f"{result.bits_per_byte:.4f} bits per byte")
        print(f"{result.perplexity:.3f} perplexity per token")
        print(f"{result.tokens:,} tokens, {result.nbytes:,} bytes, {folder}")
    return 0
