"""A model on disk: bit for bit there and back, and whole or not at all."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import dualscan
from dualscan.models import weights
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM

FILES = {"model.safetensors", "config.json"}


def model_of(**changes: Any) -> MambaLM:
    sizes = {"d_model": 32, "pattern": "M*-M", "vocab_size": 50, "d_state": 8, "headdim": 16, "rope_theta": 100.0}
    return MambaLM(ModelConfig(**{**sizes, **changes}))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(actual: MambaLM, expected: MambaLM) -> None:
    left, right = actual.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    for name, t in right.items():
        assert left[name].dtype == t.dtype, name
        assert torch.equal(left[name], t), name


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"dt_limit": (0.01, math.inf), "pattern": "M"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    model, tokens = model_of(**changes).to(dtype).eval(), torch.randint(50, (2, 9))
    model.save(tmp_path / "deep" / "folder")
    loaded = dualscan.load(tmp_path / "deep" / "folder")
    same(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert set(files(tmp_path / "deep" / "folder")) == FILES
    # It trains on.
    loaded.loss(tokens, tokens).backward()
    assert all(p.grad is not None for p in loaded.parameters())
    loaded.save(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "deep" / "folder")


def test_load_in_another_dtype(tmp_path: Path) -> None:
    model = model_of()
    model.save(tmp_path)
    same(dualscan.load(tmp_path, dtype=torch.bfloat16), model.bfloat16())
    same(dualscan.load(str(tmp_path), dtype=torch.float64, device="cpu"), model_copy(tmp_path).double())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.complex64])
def test_dtypes_that_are_none(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"dtype=.* must be a floating-point torch.dtype such as torch.bfloat16"):
        dualscan.load(tmp_path, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "mtia:3"])
def test_devices_that_are_not_here(tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used here .*; None is the CPU") as raised:
        dualscan.load(tmp_path, device=device)
    assert "\n" not in str(raised.value)


def model_copy(folder: Path) -> MambaLM:
    model = MambaLM(dualscan.load(folder).config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def test_decay_rates_that_were_cast_come_back_as_float32(tmp_path: Path) -> None:
    model = model_of()
    model.save(tmp_path)
    tensors = {name: t.bfloat16() for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = dualscan.load(tmp_path)
    for name, p in loaded.named_parameters():
        exact = name.endswith(("A_log", "dt_bias", ".D", "norm.weight", "norm_f.weight"))
        assert p.dtype == (torch.float32 if exact else torch.bfloat16), name
    assert loaded(torch.randint(50, (1, 5))).logits.isfinite().all()


def test_saving_over_a_model_replaces_it(tmp_path: Path) -> None:
    model_of().save(tmp_path)
    other = model_of(pattern="MM", d_model=16)
    other.save(tmp_path)
    same(dualscan.load(tmp_path), other)
    assert set(files(tmp_path)) == FILES


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["weights", "weights half written", "config", "rename", "folder"])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    old = model_of()
    old.save(tmp_path)
    before = files(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise FULL

    def half(tensors: Any, path: Path, **kwargs: Any) -> None:
        path.write_bytes(b"half of")
        raise SafetensorError("Error while serializing: No space left on device")

    with monkeypatch.context() as broken:
        if failing == "weights":
            broken.setattr(weights, "save_file", fail)
        elif failing == "weights half written":
            broken.setattr(weights, "save_file", half)
        elif failing == "config":
            broken.setattr(Path, "write_text", fail)
        elif failing == "folder":
            broken.setattr(Path, "mkdir", fail)
        else:
            broken.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left") as raised:
            # Another model: a mixture of old and new files would not load.
            model_of(pattern="MM", d_model=16).save(tmp_path)
    if failing != "folder":
        assert "kept" in str(raised.value)
        assert str(tmp_path) in str(raised.value)
    assert files(tmp_path) == before
    same(dualscan.load(tmp_path), old)


@pytest.mark.parametrize("length", [0, 4, 100, -1, -4000])
def test_a_truncated_file(tmp_path: Path, length: int) -> None:
    model_of().save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or not a safetensors file .*copy it again"):
        dualscan.load(tmp_path)


def write_config(folder: Path, values: Any) -> None:
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"format": "dualscan", "mod', ["config.json is not JSON", "truncated"]),
        ("[]", ["checkpoint of another program"]),
        ({"model_type": "llama", "hidden_size": 3}, ["a transformers checkpoint of type 'llama'", "model.save()"]),
        ({"d_model": 3, "layers": 4}, ["a checkpoint of another program", "mamba2"]),
        ({"format": "dualscan"}, ["config.json has no 'model' section"]),
        ({"format": "dualscan", "model": [1]}, ["config.json has no 'model' section"]),
        ({"format": "dualscan", "model": {"d_model": 32}}, ["config.json", "no 'pattern'"]),
        (
            {"format": "dualscan", "model": {"d_model": "32", "pattern": "M", "vocab_size": 50}},
            ["config.json", "d_model='32'", "whole number"],
        ),
    ],
)
def test_foreign_and_damaged_configurations(tmp_path: Path, config: Any, words: list[str]) -> None:
    model_of().save(tmp_path)
    write_config(tmp_path, config)
    with pytest.raises(ValueError) as raised:
        dualscan.load(tmp_path)
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_configuration_that_is_not_text(tmp_path: Path) -> None:
    model_of().save(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not JSON"):
        dualscan.load(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder; give one that"):
        dualscan.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config.json; give a folder"):
        dualscan.load(tmp_path)
    model_of().save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors .*; give a folder"):
        dualscan.load(tmp_path)


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    for step in (9, 10):
        model_of().save(tmp_path / "run" / f"step-{step:06d}")
    with pytest.raises(FileNotFoundError, match=r"run has no config.json; a folder in it has one, .*step-000010\."):
        dualscan.load(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"config.json is a file; give the folder"):
        dualscan.load(tmp_path / "run" / "step-000009" / "config.json")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"adapter has no config.json; it holds an adapter of peft"):
        dualscan.load(tmp_path / "adapter")


@pytest.mark.parametrize("format", ["dualscan", "dualscan_hf"])
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, format: str) -> None:
    """Unmerged adapters, a projection that is gone, an embedding that grew behind the configuration's back."""
    model = model_of()
    model.get_submodule("layers.0.mixer.in_proj").register_parameter("lora_A", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"unknown 'layers.0.mixer.in_proj.lora_A'.*merge_and_unload"):
        model.save(tmp_path / "out", format=format)
    model = model_of()
    model.get_submodule("layers.0.mixer").register_module("in_proj", torch.nn.Identity())
    with pytest.raises(ValueError, match=r"misses 'layers.0.mixer.in_proj.weight'"):
        model.save(tmp_path / "out", format=format)
    model = model_of()
    model.embedding = torch.nn.Embedding(80, 32)
    with pytest.raises(ValueError, match=r"embedding.weight has shape \(80, 32\), but model.config .* \(64, 32\)"):
        model.save(tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "M*-MM"}, ["misses", "layers.4", "more", "another model"]),
        ({"pattern": "M*-"}, ["unknown", "layers.3", "another model"]),
        ({"vocab_size": 99}, ["embedding.weight has shape (64, 32)", "(112, 32)", "different models"]),
        ({"tie_embeddings": False}, ["misses 'lm_head.weight'"]),
    ],
)
def test_a_configuration_of_another_model(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    model = model_of()
    model.save(tmp_path)
    write_config(tmp_path, {"format": "dualscan", "model": {**model.config.to_dict(), **changes}})
    with pytest.raises(ValueError) as raised:
        dualscan.load(tmp_path)
    for word in words:
        assert word in str(raised.value)
