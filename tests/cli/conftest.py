"""A trained model of half a second, and the command line as a function."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dualscan.cli import main

TINY = ["tiny", "--model.pattern", "M", "--seqlen", "32", "--batch-size", "2", "--dtype", "fp32", "--device", "cpu"]
TINY += ["--eval-every", "0", "--warmup-steps", "2", "--log-every", "1"]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n} and {n} are {2 * n};\n" for n in range(400)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The folder of a run of six steps."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["train", *TINY, "--data", str(text), "--max-steps", "6", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line: exit code, stdout, stderr."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(str(end.code))
        out, err = capsys.readouterr()
        return code, out, err

    return run_command
