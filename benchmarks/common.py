"""Measuring and recording, shared by every job."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(candidates: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of every candidate, measured in turns so that a slow spell of the machine hits all alike.

    Args:
        candidates: name -> what is timed, already holding its inputs.
        repeats: turns.
        warmup: untimed calls of each candidate before the first turn.

    Returns:
        Name -> median seconds.
    """
    for run in candidates.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def interleaved_graphs(
    candidates: Mapping[str, Callable[[], object]], *, repeats: int, calls: int = 4
) -> dict[str, float]:
    """Median seconds of a call's kernels, without the host: CUDA graphs of `calls` calls, replayed in turns.

    Args:
        candidates: name -> what is timed; already called once, so that everything is compiled.
        repeats: turns.
        calls: calls in a graph, so that the replay's own cost is small.

    Returns:
        Name -> median seconds of one call.
    """
    graphs = {}
    stream = torch.cuda.Stream()
    for name, run in candidates.items():
        # The caching allocator and the libraries want a call on the capturing stream first.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], stream=stream):
            for _ in range(calls):
                run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end) / 1e3 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name(device: str = "cpu") -> str:
    """A name for the record: the GPU's, or the processor's instruction set and thread count."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"


def short_device_name(device: str = "cpu") -> str:
    """The device in the name of a result file, such as "h200"."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name().lower().replace("nvidia ", "").split()[0]


def record(job: str, shape: str, pass_: str, impl: str, **values: Any) -> dict[str, Any]:
    """One flat record; the keys are described in docs/architecture.md."""
    return {
        "job": job,
        "shape": shape,
        "pass": pass_,
        "impl": impl,
        **values,
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "torch": torch.__version__.split("+")[0],
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """The checkout's commit, with a plus sign where the tree differs from it; 'unknown' outside a checkout."""
    here = Path(__file__).parent
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "../dualscan"], cwd=here, check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if dirty.returncode else "")


def write(job: str, device: str, records: Sequence[Mapping[str, Any]]) -> Path:
    """Writes `results/<job>-<device>.json`, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{job}-{device}.json"
    temporary = path.with_suffix(".tmp")
    lines = ",\n".join("  " + json.dumps(entry) for entry in records)
    temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def peak_memory_mib(module: str, arguments: Sequence[str]) -> float:
    """Peak resident memory of `python -m module arguments` run by itself, in MiB (POSIX only).

    The process prints its own high-water mark as its last line.
    """
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return float(run.stdout.strip().splitlines()[-1])


def own_peak_mib() -> float:
    """The high-water mark of this process's resident memory, in MiB (POSIX only)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage on Linux starts from the parent's mark
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def table(records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Records as aligned text."""
    rows = [list(columns)] + [[_cell(entry.get(name, "")) for name in columns] for entry in records]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
