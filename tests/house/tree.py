"""What the project consists of: its root, its tracked files and its Python files."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dualscan"

# Folders that hold Python written for this project, as far as they exist.
CODE = ("dualscan", "tests", "benchmarks", "examples", "docs")
# Made by tools, not written; what a tree without git history must not take for its own.
MADE = {".git", ".venv", "__pycache__", "build", "dist", "runs", "site", "node_modules"}


def python_files(*folders: str) -> list[Path]:
    """Every `.py` file below the given folders of the project (below all of `CODE` when none is given)."""
    found = [path for folder in folders or CODE for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if MADE.isdisjoint(path.relative_to(ROOT).parts))


def tracked_files() -> list[Path]:
    """The files under version control; in an unpacked archive, every file that is not made by a tool."""
    listing = None
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        listing = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if listing is not None and listing.returncode == 0:
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        paths = []
        for folder, children, names in os.walk(ROOT):
            children[:] = [name for name in children if name not in MADE and not name.endswith(("_cache", ".egg-info"))]
            paths += [Path(folder, name) for name in names]
    return sorted(path for path in paths if path.is_file())
