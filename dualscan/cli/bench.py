"""`dualscan bench`: runs the benchmarks of a checkout; the installed package does not carry them."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import dualscan


def main(argv: Sequence[str]) -> int:
    """Lists the jobs, or runs one with the remaining arguments; returns the exit code.

    Raises:
        ValueError: there is no checkout, or no such job.
    """
    root = checkout()
    jobs = find_jobs(root)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: dualscan bench JOB [OPTIONS]\n\njobs:")
        print("\n".join(f"  {job}" for job in jobs))
        return 0
    job, *rest = argv
    if job not in jobs:
        close = difflib.get_close_matches(job, jobs, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown benchmark {job!r}; the jobs are {', '.join(jobs) or 'none'}.{hint}")
    sys.path.insert(0, str(root))
    return import_module(jobs[job]).main(rest) or 0


def checkout() -> Path:
    """The folder that holds `benchmarks/`: where the package was imported from, or the working directory.

    Raises:
        ValueError: neither does.
    """
    beside = Path(dualscan.__file__).resolve().parent.parent
    for root in (beside, Path.cwd()):
        if (root / "benchmarks").is_dir():
            return root
    raise ValueError(
        f"no benchmarks folder in {beside} or {Path.cwd()}: the installed package does not carry the benchmarks; "
        f"run this in a checkout of the project."
    )


def find_jobs(root: Path) -> dict[str, str]:
    """Jobs and their modules: files one folder below `benchmarks/` that define `main(argv)`, read but not imported."""
    return {
        path.stem: f"benchmarks.{path.parent.name}.{path.stem}"
        for path in sorted((root / "benchmarks").glob("*/*.py"))
        if "\ndef main(" in path.read_text(encoding="utf-8")
    }
