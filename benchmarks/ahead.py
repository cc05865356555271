"""Compiles the kernels of a job before it measures: side by side in several processes, without launching one.

Triton keeps on disk what it compiled. Most of it belongs to rivals that tune themselves: the training step of a Mamba-2
model of `mamba_ssm` has some 130 candidates, minutes of compilation one after the other. None is left out. The process
that measures still times all of them, and finds them compiled.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
MOST_PROCESSES = 16


def start(function: Callable[..., object], calls: Iterable[tuple[Any, ...]]) -> list[subprocess.Popen[bytes]]:
    """Starts to compile what `function` launches.

    Args:
        function: of a module.
        calls: the arguments of each of its calls, plain values.

    Returns:
        Processes for `wait`; each goes through all the calls.
    """
    count = min(MOST_PROCESSES, os.cpu_count() or 1)
    code = f"from benchmarks import ahead; from {function.__module__} import {function.__name__} as function; "
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", f"{code}ahead.take_share(function, {list(calls)!r}, {i}, {count})"],
            cwd=ROOT,
            stderr=None if i == 0 else subprocess.DEVNULL,
        )
        for i in range(count)
    ]


def wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits until all has been compiled."""
    failed = sum(process.wait() != 0 for process in processes)
    if failed:
        print(f"{failed} of {len(processes)} processes failed to compile their share ahead", flush=True)


def take_share(function: Callable[..., object], calls: Iterable[tuple[Any, ...]], index: int, count: int) -> None:
    """Compiles every `count`-th kernel of the calls, starting with number `index`, and launches none.

    From then on no kernel is launched in this process: tensors that kernels should fill hold anything.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    compiled = JITFunction.run
    mine, starters = Turns(index, count), Turns(0, 1)

    def compile_only(kernel: Any, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
        given = (kernel.fn.__qualname__, *map(kind, args))
        first = starters.take(given)
        if not mine.take((*given, *((name, kind(value)) for name, value in sorted(options.items())))):
            return
        try:
            binary = compiled(kernel, *args, grid=grid, warmup=True, **options)
            if first:  # compiles in C what starts the kernel, and all its candidates; in a rehearsal that is done
                getattr(binary, "run", None)
        except Exception as problem:  # a candidate that a GPU cannot run is none for its tuner either
            reason = (str(problem).splitlines() or [type(problem).__name__])[0]
            print(f"not compiled: {kernel.fn.__qualname__} {options}: {reason[:100]}", flush=True)

    def all_candidates(kernel: Any, *args: Any, **options: Any) -> None:
        kernel.nargs = dict(zip(kernel.arg_names, args, strict=False))
        for config in kernel.prune_configs(options):
            kernel.fn.run(*args, **options, **config.all_kwargs())
            kernel.best_config = config  # some callers look at it

    JITFunction.run, Autotuner.run = compile_only, all_candidates
    for arguments in calls:
        function(*arguments)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Turns:
    """Deals new things out in the order in which they come; every one of `count` players keeps the same books.

    Args:
        index: the player that takes.
        count: players.
    """

    def __init__(self, index: int, count: int) -> None:
        self._seen: set[Hashable] = set()
        self._index, self._count = index, count

    def take(self, key: Hashable) -> bool:
        """Whether this thing is new and the player's."""
        if key in self._seen:
            return False
        self._seen.add(key)
        return (len(self._seen) - 1) % self._count == self._index


def kind(value: Any) -> Hashable:
    """What a kernel is compiled for of an argument, roughly: a tensor's dtype, a descriptor's block, a plain value."""
    if hasattr(value, "block_shape"):
        return (value.base.dtype, *value.block_shape)
    if hasattr(value, "data_ptr"):
        return value.dtype
    return value if isinstance(value, (int, float, str, type(None))) else repr(value)


def tune_briefly() -> None:
    """Lets kernels that tune themselves time each candidate for 20 ms instead of 100."""
    from triton.runtime import driver
    from triton.testing import do_bench

    driver.active.get_benchmarker = lambda: partial(do_bench, warmup=4, rep=20)
