"""Checkpoints are whole or absent, whatever fails while they are written."""

import errno
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError

from dualscan.train import checkpoint
from dualscan.train.checkpoint import TrainState


def write_model(folder):
    (folder / "model.safetensors").write_bytes(b"weights")


def state(step):
    return TrainState({"weight|exp_avg": torch.full((3,), float(step)), "rng": torch.get_rng_state()}, {"total": 9})


def save(run, step, keep=2, write_model=write_model):
    return checkpoint.save(run, step, write_model=write_model, state=state(step), keep=keep)


def test_what_is_saved_is_loaded(tmp_path):
    folder = save(tmp_path, 100)
    assert folder == tmp_path / "step-000100"
    assert (tmp_path / "latest").read_text(encoding="utf-8").strip() == "step-000100"
    loaded = checkpoint.load(folder)
    assert loaded.values["step"] == 100
    assert loaded.values["total"] == 9
    for name, tensor in state(100).tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (7, [10, 20, 30])])
def test_the_newest_stay(tmp_path, keep, left):
    for step in (10, 20, 30):
        save(tmp_path, step, keep)
    assert checkpoint.saved_steps(tmp_path) == left
    assert checkpoint.find(tmp_path).name == "step-000030"


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "step-000010" / "old").touch()
    save(tmp_path, 10)
    assert not (tmp_path / "step-000010" / "old").exists()
    assert checkpoint.find(tmp_path).name == "step-000010", "latest is the last one saved, not the highest step"


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_safetensors(*_args, **_kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("place", ["model", "tensors", "pointer"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, place):
    save(tmp_path, 10)
    writer = write_model
    if place == "model":
        writer = full_disk
    elif place == "tensors":
        monkeypatch.setattr(checkpoint, "save_file", full_disk_in_safetensors)
    else:
        monkeypatch.setattr(checkpoint, "write_text", full_disk)
    with pytest.raises(OSError, match="cannot save step 20: no space left on the disk") as caught:
        save(tmp_path, 20, write_model=writer)
    assert caught.value.errno == errno.ENOSPC
    assert "step-000010 in" in str(caught.value)
    assert "is intact" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert checkpoint.load(checkpoint.find(tmp_path)).values["step"] == 10
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    save(tmp_path, 20)
    assert checkpoint.find(tmp_path).name == "step-000020"


def test_a_crash_leaves_no_trace_in_the_next_save(tmp_path):
    stale = tmp_path / ".step-000010.tmp"
    stale.mkdir()
    (stale / "half").touch()
    assert checkpoint.latest_or_none(tmp_path) is None
    assert not (save(tmp_path, 10) / "half").exists()


def test_find_takes_runs_steps_and_models(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        checkpoint.find(tmp_path / "absent")
    step = save(tmp_path, 10)
    assert checkpoint.find(tmp_path) == checkpoint.find(step) == step
    model = tmp_path / "exported"
    model.mkdir()
    write_model(model)
    assert checkpoint.find(model) == model


def test_a_missing_pointer_is_no_loss(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "latest").unlink()
    assert checkpoint.find(tmp_path).name == "step-000020"
    (tmp_path / "latest").write_text("step-000099", encoding="utf-8")
    assert checkpoint.find(tmp_path).name == "step-000020"


def damage_truncate(folder):
    data = (folder / "train.safetensors").read_bytes()
    (folder / "train.safetensors").write_bytes(data[: len(data) // 2])


def damage_json(folder):
    (folder / "train.json").write_text('{"format": 1, "st', encoding="utf-8")


def damage_format(folder):
    (folder / "train.json").write_text(json.dumps({"format": 99}), encoding="utf-8")


def damage_missing(folder):
    (folder / "train.safetensors").unlink()


def damage_foreign(folder):
    (folder / "train.json").write_text("[1, 2]", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, "truncated or foreign"),
        (damage_json, "truncated or foreign"),
        (damage_format, "format 99 in train.json, this version reads 1"),
        (damage_missing, r"train\.safetensors is missing"),
        (damage_foreign, "format 'list'"),
    ],
)
def test_damage_is_named(tmp_path, damage, words):
    folder = save(tmp_path, 10)
    damage(folder)
    with pytest.raises(ValueError, match=words) as caught:
        checkpoint.load(folder)
    assert "cannot be resumed" in str(caught.value)
    shutil.rmtree(folder)
