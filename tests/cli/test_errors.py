"""Wrong input gives one line that helps, and the right exit code."""

import errno

import pytest

from dualscan.cli import main, one_line
from dualscan.train import checkpoint, step
from tests.cli.conftest import TINY


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["train", "mamba2_120m"], "unknown preset 'mamba2_120m'"),
        (["train", "mamba2_120m"], "Did you mean 'mamba2_130m'?"),
        (["train", "tiny", "--lr", "-1"], "lr=-1.0 must be positive"),
        (["train", "tiny", "--model.headdim", "5"], "headdim=5 does not divide d_inner=64"),
        (["train", "tiny", "--model.pattern", "MXM"], "unknown layer 'X'"),
        (["train", "tiny", "--data", "absent.txt"], "absent.txt does not exist"),
        (["train", "tiny", "--device", "gpu"], "device='gpu' cannot be used"),
        (["train", "--resume", "absent"], "absent cannot be resumed: it has no run.json"),
        (["train", "tiny", "--resume", "absent"], "leave the preset out"),
        (["generate", "absent"], "absent is not a folder"),
        (["eval", "absent", "absent.txt"], "absent is not a folder"),
    ],
)
def test_one_line_and_exit_code_2(command, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["train", "tiny", "--max-step", "3"], ["generate"], ["env", "--jsn"]])
def test_unknown_and_missing_options_are_explained(command, arguments):
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert "ptions" in err or "rguments" in err


def test_no_command_shows_the_usage(command):
    code, out, _ = command()
    assert code == 2
    assert "usage: dualscan COMMAND" in out


def test_an_empty_text_is_named(command, tmp_path):
    (tmp_path / "empty.txt").touch()
    code, _, err = command("train", *TINY, "--data", tmp_path / "empty.txt", "--out", tmp_path / "r")
    assert code == 2
    assert "empty.txt is empty" in err


def test_bad_sampling_is_named(command, run):
    code, _, err = command("generate", run, "--top-p", 7)
    assert (code, err) == (2, "error: top_p=7.0 must lie in (0, 1]; leave it out to keep all tokens.\n")


@pytest.mark.parametrize("name", ["model.safetensors", "train.safetensors"])
def test_a_truncated_checkpoint_is_named(command, text, tmp_path, name):
    out = tmp_path / "r"
    command("train", *TINY, "--data", text, "--max-steps", 2, "--out", out)
    path = checkpoint.find(out) / name
    path.write_bytes(path.read_bytes()[:200])
    code, _, err = command("train", "--resume", out, "--max-steps", 4)
    assert code == 2
    assert "truncated" in err
    assert err.count("\n") == 1
    if name == "model.safetensors":
        code, _, err = command("generate", out)
        assert code == 2
        assert "truncated" in err


def test_a_full_disk_is_a_failed_run(command, text, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, _, err = command("train", *TINY, "--data", text, "--max-steps", 2, "--out", tmp_path / "r")
    assert code == 1
    assert err.splitlines()[-1].startswith("error: cannot save step 2: no space left on the disk")
    assert "Traceback" not in err


def test_divergence_is_a_failed_run(command, text, tmp_path, monkeypatch):
    real = step.total_nll
    monkeypatch.setattr(step, "total_nll", lambda *arguments: real(*arguments) * float("inf"))
    code, _, err = command("train", *TINY, "--data", text, "--max-steps", 2, "--out", tmp_path / "r")
    assert code == 1
    assert "error: step 1 gives loss inf" in err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="unknown preset"):
        main(["train", "nothing_like_it", "--debug"])


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise KeyError("ours")

    monkeypatch.setattr("dualscan.cli.env.main", broken)
    with pytest.raises(KeyError):
        main(["env"])


def test_ctrl_c_outside_training(command, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("dualscan.cli.env.main", interrupted)
    assert command("env") == (130, "", "interrupted\n")


def test_system_errors_name_the_file():
    assert one_line(FileNotFoundError(2, "No such file or directory", "a.txt")) == "a.txt: No such file or directory"
    assert one_line(ValueError("two\n  lines")) == "two lines"
