"""Configurations refuse bad values by name and survive JSON."""

import dataclasses
import json
from pathlib import Path

import pytest

from dualscan.models.presets import PRESETS, preset
from dualscan.train.config import TrainConfig, demo, from_json, recipe, to_json


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_are_complete_and_survive_json(name):
    config = recipe(name)
    assert config.model == preset(name)
    assert from_json(to_json(config)) == config


def test_json_keeps_every_kind_of_value():
    config = dataclasses.replace(
        demo(), data=Path("a") / "b.txt", tokenizer=Path("t"), betas=(0.8, 0.99), max_steps=7, packed=True, threads=3
    )
    assert json.loads(to_json(config))["data"] == "a/b.txt"
    assert from_json(to_json(config)) == config


def test_wider_models_learn_slower():
    rates = [recipe(name).lr for name in ("tiny", "small", "mamba2_130m", "mamba2_2_7b")]
    assert rates == sorted(rates, reverse=True)
    assert rates[2] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seqlen": 0}, "seqlen=0 must be at least 1"),
        ({"accumulation": -1}, "accumulation=-1 must be at least 1"),
        ({"keep": 0}, "keep=0 must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be 0 or more"),
        ({"max_steps": None}, "max_steps and max_minutes are both None"),
        ({"max_steps": 0}, "max_steps=0 must be positive"),
        ({"max_minutes": -1.0}, r"max_minutes=-1\.0 must be positive"),
        ({"lr": float("nan")}, "lr=nan must be positive"),
        ({"min_lr_ratio": 2.0}, r"min_lr_ratio=2\.0 must lie in \[0, 1\]"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\) must lie in \[0, 1\)"),
        ({"recompute": "all"}, "recompute='all' is unknown; use 'none'"),
        ({"graph": True, "packed": True}, "graph=True needs steps of one size, and those of packed=True are not"),
    ],
)
def test_bad_values_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(model=preset("tiny"), **wrong)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting property name"),
        ("[]", "not a training configuration"),
        ('{"model": 3}', "not a training configuration"),
        (to_json(demo()).replace('"lr"', '"learning"'), "unknown training settings learning"),
        (to_json(demo()).replace('"d_state"', '"dstate"'), "unknown model setting 'dstate'"),
        (to_json(demo()).replace('"seqlen": 256', '"seqlen": -256'), "seqlen=-256"),
    ],
)
def test_damaged_files_are_named(text, words):
    with pytest.raises(ValueError, match=words):
        from_json(text)


def test_unknown_presets_name_the_closest():
    with pytest.raises(ValueError, match=r"unknown preset 'mamba2_120m'.*Did you mean 'mamba2_130m'"):
        recipe("mamba2_120m")
