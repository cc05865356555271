"""Checkpoints of other programs on the command line: generate from them, convert them there and back."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualscan
from dualscan.interop import register_with_transformers
from tests.models.families.cases import CASES, VOCABULARY, saved

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder as transformers writes it, with a tokenizer of letters that opens a text with <s>."""
    folder = tmp_path / "theirs"
    saved(next(case for case in CASES if case.family == "mamba2"), folder)
    letters = [*pre_tokenizers.ByteLevel.alphabet()]
    vocabulary = {token: i for i, token in enumerate(["</s>", "<s>", *sorted(letters, key=ord)[: VOCABULARY - 2]])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("named", [False, True])
def test_generate_from_a_folder_of_transformers(command: Command, theirs: Path, named: bool) -> None:
    options = ("--prompt", "AB", "--max-tokens", 7, "--temperature", 0)
    code, out, _ = command("generate", *(("--model", theirs) if named else (theirs,)), *options)
    assert code == 0
    # As the model alone would go on after <s> and the prompt.
    model = dualscan.load(theirs)
    tokenizer = Tokenizer.from_file(str(theirs / "tokenizer.json"))
    ids = tokenizer.encode("AB").ids
    assert ids[0] == 1
    made = model.generate(torch.tensor([ids]), max_tokens=7, temperature=0.0, stop_ids=(0,))
    assert out == "AB" + tokenizer.decode(made.tokens[0, : made.lengths[0]].tolist()) + "\n"


def test_a_converted_model_writes_as_before(command: Command, theirs: Path, tmp_path: Path) -> None:
    """Its texts begin as its own program's do."""
    options = ("--prompt", "AB", "--max-tokens", 7, "--temperature", 0)
    assert command("convert", theirs, tmp_path / "ours")[0] == 0
    assert command("generate", tmp_path / "ours", *options)[1] == command("generate", theirs, *options)[1]


def test_folders_of_our_models_in_transformers(command: Command, run: Path, tmp_path: Path) -> None:
    """A model trained here, stored by transformers, writes what it wrote, and comes back the same."""
    options = ("--prompt", "1 and", "--max-tokens", 9, "--temperature", 0)
    written = command("generate", run, *options)[1]
    code, _, err = command("convert", run, tmp_path / "theirs", "--to", "dualscan_hf")
    assert code == 0
    assert "dualscan to dualscan_hf" in err
    assert command("generate", tmp_path / "theirs", *options)[1] == written
    code, _, err = command("convert", tmp_path / "theirs", tmp_path / "ours")
    assert code == 0
    assert "dualscan_hf to dualscan" in err
    assert command("generate", tmp_path / "ours", *options)[1] == written


def test_generate_from_a_revision_of_a_repository(
    command: Command, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def snapshot(name: str, *, revision: str | None, **options: Any) -> str:
        asked.append((name, revision))
        return str(theirs)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    options = ("--prompt", "AB", "--max-tokens", 3, "--temperature", 0)
    code, out, _ = command("generate", "--model", "someone/something", "--revision", "v1", *options)
    assert (code, out) == (0, command("generate", theirs, *options)[1])
    assert asked == [("someone/something", "v1")]


def test_generate_wants_one_model(command: Command, theirs: Path) -> None:
    for arguments in ((), (theirs, "--model", theirs)):
        code, _, err = command("generate", *arguments)
        assert code == 2
        assert err.splitlines()[-1].startswith("error: give a folder, or --model")


def test_a_checkpoint_without_a_tokenizer(command: Command, theirs: Path, tmp_path: Path) -> None:
    (theirs / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (theirs / "tokenizer_config.json").rename(tmp_path / "tokenizer_config.json")
    code, _, err = command("generate", theirs)
    assert code == 2
    assert "--tokenizer" in err.splitlines()[-1]
    options = ("--max-tokens", 3, "--tokenizer", tmp_path / "tokenizer.json")
    assert command("generate", theirs, *options)[0] == 0


def test_other_commands_read_shards_of_transformers(command: Command, theirs: Path, tmp_path: Path) -> None:
    index = {"weight_map": dict.fromkeys(load_file(theirs / "model.safetensors"), "model-1.safetensors")}
    (tmp_path / "text.txt").write_text("ABBA " * 9, encoding="utf-8")
    whole = command("eval", theirs, tmp_path / "text.txt", "--json")[1]
    (theirs / "model.safetensors").rename(theirs / "model-1.safetensors")
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    code, shards, _ = command("eval", theirs, tmp_path / "text.txt", "--json")
    assert (code, shards) == (0, whole)
    code, _, _ = command("inspect", theirs, "--text", "AB", "--out", tmp_path / "page.html")
    assert (code, (tmp_path / "page.html").is_file()) == (0, True)


def test_convert_there_and_back(command: Command, theirs: Path, tmp_path: Path) -> None:
    code, _, err = command("convert", theirs, tmp_path / "ours")
    assert code == 0
    assert "mamba2 to dualscan" in err
    code, _, err = command("convert", tmp_path / "ours", tmp_path / "back")
    assert code == 0
    assert "dualscan to mamba2" in err
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (theirs / name).read_bytes()


def test_convert_a_run(command: Command, run: Path, tmp_path: Path) -> None:
    code, _, err = command("convert", run, tmp_path / "out")
    assert code == 2
    fitting = "say --to what: mamba_ssm, mamba2, nemotron_h, dualscan_hf can express it"
    assert fitting in err.splitlines()[-1]
    assert command("convert", run, tmp_path / "out", "--to", "mamba_ssm", "--dtype", "bf16")[0] == 0
    model = dualscan.load(tmp_path / "out")
    assert model.source is not None
    assert model.source.family == "mamba_ssm"
    assert model.embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("to", ["mamba2", "dualscan_hf"])
def test_transformers_writes_as_the_run(command: Command, run: Path, tmp_path: Path, to: str) -> None:
    """With the tokenizer beside it, and knowing where a text ends: nothing more to say to transformers."""
    written = command("generate", run, "--prompt", "1 and", "--max-tokens", 9, "--temperature", 0)[1]
    assert command("convert", run, tmp_path / "there", "--to", to)[0] == 0
    register_with_transformers()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "there")
    special = (model.generation_config.eos_token_id, model.generation_config.pad_token_id, tokenizer.eos_token_id)
    assert special == (256, 256, 256)
    # Here a text begins with the end of the document before it.
    ids = torch.tensor([[256, *tokenizer("1 and").input_ids]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)[0, 1:]
    assert tokenizer.decode(made, skip_special_tokens=True) + "\n" == written
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]


def test_convert_without_transformers(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights need no other program; the tokenizer stays ours, and that is said."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = command("convert", run, tmp_path / "there", "--to", "mamba2")
    assert code == 0
    assert 'pip install "dualscan[hf]"' in err
    assert {path.name for path in (tmp_path / "there").iterdir()} == {
        *("config.json", "model.safetensors", "byte_tokenizer.json")
    }


def test_convert_refuses(command: Command, theirs: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((theirs, theirs), "holds a checkpoint already"),
        ((theirs, tmp_path / "out", "--to", "gguf"), "unknown family 'gguf'"),
        ((theirs, tmp_path / "out", "--to", "bamba"), "pattern='MMM' would become 'M-M-M-'"),
        (("no/where", tmp_path / "out"), "no/where is no folder here"),
    ):
        code, _, err = command("convert", *arguments)
        assert code == 2
        assert words in err.splitlines()[-1]
        assert not (tmp_path / "out").exists()
