"""`dualscan demo`: from nothing to a model that writes, on a CPU, in about four minutes; it says what it does."""

import bz2
import dataclasses
import signal
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dualscan.cli import FAILED, program
from dualscan.cli._support.agreement import compare_forms, table
from dualscan.cli._support.arguments import parse, show_progress_messages
from dualscan.cli.generate import show
from dualscan.cli.train import describe
from dualscan.data.sources import embedded
from dualscan.generate.sampling import Sampling
from dualscan.generate.text import stream_text
from dualscan.train import plot
from dualscan.train.config import TrainConfig
from dualscan.train.config import demo as demo_recipe
from dualscan.train.loop import Trainer

PROMPT = "PROTEUS.\n"
SAMPLE_TOKENS = 500
SAMPLING = Sampling(temperature=0.8, min_p=0.02)
# Tokens of the held-out play that the three forms are compared on; the quadratic form's matrices grow with the square.
COMPARED_TOKENS = 512
WIDTH = 100
RULE = "-" * WIDTH


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoArguments:
    """Train a small Mamba-2 on the built-in text, check it, and let it write.

    Attributes:
        minutes: training time.
        out: folder for checkpoint, metrics and loss curve; an earlier run there is replaced.
        seed: of the initial weights, the order of the data and the sample.
        threads: CPU threads; None leaves PyTorch's choice.
        device: where it trains.
    """

    minutes: float = 3.0
    out: Path = Path("runs/demo")
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"


def main(argv: Sequence[str]) -> int:
    """Runs the demo; returns the exit code."""
    arguments = parse(DemoArguments, argv, prog="dualscan demo")
    config = dataclasses.replace(
        demo_recipe(),
        max_minutes=arguments.minutes,
        out=arguments.out,
        seed=arguments.seed,
        threads=arguments.threads,
        device=arguments.device,
    )
    return run(config)


def run(config: TrainConfig) -> int:
    """Trains `config` on the embedded text with commentary; returns the exit code."""
    show_progress_messages()
    held_out = next(embedded("validation"))
    content = held_out.text.encode()
    squeezed = 8 * len(bz2.compress(content)) / len(content)
    say(
        1,
        "The task",
        "A language model reads text and predicts the next byte. This one learns from eight plays by Shakespeare that "
        f"come with the package, and is tested on a ninth that it never sees, {held_out.name}. The score is bits per "
        f"byte: 8 is no idea at all, bzip2 compresses the ninth play to {squeezed:.2f}, lower is better.",
    )
    trainer = Trainer(config, overwrite=True)
    say(2, f"Training for {config.max_minutes:g} minutes", "Ctrl-C stops and saves.")
    print(describe(trainer), flush=True)
    result = trainer.run()
    if result.interrupted or result.validation is None:
        print(f"\nStopped at step {result.step} and saved. Continue with\n  {program()} train --resume {config.out}")
        return 128 + signal.Signals[result.interrupted or "SIGINT"]
    curve = f", its learning curve in {config.out / 'loss.png'}" if plot.available() else ""
    print(
        f"{result.validation.bits_per_byte:.3f} bits per byte on {held_out.name}, after {result.step} steps and "
        f"{trainer.tokens:,} bytes of training text\nin {result.seconds / 60:.1f} minutes. "
        f"The model is in {result.checkpoint}{curve}."
    )

    say(
        3,
        "Checking the mathematics",
        "Structured state space duality: one operator, several forms. Here the trained model reads the first "
        f"{COMPARED_TOKENS} bytes of the held-out play in each; relative error of outputs and states against float64:",
    )
    tokens = torch.from_numpy(trainer.corpus.validation.read(0, COMPARED_TOKENS).astype("int64"))[None]
    agreements = compare_forms(trainer.model, tokens.to(trainer.device))
    print(table(agreements))
    agree = all(entry.agrees for entry in agreements)
    print("All forms agree to rounding." if agree else "The forms do NOT agree: this is a defect, please report it.")

    say(4, "Writing", "Byte by byte, in the recurrent form: every byte costs the same, however long the text becomes.")
    pieces = stream_text(
        trainer.model, trainer.tokenizer, PROMPT, max_tokens=SAMPLE_TOKENS, sampling=SAMPLING, seed=config.seed
    )
    print(RULE)
    show(PROMPT, pieces)
    print(RULE)
    print(next_steps(config))
    return 0 if agree else FAILED


def say(number: int, title: str, text: str) -> None:
    """A heading, and below it what happens, filled to the page's width."""
    print(f"\n[{number}/4] {title}\n{textwrap.fill(text, WIDTH)}", flush=True)


def next_steps(config: TrainConfig) -> str:
    """Commands to try, as they can be typed."""
    command = program()
    commands = [
        (f'generate {config.out} --prompt "JULIA." --temperature 0.6', "another scene"),
        (f"train --resume {config.out} --max-minutes 10", "learn on, to ten minutes in all"),
        ("train small --data YOUR.txt --max-minutes 30", "a larger model on your own text"),
        (f"eval {config.out} YOUR.txt", "bits per byte of your own text"),
        ("env", "what runs where, and why"),
    ]
    width = max(len(options) for options, _ in commands)
    return "\n".join(["\nWhat to try next", *(f"  {command} {options:<{width}}  {what}" for options, what in commands)])
