"""The documentation points at things that exist: links, decisions, and the map in docs/architecture.md."""

import re
import tomllib
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from tests.house.tree import PACKAGE, ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Pages for users, whose Python runs as it stands.
USER_PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "tutorials").rglob("*.md"))]
USER_PAGES += [ROOT / "docs" / "explanations" / "duality.md", *sorted((ROOT / "docs" / "how-to").rglob("*.md"))]
PROGRAMS = [page for page in USER_PAGES if "```python\n" in page.read_text(encoding="utf-8")]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
STATUS = "proposed|accepted|rejected|superseded by [0-9]{3}"


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL))


def made_from_docstrings(path: Path) -> bool:
    return path.parent == ROOT / "docs" / "reference" and (PACKAGE / path.stem).is_dir()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_dead_relative_link(page):
    text = without_code(page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    relative = [target for target in targets if not re.match(r"[a-z]+:|#", target)]
    paths = [page.parent / target.partition("#")[0] for target in relative]
    assert [path for path in paths if not path.exists() and not made_from_docstrings(path.resolve())] == []


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """The blocks of a page are one program, in order; an `assert` in it is a test."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    dtype = torch.get_default_dtype()
    try:
        exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": page.stem})
    finally:
        torch.set_default_dtype(dtype)


def test_decisions_are_numbered_without_gaps():
    assert [path.name[:3] for path in DECISIONS] == [f"{number:03}" for number in range(1, len(DECISIONS) + 1)]


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda decision: decision.stem)
def test_decision_has_title_date_and_status(decision):
    text = decision.read_text(encoding="utf-8")
    assert re.fullmatch(r"[0-9]{3}(-[a-z0-9]+)+\.md", decision.name)
    assert text.startswith(f"# {decision.name[:3]}: ")
    assert re.search(rf"^Date: 20\d\d-\d\d-\d\d\. Status: ({STATUS})\.$", text, flags=re.MULTILINE)


def code_block(heading: str) -> list[str]:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    match = re.search(rf"^## {heading}.*?^```\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert match, f"docs/architecture.md draws no {heading.lower()}"
    return match[1].splitlines()


def test_layers_of_the_page_are_the_layers_that_are_checked():
    drawn = [re.findall(r"\w+", re.split(r"  +\(", line)[0]) for line in code_block("Layers")]
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = next(c for c in config["tool"]["importlinter"]["contracts"] if c["type"] == "layers")["layers"]
    assert [re.findall(r"\w+", layer) for layer in layers] == drawn


NAME = re.compile(r"\(?[\w*]+(/|\.py)\)?")


def drawn_tree() -> dict[str, bool]:
    """What the page draws below `dualscan/`, folders with a closing slash, and for each whether it is planned.

    A line is indented below its folder and begins with one or more names. A folder's line may go on to name the `.py`
    files in it. A name in parentheses of its own is planned, and so is all that a planned folder names.
    """
    planned: dict[str, bool] = {}
    open_folders: list[tuple[int, str]] = []
    lines = code_block("Tree")
    end = next(i for i, line in enumerate(lines) if i and not line.startswith(" "))
    for line in lines[1:end]:
        indent = len(line) - len(line.lstrip())
        while open_folders and open_folders[-1][0] >= indent:
            open_folders.pop()
        above = open_folders[-1][1] if open_folders else ""
        first, *others = line.split()
        assert NAME.fullmatch(first), line
        folder = above + first.strip("()")
        planned[folder] = first.startswith("(")
        if folder.endswith("/"):
            open_folders.append((indent, folder))
            for name in takewhile(re.compile(r"\(?\w+/\)?").fullmatch, others):
                planned[above + name.strip("()")] = name.startswith("(")
            for name in others:
                if NAME.fullmatch(name) and ".py" in name:
                    planned[folder + name.strip("()")] = planned[folder] or name.startswith("(")
    return planned


def exists(pattern: str) -> bool:
    return any(path.is_dir() == pattern.endswith("/") for path in PACKAGE.glob(pattern.rstrip("/")))


def test_tree_of_the_page_is_the_tree_on_disk():
    planned = drawn_tree()
    assert planned
    absent = {name for name, later in planned.items() if not later and not exists(name)}
    present = {name for name, later in planned.items() if later and exists(name)}
    assert absent == set(), "absent: write it, or put it in parentheses as planned"
    assert present == set(), "exists by now: take it out of the parentheses"


def drawn(path: Path, there: list[str]) -> bool:
    name = path.relative_to(PACKAGE).as_posix()
    if path.is_dir():
        return f"{name}/" in there
    folder = name.rpartition("/")[0]
    beside = [entry for entry in there if entry.endswith(".py") and entry.rpartition("/")[0] == folder]
    # A folder for which the page names no file is described by its anatomy instead.
    return not beside or any(fnmatch(name, entry) for entry in beside)


def test_everything_on_disk_is_in_the_tree_of_the_page():
    there = [name for name, later in drawn_tree().items() if not later]
    files = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py"]
    public = {path for path in files if not path.name.startswith("_")} | {path.parent for path in files} - {PACKAGE}
    assert sorted(path.relative_to(PACKAGE).as_posix() for path in public if not drawn(path, there)) == []
