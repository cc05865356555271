"""What the jobs of the block's operators share: passes that should cost what their bytes cost."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.ops.ssd import ceilings, peak

Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor | tuple[Tensor, ...]]


def gradients(run: Run, t: Inputs) -> dict[str, Tensor]:
    """Forward and backward: the results and the gradients by name; integers have none.

    The cotangent of the result is `dy`, or of several results `dy`, `dy1` and so on.
    """
    leaves = {name: v for name, v in t.items() if v.requires_grad}
    results = run(t)
    results = results if isinstance(results, tuple) else (results,)
    named = {"y" if i == 0 else f"y{i}": y for i, y in enumerate(results)}
    grads = torch.autograd.grad(results, list(leaves.values()), [t.get(f"d{name}") for name in named])
    return {name: y.detach() for name, y in named.items()} | {
        f"d{name}": g for name, g in zip(leaves, grads, strict=True)
    }


def errors(runs: Mapping[str, Run], exact: Run, t: Inputs) -> dict[str, dict[str, float]]:
    """Relative RMS error of every result and gradient against `exact` in float64 on the same rounded inputs."""

    def wide(v: Tensor) -> Tensor:
        return v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v

    oracle = gradients(exact, {name: wide(v) for name, v in t.items()})
    return {
        name: {key: ((g.double() - oracle[key]).norm() / oracle[key].norm()).item() for key, g in got.items()}
        for name, got in ((name, gradients(run, t)) for name, run in runs.items())
    }


def passes(
    job: str,
    shape: str,
    runs: Mapping[str, Run],
    t: Inputs,
    floors: Mapping[str, float],
    *,
    error: Mapping[str, dict[str, float]],
    repeats: int,
    graphs: bool = True,
) -> list[dict[str, Any]]:
    """Forward, and forward + backward: a record for each of the runs, also printed.

    Args:
        job: name of the job.
        shape: name of the shape.
        runs: implementation -> forward.
        t: its inputs.
        floors: pass ("fwd", "fwdbwd") -> milliseconds at the ceilings of the machine.
        error: implementation -> errors.
        repeats: turns of each measurement.
        graphs: whether kernels are timed in CUDA graphs; calls of many milliseconds need none.
    """
    import triton

    records = []
    without = {name: v.detach() for name, v in t.items()}
    for pass_, floor in floors.items():
        timed: dict[str, Callable[[], object]] = {
            name: partial(run, without) if pass_ == "fwd" else partial(gradients, run, t) for name, run in runs.items()
        }
        for call in timed.values():
            call()
        memory = {name: peak(call) for name, call in timed.items()}
        call = common.interleaved(timed, repeats=repeats)
        kernel = common.interleaved_graphs(timed, repeats=repeats) if graphs else call
        for name, seconds in kernel.items():
            values = {"call_ms": 1e3 * call[name], "floor_ms": floor, "share": floor / (1e3 * seconds)}
            values |= {"peak_mib": memory[name], "error": error[name], "triton": triton.__version__}
            records.append(common.record(job, shape, pass_, name, kernel_ms=1e3 * seconds, **values))
            line = f"{job} {shape} {pass_} {name}: {1e3 * seconds:.4g} ms, {100 * values['share']:.0f} % of the floor"
            print(f"{line}, call {values['call_ms']:.3g} ms, peak {memory[name]:.0f} MiB", flush=True)
    return records


def main(
    job: str,
    measure: Callable[[str, int, tuple[float, float]], list[dict[str, Any]]],
    shapes: Sequence[str],
    argv: Sequence[str] | None,
) -> int:
    """The command line of a job: measures every shape; with --save writes `results/<job>-<device>.json`."""
    parser = argparse.ArgumentParser(prog=f"dualscan bench {job}")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each measurement")
    parser.add_argument("--save", action="store_true", help="write the result file that README and docs are made from")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"the job {job} needs an NVIDIA GPU")
        return 1
    torch.manual_seed(0)
    ceiling = ceilings()
    print(f"copy {ceiling[0] / 1e12:.2f} TB/s, bfloat16 product {ceiling[1] / 1e12:.0f} TFLOP/s")
    records = []
    for shape in shapes:
        records += measure(shape, args.repeats, ceiling)
        torch.cuda.empty_cache()
    if args.save:
        common.write(job, common.short_device_name("cuda"), records)
    return 0
