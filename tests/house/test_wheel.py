"""The wheel is pure Python, complete, and trains where there is no checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.house.tree import PACKAGE, ROOT

TRAIN = """
import json, sys
import torch
import dualscan
from torch.nn.functional import cross_entropy

torch.manual_seed(0)
model = dualscan.MambaLM(dualscan.preset("tiny"))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
tokens = torch.randint(256, (2, 33))
losses = []
for _ in range(3):
    optimizer.zero_grad()
    loss = cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(json.dumps({"file": dualscan.__file__, "path": sys.path, "losses": losses}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    # The environment names no other place to import from.
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation nothing is fetched: hatchling is one of the development tools.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def test_wheel_is_pure_python(wheel, contents):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in contents if name.endswith((".so", ".pyd", ".dll", ".dylib", ".c", ".cpp", ".cu"))]


def test_wheel_holds_the_package_and_nothing_else(contents):
    written = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted = {path.relative_to(ROOT).as_posix() for path in written}
    assert {name for name in contents if ".dist-info/" not in name} == wanted
    assert "dualscan/py.typed" in wanted


def test_wheel_carries_text_to_train_on(contents):
    texts = [size for name, size in contents.items() if name.startswith("dualscan/data/") and not name.endswith(".py")]
    assert sum(texts) > 300_000


def test_wheel_carries_the_licence(contents):
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in contents)


@pytest.mark.slow
def test_training_step_from_the_installed_wheel(wheel, tmp_path):
    """Trains in an environment of its own, outside the checkout.

    Isolated: dualscan itself, installed from the wheel, with an interpreter (`-I`) that looks neither at the working
    directory nor at the user's packages. Shared: the packages that it depends on, through a path file. Python does not
    read the path files of a folder that it got from a path file, so an editable checkout there stays out of sight.
    """
    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run(python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # pip installs before the path file exists, so that it does not see what the shared packages hold.
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "shared.pth").write_text("\n".join(sorted(shared)), encoding="utf-8")

    report = json.loads(run(python, "-I", "-W", "error", "-c", TRAIN, cwd=tmp_path))
    assert Path(report["file"]).is_relative_to(site)
    assert str(ROOT) not in report["path"]
    assert report["losses"][2] < report["losses"][0]
