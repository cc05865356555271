"""Damaged, hostile and foreign checkpoints: one line that names the file, the key, what was expected and found."""

import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dualscan
from dualscan.models import families
from dualscan.models.weights import load_config
from tests.models.families.cases import CASES, saved
from tests.models.test_weights import write_config

NEMOTRON = next(case for case in CASES if case.family == "nemotron_h")
MAMBA2 = next(case for case in CASES if case.family == "mamba2")
WEIGHTS = "model.safetensors"


def refused(folder: Path, *words: str, error: type[Exception] = ValueError, **options: Any) -> None:
    with pytest.raises(error) as raised:
        dualscan.load(folder, **options)
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)


def test_missing_and_surplus_keys(tmp_path: Path) -> None:
    saved(NEMOTRON, tmp_path)
    key = "backbone.layers.5.mixer.experts.3.up_proj.weight"
    change(tmp_path, lambda tensors: tensors.pop(key))
    refused(tmp_path, WEIGHTS, "misses", key, "config.json")
    change(tmp_path, lambda tensors: tensors.update({key: torch.zeros(12, 20), "backbone.colour": torch.zeros(1)}))
    refused(tmp_path, WEIGHTS, "unknown 'backbone.colour'")


def test_wrong_shapes(tmp_path: Path) -> None:
    saved(NEMOTRON, tmp_path)
    key = "backbone.layers.5.mixer.experts.3.up_proj.weight"
    change(tmp_path, lambda tensors: tensors.update({key: torch.zeros(13, 20)}))
    refused(tmp_path, WEIGHTS, key, "(13, 20)", "(12, 20)")


def test_a_configuration_that_contradicts_the_weights(tmp_path: Path) -> None:
    saved(MAMBA2, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_config(tmp_path, {**config, "n_groups": 2})
    refused(tmp_path, "in_proj.weight", "(118, 24)", "(134, 24)")
    write_config(tmp_path, {**config, "num_heads": 5})
    refused(tmp_path, "config.json", "num_heads 5 x head_dim 8", "expand 2 x hidden_size 24")
    write_config(tmp_path, {**config, "hidden_act": "gelu"})
    refused(tmp_path, "mamba2", "hidden_act='gelu'", "not supported")
    write_config(tmp_path, {name: value for name, value in config.items() if name != "state_size"})
    refused(tmp_path, "config.json", "has no 'state_size'")
    write_config(tmp_path, {**config, "time_step_limit": "none"})
    refused(tmp_path, "time_step_limit='none'", "pair of numbers")


def test_a_tied_head_that_is_another_matrix(tmp_path: Path) -> None:
    saved(MAMBA2, tmp_path)
    head = load_file(tmp_path / WEIGHTS)["backbone.embeddings.weight"]
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    dualscan.load(tmp_path)
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head + 1}))
    refused(tmp_path, "lm_head.weight", "ties", WEIGHTS)


@pytest.mark.parametrize("length", [0, 7, 2000, -1])
@pytest.mark.parametrize("shards", [False, True])
def test_truncated_safetensors(length: int, shards: bool, tmp_path: Path) -> None:
    saved(MAMBA2, tmp_path, **({"max_shard_size": "8KB"} if shards else {}))
    path = max(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:length])
    refused(tmp_path, path.name, "truncated or not a safetensors file")


def test_shards_that_do_not_agree_with_their_index(tmp_path: Path) -> None:
    saved(MAMBA2, tmp_path, max_shard_size="8KB")
    index, last = tmp_path / f"{WEIGHTS}.index.json", max(tmp_path.glob("*.safetensors"))
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "more": last.name}}))
    refused(tmp_path, last.name, "more", index.name)
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    refused(tmp_path, index.name, "beside it")
    index.write_text("{")
    refused(tmp_path, index.name, "not an index")
    index.write_text(json.dumps(content))
    last.unlink()
    refused(tmp_path, last.name, index.name, error=FileNotFoundError)


class Hostile:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_wants_to_run_code(tmp_path: Path) -> None:
    saved(MAMBA2, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    trap = tmp_path / "trap"
    torch.save({"backbone.norm_f.weight": Hostile(trap)}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "run code")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(trap)))
    refused(tmp_path, "pytorch_model.bin")
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", "half"])
def test_damaged_pickles(content: bytes | str, tmp_path: Path) -> None:
    saved(MAMBA2, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(1000)}, buffer)
    damaged = buffer.getvalue()[:2000] if isinstance(content, str) else content
    (tmp_path / "pytorch_model.bin").write_bytes(damaged)
    refused(tmp_path, "pytorch_model.bin")


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    saved(MAMBA2, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save({"epoch": 3}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "not a dictionary of tensors")


def test_the_first_name_of_the_embedding(tmp_path: Path) -> None:
    theirs = saved(MAMBA2, tmp_path)
    old, new = "backbone.embedding.weight", "backbone.embeddings.weight"
    change(tmp_path, lambda tensors: tensors.update({old: tensors.pop(new)}))
    assert torch.equal(dualscan.load(tmp_path).embedding.weight, theirs.state_dict()[new])


def test_pickled_weights_of_transformers(tmp_path: Path) -> None:
    theirs = saved(MAMBA2, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    model = dualscan.load(tmp_path)
    assert torch.equal(model.embedding.weight, theirs.state_dict()["backbone.embeddings.weight"])


@pytest.mark.parametrize("kind", ["zamba", "mamba3", "rwkv"])
def test_families_out_of_reach(kind: str, tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": kind})
    refused(tmp_path, repr(kind), families.OUT_OF_REACH[kind], "not supported yet", "mamba2")


def test_a_pattern_with_layers_of_another_program(tmp_path: Path) -> None:
    """The letters of Nemotron-H are among ours, and ours are more."""
    saved(NEMOTRON, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_config(tmp_path, {**config, "hybrid_override_pattern": "M-M*mE"})
    refused(tmp_path, "config.json", "hybrid_override_pattern='M-M*mE'", "M, *, - and E")


def test_unknown_families(tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": "gpt2"})
    refused(tmp_path, "'gpt2'", *families.NAMES)
    with pytest.raises(ValueError, match=r"unknown family 'bambi'.*Did you mean 'bamba'"):
        families.family("bambi")


def test_saving_in_a_format_that_cannot_be(tmp_path: Path) -> None:
    saved(MAMBA2, tmp_path / "theirs")
    model = dualscan.load(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"bamba cannot express this model: pattern='MMM' would become 'M-M-M-'"):
        model.save(tmp_path / "out", format="bamba")
    with pytest.raises(ValueError, match="unknown family 'gguf'"):
        model.save(tmp_path / "out", format="gguf")
    model.source = None
    with pytest.raises(ValueError, match="not loaded from another program"):
        model.save(tmp_path / "out", format="source")
    with pytest.raises(ValueError, match=r"theirs holds model\.safetensors already"):
        model.save(tmp_path / "theirs", format="mamba_ssm")
    assert not (tmp_path / "out").exists()


def test_other_groups_of_the_norm(tmp_path: Path) -> None:
    """What transformers 4 computed where n_groups is more than 1, kept through both formats."""
    case = next(case for case in CASES if case.family == "mamba2" and case.settings.get("n_groups", 1) > 1)
    theirs = saved(case, tmp_path / "theirs")
    for layer in theirs.backbone.layers:
        layer.mixer.norm.group_size = layer.mixer.intermediate_size
    ids = torch.randint(60, (1, 9))
    expected = theirs(ids).logits
    model = dualscan.load(tmp_path / "theirs", norm_groups=1)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(dualscan.load(tmp_path / "theirs")(ids).logits, expected, atol=1e-2)
    model.save(tmp_path / "ours")
    dualscan.load(tmp_path / "ours").save(tmp_path / "back", format="source")
    assert dualscan.load(tmp_path / "back").config.norm_groups == 1
    with pytest.raises(ValueError, match="norm_groups=1 is for transformers' mamba2"):
        dualscan.load(tmp_path / "ours", norm_groups=1)


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("no_cache")
def test_no_network() -> None:
    """The tests run with HF_HUB_OFFLINE=1, which is how the hub's client says that there is no network."""
    refused("state-spaces/mamba2-130m", "state-spaces/mamba2-130m", "hub cannot be reached", error=OSError)


def test_a_repository_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    theirs = saved(MAMBA2, tmp_path / "snapshot")
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = dualscan.load("someone/something", revision="v1")
    assert torch.equal(model.embedding.weight, theirs.state_dict()["backbone.embeddings.weight"])
    assert (asked["name"], asked["revision"]) == ("someone/something", "v1")
    assert {"*.safetensors", "*.json"} <= set(asked["allow_patterns"])
    assert load_config("someone/something") == model.config
    assert not any("safetensors" in what or "bin" in what for what in asked["allow_patterns"])


@pytest.mark.parametrize("pickled", [False, True])
def test_one_format_of_a_repository_is_fetched(pickled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles only where there are no safetensors; both would be twice the size."""
    import huggingface_hub

    theirs, cache = saved(MAMBA2, tmp_path / "repository"), tmp_path / "cache"
    torch.save(theirs.state_dict(), tmp_path / "repository" / "pytorch_model.bin")
    if pickled:
        (tmp_path / "repository" / WEIGHTS).unlink()

    def snapshot(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        cache.mkdir(exist_ok=True)
        for path in {path for pattern in allow_patterns for path in (tmp_path / "repository").glob(pattern)}:
            shutil.copyfile(path, cache / path.name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = dualscan.load("someone/something")
    assert torch.equal(model.embedding.weight, theirs.state_dict()["backbone.embeddings.weight"])
    weights = {path.name for path in cache.iterdir()} & {WEIGHTS, "pytorch_model.bin"}
    assert weights == ({"pytorch_model.bin"} if pickled else {WEIGHTS})


def test_no_such_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def snapshot(name: str, **options: Any) -> str:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    refused("no/such", "no/such is neither a folder here nor a repository", error=FileNotFoundError)


def test_without_the_hub_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("a/b", "pip install 'dualscan[hf]'", error=ImportError)
