"""Every example runs, is short, and prints what its claim says."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_its_differences_are_rounding(path, capsys):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    differences = [float(number) for number in re.findall(r"by ([0-9.]+e[-+][0-9]+)", printed)]
    assert differences
    assert max(differences) < 1e-4


def test_duality_prints_the_rank_of_the_state(capsys):
    runpy.run_path(str(EXAMPLES[0]), run_name="__main__")
    assert "[4], d_state is 4" in capsys.readouterr().out
