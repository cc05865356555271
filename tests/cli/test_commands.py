"""Commands end to end on a tiny model."""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dualscan
from dualscan.cli import COMMANDS
from dualscan.train import checkpoint
from dualscan.train.metrics import FILE, read
from tests.cli.conftest import TINY


def test_help_lists_the_commands_without_loading_pytorch():
    code = "import sys; from dualscan.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(command, name, monkeypatch):
    monkeypatch.setattr("dualscan.cli.bench.checkout", lambda: Path(__file__).parent)
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"usage: dualscan {name}" in out


def test_train_help_shows_presets_and_their_values(command):
    _, out, _ = command("train", "small", "--help")
    assert "mamba2_130m" in out
    assert "--model.d-model" in out
    assert "384" in out


def test_train_writes_a_run_and_says_how_to_go_on(command, run, text, tmp_path):
    config = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (config["model"]["pattern"], config["max_steps"], config["data"]) == ("M", 6, text.as_posix())
    code, _, err = command("train", *TINY, "--data", text, "--max-steps", 3, "--out", tmp_path / "r")
    assert code == 0
    assert "done: step 3" in err
    assert f"dualscan generate {tmp_path / 'r'}" in err


def test_resume_takes_new_limits(command, text, tmp_path):
    out = tmp_path / "r"
    command("train", *TINY, "--data", text, "--max-steps", 3, "--out", out)
    code, _, err = command("train", "--resume", out, "--max-steps", 5)
    assert code == 0
    assert "from step 3" in err
    assert checkpoint.find(out).name == "step-000005"
    code, _, err = command("train", f"--resume={out}", "--max-steps=6")
    assert code == 0
    assert checkpoint.find(out).name == "step-000006"


def test_a_moved_run_resumes_where_it_is(command, text, tmp_path):
    command("train", *TINY, "--data", text, "--max-steps", 3, "--out", tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert command("train", "--resume", tmp_path / "there", "--max-steps", 4)[0] == 0
    assert not (tmp_path / "here").exists()
    assert checkpoint.find(tmp_path / "there").name == "step-000004"


def test_the_vocabulary_follows_the_tokenizer(command, text, tmp_path):
    out = tmp_path / "r"
    code, _, _ = command(
        "train", "mamba2_130m", *TINY[1:], "--model.d-model", 32, "--model.headdim", 16, "--data", text,
        "--max-steps", 1, "--out", out,
    )  # fmt: skip
    assert code == 0
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["model"]["vocab_size"] == 257


def test_generate_streams_the_same_text_for_a_seed(command, run):
    options = ("--prompt", "7 and ", "--max-tokens", 30, "--seed", 5)
    code, first, _ = command("generate", run, *options)
    assert code == 0
    assert first.startswith("7 and ")
    assert command("generate", run, *options)[1] == first
    assert command("generate", checkpoint.find(run), *options)[1] == first
    assert command("generate", run, *options[:-1], 6)[1] != first
    assert command("generate", run, *options, "--state-dtype", "fp32")[1] == first
    assert command("generate", run, *options, "--state-dtype", "bf16")[0] == 0


def test_generate_stops_at_a_string(command, run):
    options = ("generate", run, "--prompt", "7", "--max-tokens", 60, "--temperature", 0)
    _, whole, _ = command(*options)
    stop = whole[10:12]
    _, cut, _ = command(*options, "--stop", stop, "never this")
    assert cut == whole[: whole.index(stop, 1)] + "\n"


def test_eval_agrees_with_training(command, run, text, tmp_path):
    """The held-out tail of the text, as training scored it at the end."""
    (final,) = [r["validation_bpb"] for r in read(run / FILE) if "validation_bpb" in r]
    from dualscan.data.corpus import prepare
    from dualscan.data.tokenizer import ByteTokenizer

    held_out = prepare(text, ByteTokenizer()).validation
    tail = tmp_path / "tail.txt"
    tail.write_bytes(bytes(held_out.read(0, len(held_out) - 1).tolist()))
    code, out, _ = command("eval", run, tail, "--seqlen", 32, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["bits_per_byte"] == pytest.approx(final, rel=1e-5)
    assert result["perplexity"] == pytest.approx(2 ** (final * result["bytes"] / result["tokens"]), rel=1e-5)
    code, out, _ = command("eval", run, tail, "--seqlen", 32)
    assert f"{final:.4f} bits per byte" in out
    assert "perplexity per token" in out


def test_env_names_every_operator(command):
    code, out, _ = command("env", "--json")
    assert code == 0
    report = json.loads(out)
    taken = {(row["operator"], row["device"]): row["takes"] for row in report["operators"]}
    assert taken["ssd", "cpu"] == "numba"
    assert {"causal_conv1d", "rms_norm", "gated_rms_norm", "ssd_step"} <= {name for name, _ in taken}
    for row in report["operators"]:
        takes_impl = "impl" in inspect.signature(getattr(dualscan, row["operator"])).parameters
        assert bool(row["impl"]) == takes_impl, row["operator"]
    assert report["versions"]["torch"]
    _, shown, _ = command("env")
    assert all(name in shown for name, _ in taken)
    assert max(map(len, shown.splitlines())) < 200


def test_bench_finds_and_runs_jobs(command, tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks" / "ops"
    folder.mkdir(parents=True)
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "job.py").write_text('"""A job."""\n\ndef main(argv):\n    print("ran", argv)\n', encoding="utf-8")
    (folder / "shared.py").write_text("def helper(argv):\n    pass\n", encoding="utf-8")
    monkeypatch.setattr("dualscan.cli.bench.checkout", lambda: tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, out, _ = command("bench")
    assert code == 0
    assert out.splitlines()[-1].strip() == "job"
    assert "shared" not in out
    code, out, _ = command("bench", "job", "--x", 3)
    assert (code, out) == (0, "ran ['--x', '3']\n")
    code, _, err = command("bench", "jobb")
    assert code == 2
    assert "unknown benchmark 'jobb'; the jobs are job. Did you mean 'job'?" in err
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)


def test_bench_outside_a_checkout_says_so(command, tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "dualscan" / "__init__.py"
    monkeypatch.setattr("dualscan.__file__", str(package))
    monkeypatch.chdir(tmp_path)
    code, _, err = command("bench")
    assert code == 2
    assert "does not carry the benchmarks; run this in a checkout" in err


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_saves_and_says_how_to_resume(text, tmp_path, number, code):
    out = tmp_path / "r"
    arguments = ["train", *TINY, "--data", str(text), "--max-steps", "100000", "--out", str(out)]
    start = f"import sys; from dualscan.cli import main; sys.exit(main({arguments!r}))"
    process = subprocess.Popen([sys.executable, "-c", start], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (out / FILE).exists() or len(read(out / FILE)) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert f"dualscan train --resume {out}" in err
    assert "Traceback" not in err
    saved = checkpoint.load(checkpoint.find(out)).values["step"]
    assert saved == read(out / FILE)[-1]["step"]
    assert math.isfinite(read(out / FILE)[-1]["loss"])
