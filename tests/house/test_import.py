"""`import dualscan` is light, its names load no optional package, and operators and models are single-device code."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.house.tree import PACKAGE, ROOT, python_files

HEAVY = {"datasets", "matplotlib", "transformers", "triton"}
MAX_SECONDS = 0.3

PROBE = """
import json, sys, time
import {baseline}
before, start = set(sys.modules), time.process_time()
{statements}
seconds = time.process_time() - start
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps({{"seconds": seconds, "loaded": sorted(loaded)}}))
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def probe(statements: str, *, baseline: str = "torch") -> dict[str, Any]:
    """What the statements load and the CPU seconds they take, beyond the baseline's import."""
    return json.loads(run(PROBE.format(baseline=baseline, statements=statements)))


def test_import_is_light():
    # CPU time and the best of three: a busy machine makes an import slower, never faster.
    reports = [probe("import dualscan") for _ in range(3)]
    assert HEAVY.isdisjoint(reports[0]["loaded"])
    assert min(report["seconds"] for report in reports) < MAX_SECONDS


def test_no_public_name_loads_an_optional_package():
    # torch's own FLOP counter, for which operators register formulas, imports triton where there is one.
    names = "import dualscan\nfor name in dualscan.__all__: getattr(dualscan, name)"
    loaded = probe(names, baseline="torch.utils.flop_counter")["loaded"]
    assert "dualscan" in loaded
    assert HEAVY.isdisjoint(loaded)


def test_operators_work_with_triton_blocked():
    out = run("""
import sys
sys.modules["triton"] = None
import torch, dualscan
one = torch.ones(1, 3, 1, 1)
y = dualscan.ssd(one, torch.ones(1, 3, 1), -torch.ones(1) * torch.log(torch.tensor(2.0)), one, one).y
print(y.flatten().tolist())
""")
    assert json.loads(out) == pytest.approx([1.0, 1.5, 1.75])


def imported(path: Path) -> set[str]:
    """Every module that a file imports or reaches as an attribute of torch, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            names.add(f"torch.{node.attr}")
    return names


def test_operators_and_models_know_nothing_of_other_devices():
    # An operator's sharding rule, in its library.py, is the one exception.
    lower = python_files("dualscan/ops", "dualscan/nn", "dualscan/models")
    checked = [path for path in lower if path.name != "library.py"]
    users = [path for path in checked if any(name.startswith("torch.distributed") for name in imported(path))]
    assert checked
    assert users == []


def test_triton_is_imported_only_inside_functions():
    for path in python_files("dualscan"):
        if path.name.startswith("triton_"):  # a kernel file is itself imported inside the launcher
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", None) for node in top}
        assert not any(str(name).partition(".")[0] == "triton" for name in names), path.relative_to(PACKAGE)
