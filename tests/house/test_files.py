"""Tracked files name no machine, and the pinned versions are the ones that the project asks for."""

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.tree import ROOT, tracked_files

# A folder at the root of somebody's disk. Inside a web address or a relative path, a letter or a dot stands before it.
MACHINE_PATH = re.compile(r"(?<![\w.~-])(?:/(?:home|Users|root|work|opt|mnt|scratch|tmp)/\w|[A-Z]:\\\\?Users)")


def test_no_tracked_file_names_a_path_of_a_machine():
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


def test_pattern_finds_a_path_of_a_machine():
    for path in ("home", "Users", "tmp"):
        assert MACHINE_PATH.search(f"saved to /{path}/someone")
    assert not MACHINE_PATH.search("https://example.org/home/page and docs/work/page and ./tmp/x")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs)
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_requirement_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    requirements = [Requirement(line) for line in asked if not line.startswith((project["name"], "triton"))]
    pinned = pins()
    unmet = [str(r) for r in requirements if not r.specifier.contains(pinned.get(canonicalize_name(r.name), "0"))]
    assert requirements
    assert unmet == []
