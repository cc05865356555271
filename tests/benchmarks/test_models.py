"""The jobs of whole layers and models run where there is no GPU, and their records say what was measured."""

import argparse
import copy
import itertools
import json

import pytest
import torch

from benchmarks import common
from benchmarks.models import mamba2_block, train_step
from dualscan.models.accounting import training_flops_per_sequence
from dualscan.models.lm import MambaLM
from dualscan.models.presets import preset
from tests.oracle import CAPS


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)


def saved(job: str) -> list[dict]:
    return json.loads((common.RESULTS / f"{job}-cpu.json").read_text(encoding="utf-8"))


def test_train_step(capsys):
    sizes = ["--models", "tiny", "--contexts", "32", "128", "--tokens", "64", "--rounds", "1", "--steps", "1"]
    variants = ["--variants", "plain", "activations", "block", "graph"]
    assert train_step.main(["--device", "cpu", "--save", *sizes, *variants]) == 0
    records = saved("train_step")
    shapes = ["tiny 2x32"] * 4 + ["tiny 1x128"] * 4
    assert [(r["shape"], r["impl"]) for r in records] == [
        (shape, f"dualscan {kind}") for shape, kind in zip(shapes, variants[1:] * 2, strict=True)
    ]
    for r in records:
        if "graph" in r["impl"]:
            assert "needs a CUDA device" in r["failed"]
            continue
        rows, context = map(int, r["shape"].split()[1].split("x"))
        assert r["tokens_per_s"] == pytest.approx(rows * context / (r["call_ms"] / 1e3))
        assert r["flops"] == training_flops_per_sequence(preset("tiny"), context, batch=rows)
        assert 0 < r["loss"] < 10
        assert "mfu" not in r, "a CPU's peak is not known"
    assert "graph: failed: a CUDA graph needs" in capsys.readouterr().out


@pytest.mark.parametrize("in_turns", [True, False])
def test_train_step_with_a_rival(in_turns, monkeypatch):
    """Here the rival is our own model again."""
    monkeypatch.setattr(train_step.rivals, "Model", copy.deepcopy)
    monkeypatch.setattr(train_step.rivals, "path", lambda: "as we do")
    args = argparse.Namespace(device="cpu", tokens=64, steps=1, rounds=2)
    groups = [["dualscan", train_step.RIVAL]] if in_turns else [["dualscan"], [train_step.RIVAL]]
    variants = ["plain", "graph", "activations"]
    seen = [list(train_step.Job("tiny", args, 1e15, impls).measure(32, variants)) for impls in groups]
    for saved_then, more in itertools.pairwise(records for group in seen for records in group):
        assert len(more) == len(saved_then) + 1 or not in_turns
    records = train_step.with_ratios([r for group in seen for r in group[-1]])
    by_name = {r["impl"]: r for r in records}
    assert set(by_name) == {*(f"dualscan {kind}" for kind in variants), "mamba_ssm"}
    assert all(r["in_turns"] is in_turns for r in records)
    rival = by_name["mamba_ssm"]
    assert rival["loss"] == by_name["dualscan plain"]["loss"], "both begin with the same weights"
    assert rival["path"] == "as we do"
    for kind in ("plain", "activations"):
        mine = by_name[f"dualscan {kind}"]
        assert mine["ratio"] == pytest.approx(rival["call_ms"] / mine["call_ms"])
        assert mine["mfu"] == pytest.approx(mine["flops"] / mine["call_ms"] * 1e3 / train_step.PEAK)
    assert "needs a CUDA device" in by_name["dualscan graph"]["failed"]
    assert "ratio" not in by_name["dualscan graph"]


def test_train_step_leaves_no_variant_behind():
    model = MambaLM(preset("tiny"))
    run, example = train_step.step_of(model), next(train_step.batches(model.config, 64, 32))
    with train_step.variant(model, run, "activations+compile", example):
        assert all(block.recompute == "activations" and block._compiled_call_impl for block in model.layers)
    assert all(block.recompute == "none" and not block._compiled_call_impl for block in model.layers)


def test_train_step_knows_its_variants(capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--device", "cpu", "--variants", "graph+fast"])
    assert "--variants graph+fast: unknown fast; the parts are" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_they_say_so(capsys):
    for job in (train_step, mamba2_block):
        assert job.main([]) == 1
        assert "needs an NVIDIA GPU; --device cpu" in capsys.readouterr().out


def test_mamba2_block():
    assert mamba2_block.main(["--device", "cpu", "--shapes", "tiny 2x64", "--repeats", "1", "--save"]) == 0
    records = saved("mamba2_block")
    assert {r["shape"] for r in records} == {"tiny 2x64", "tiny 2x64, bf16 weights"}
    assert {r["pass"] for r in records} == {"fwd", "fwdbwd"}
    for r in records:
        assert r["call_ms"] > 0
        if r["impl"] != mamba2_block.PRODUCTS:
            assert {"y", "du", "din_proj.weight", "dA_log"} <= r["error"].keys()
            assert 0 < r["error"]["y"] < CAPS[torch.bfloat16][0]
