"""A run that takes a second: a tiny model on a few kilobytes of text."""

import dataclasses
from pathlib import Path

import pytest

from dualscan.models.presets import preset
from dualscan.train.config import TrainConfig


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Twelve documents of simple, learnable text, as JSON lines."""
    path = tmp_path / "text.jsonl"
    lines = [f'{{"text": "{" ".join(f"{n} times {k} is {n * k}," for k in range(1, 20))} é"}}' for n in range(2, 14)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path, text: Path) -> TrainConfig:
    """Twenty steps on it."""
    return TrainConfig(
        model=dataclasses.replace(preset("tiny"), pattern="M", chunk_size=8),
        data=text,
        seqlen=32,
        batch_size=2,
        max_steps=20,
        lr=1e-2,
        warmup_steps=4,
        dtype="fp32",
        device="cpu",
        log_every=1,
        eval_every=10,
        eval_tokens=128,
        save_every=10,
        out=tmp_path / "run",
    )
