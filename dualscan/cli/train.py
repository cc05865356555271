"""`dualscan train`: trains a preset on a text, from the command line's overrides of its recipe."""

import dataclasses
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dualscan.cli import program
from dualscan.cli._support.arguments import parse, show_progress_messages, value_of
from dualscan.models.presets import PRESETS
from dualscan.train import checkpoint
from dualscan.train.config import TrainConfig, from_json, recipe
from dualscan.train.loop import Trainer, TrainResult, read_tokenizer

DEFAULT_PRESET = "demo"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainArguments:
    """Train a language model.

    Attributes:
        config: the run.
        resume: continue the run in this folder from its last checkpoint; other options change its settings.
        overwrite: replace a run that the folder of --out holds already.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    resume: Path | None = None
    overwrite: bool = False


def main(argv: Sequence[str]) -> int:
    """Trains; returns the exit code."""
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    resumed = value_of("--resume", rest)
    if resumed is not None:
        if name is not None:
            raise ValueError(
                f"preset {name!r} with --resume: the run in {resumed} has its model; leave the preset out."
            )
        config = read_run(Path(resumed))
    else:
        config = recipe(name or DEFAULT_PRESET)
    arguments = parse(
        TrainArguments,
        rest,
        prog=f"dualscan train {name or '[PRESET]'}",
        description=f"Train a language model. Presets: {', '.join(PRESETS)} (default: {DEFAULT_PRESET}).",
        default=TrainArguments(config=config),
    )
    chosen = arguments.config
    if resumed is None and chosen.model.vocab_size == config.model.vocab_size:
        # The vocabulary follows the tokenizer, unless it was asked for.
        vocab_size = read_tokenizer(chosen.tokenizer).vocab_size
        chosen = dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, vocab_size=vocab_size))
    show_progress_messages()
    trainer = Trainer(chosen, resume=resumed is not None, overwrite=arguments.overwrite)
    print(describe(trainer), file=sys.stderr)
    result = trainer.run()
    print(summary(trainer, result), file=sys.stderr)
    return 0 if result.interrupted is None else 128 + signal.Signals[result.interrupted]


def read_run(run: Path) -> TrainConfig:
    """The configuration of a run folder, which may have been moved.

    Raises:
        ValueError: it is not a run folder, or its configuration is damaged.
    """
    path = run / checkpoint.CONFIG
    if not path.is_file():
        raise ValueError(f"{run} cannot be resumed: it has no {checkpoint.CONFIG}; give a folder that training wrote.")
    try:
        config = from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return dataclasses.replace(config, out=run)


def describe(trainer: Trainer) -> str:
    """What is about to happen, in three lines."""
    config = trainer.config
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    limits = [f"{config.max_steps} steps"] if config.max_steps else []
    limits += [f"{config.max_minutes:g} minutes"] if config.max_minutes else []
    start = f", from step {trainer.step}" if trainer.step else ""
    return "\n".join(
        [
            f"model  {size / 1e6:.2f}M parameters: {config.model.n_layers} layers ({config.model.pattern}), "
            f"d_model {config.model.d_model}",
            f"text   {trainer.corpus.name}: {len(trainer.corpus.train):,} tokens to train on, "
            f"{len(trainer.corpus.validation):,} held out",
            f"run    {' or '.join(limits)}{start}, {config.tokens_per_step:,} tokens a step, on {trainer.device} in "
            f"{str(trainer.precision.dtype).removeprefix('torch.')} ({trainer.precision.why})",
        ]
    )


def summary(trainer: Trainer, result: TrainResult) -> str:
    """How it ended, and the command that comes next."""
    out = trainer.config.out
    if result.interrupted:
        return f"stopped at step {result.step} and saved; continue with\n  {program()} train --resume {out}"
    lines = [f"done: step {result.step}, {result.seconds / 60:.1f} minutes of training"]
    if result.validation:
        lines[0] += f", validation {result.validation.bits_per_byte:.3f} bits per byte"
    return "\n".join([*lines, f"checkpoint {result.checkpoint}; let it write with", f"  {program()} generate {out}"])
