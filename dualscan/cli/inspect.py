"""`dualscan inspect`: writes a page that shows what a model's layers mix at one text."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tyro.conf import Positional

from dualscan.cli._support.arguments import parse
from dualscan.cli._support.checkpoints import find
from dualscan.data.tokenizer import load_tokenizer
from dualscan.inspect.page import token_labels, write_page
from dualscan.inspect.report import inspect
from dualscan.models.accounting import parameters
from dualscan.models.config import ModelConfig
from dualscan.models.weights import load
from dualscan.train.runtime import pick_device


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectArguments:
    """Write a page that shows what a model's layers mix at one text; it opens without a network.

    Attributes:
        folder: a run's folder (its newest checkpoint) or a checkpoint's, also of transformers or mamba_ssm.
        text: the text to look at.
        out: the HTML file to write.
        resolution: cells a side of a head's map at most; a longer text has several tokens a cell.
        memory: GiB that the matrices may take, beside the model.
        device: auto takes a GPU if there is one.
    """

    folder: Positional[Path]
    text: str
    out: Path = Path("inspect.html")
    resolution: int = 128
    memory: float = 2.0
    device: str = "auto"


def main(argv: Sequence[str]) -> int:
    """Writes the page and prints its path; returns the exit code."""
    arguments = parse(InspectArguments, argv, prog="dualscan inspect")
    if not arguments.text:
        raise ValueError('text="" is empty; give --text the words to look at.')
    folder = find(arguments.folder)
    tokenizer = load_tokenizer(folder)
    # A text stands at the beginning of a document, as in `dualscan generate`.
    tokens = [tokenizer.eos_id, *tokenizer.encode(arguments.text)]
    device = pick_device(arguments.device)
    model = load(folder, device=device)
    seen = inspect(
        model,
        torch.tensor(tokens, device=device),
        resolution=arguments.resolution,
        memory=arguments.memory,
        progress=sys.stderr.isatty(),
    )
    predicted = [token for token, _ in seen.predictions]
    size = write_page(
        arguments.out,
        seen,
        token_labels(tokenizer, tokens),
        words=dict(zip(predicted, token_labels(tokenizer, predicted), strict=True)),
        title=title(folder),
        about=about(model.config),
    )
    print(f"{arguments.out}: {len(tokens)} tokens, {size / 1e6:.1f} MB; open it in a browser")
    return 0


def title(folder: Path) -> str:
    """A checkpoint by its folder's name, after its run's if it is a step of one."""
    folder = folder.resolve()
    return f"{folder.parent.name}, {folder.name}" if folder.name.startswith("step-") else folder.name


def about(config: ModelConfig) -> str:
    """Size and layers in a line."""
    names = {
        "mamba2": "Mamba-2",
        "mamba": "Mamba",
        "mlp": "MLP",
        "moe": "experts",
        "parallel": "Mamba-2 beside attention",
        "shared": "Mamba-2 with a shared transformer",
    }
    kinds = Counter(config.layer_types)
    layers = ", ".join(f"{count} {names.get(kind, kind)}" for kind, count in kinds.items())
    return f"{parameters(config).total / 1e6:.1f}M parameters · layers: {layers}"
