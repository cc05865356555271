"""Files and folders stay small enough to read in one sitting."""

from collections import Counter
from pathlib import Path
from statistics import median

from tests.house.tree import ROOT, python_files

MAX_LINES = 500
MAX_KERNEL_LINES = 600
MAX_FILES = 10
MAX_MEDIAN = 220


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_too_long():
    limits = {path: MAX_KERNEL_LINES if path.name.startswith("triton_") else MAX_LINES for path in python_files()}
    assert limits
    assert {str(p.relative_to(ROOT)): lines(p) for p, limit in limits.items() if lines(p) > limit} == {}


def test_no_folder_holds_too_many_files():
    files = Counter(str(path.parent.relative_to(ROOT)) for path in python_files())
    assert {folder: count for folder, count in files.items() if count > MAX_FILES} == {}


def test_the_median_file_is_short():
    assert median(map(lines, python_files("dualscan"))) <= MAX_MEDIAN
