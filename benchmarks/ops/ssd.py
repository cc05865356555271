"""Job `ssd`: the SSD operator on a GPU against `mamba_ssm`, `fla` and causal attention of the same width.

Per shape and pass: kernel time (CUDA graphs, in turns in one process), call time, the time that the bytes and the FLOPs
alone would take at the ceilings measured in the same run, peak memory, and the error against float64 beside the
rival's. Rivals are compared where they are installed; mamba_ssm's CUDA extensions are not needed. Ratios are given only
if the operator's tests pass on the device first. `dualscan bench ssd --save`.
"""

import argparse
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ahead, common
from benchmarks.ahead import ROOT
from dualscan.ops.ssd import library, ssd
from dualscan.ops.varlen import sequence_index

JOB = "ssd"
# batch, seqlen, nheads, headdim, ngroups, d_state
SHAPES = {
    "2.7b 8x2048": (8, 2048, 80, 64, 1, 128),
    "2.7b 1x16384": (1, 16384, 80, 64, 1, 128),
    "2.7b 1x131072": (1, 131072, 80, 64, 1, 128),
    "2.7b packed 16384": (1, 16384, 80, 64, 1, 128),
    "130m 16x1024": (16, 1024, 24, 64, 1, 128),
    "130m 1x4096": (1, 4096, 24, 64, 1, 128),
    "H128 G8 4x4096": (4, 4096, 128, 64, 8, 128),
    "H64 N64 8x2048": (8, 2048, 64, 64, 1, 64),
    "H64 N256 8x2048": (8, 2048, 64, 64, 1, 256),
}
DECODE_BATCHES = (1, 16, 128, 512)
# Lengths of packed documents, repeated until the batch is full.
DOCUMENTS = (1731, 64, 517, 3, 902, 1, 2900, 333, 1200, 77)
# This library's backward with less memory.
LESS = "keep_states=False"
# Draws of the inputs that errors are taken over.
DRAWS = 32
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
Inputs = dict[str, Tensor]


def inputs(
    batch: int, seqlen: int, nheads: int, headdim: int, ngroups: int, d_state: int, packed: bool = False, seed: int = 0
) -> Inputs:
    """A layer's inputs: bfloat16, with float32 A, D and dt_bias, as training has them."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    tensors = {
        "x": normal(batch, seqlen, nheads, headdim).bfloat16(),
        "dt": (normal(batch, seqlen, nheads) - 2).bfloat16(),
        "A": -torch.rand(nheads, device="cuda", generator=generator) * 15 - 1,
        "B": normal(batch, seqlen, ngroups, d_state).bfloat16(),
        "C": normal(batch, seqlen, ngroups, d_state).bfloat16(),
        "D": torch.ones(nheads, device="cuda"),
        "dt_bias": torch.zeros(nheads, device="cuda"),
    }
    result = {name: t.requires_grad_() for name, t in tensors.items()}
    result["dy"] = normal(batch, seqlen, nheads, headdim).bfloat16()
    if packed:
        bounds = [0]
        while bounds[-1] < seqlen:
            bounds.append(min(seqlen, bounds[-1] + DOCUMENTS[(len(bounds) - 1) % len(DOCUMENTS)]))
        result["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        result["seq_idx"] = sequence_index(result["cu_seqlens"], seqlen)[None].int()
    return result


def ours(t: Inputs, **options: Any) -> Tensor:
    """This library's forward."""
    return ssd(**{name: t[name] for name in NAMES}, cu_seqlens=t.get("cu_seqlens"), dt_softplus=True, **options).y


@cache
def rival_package() -> bool:
    """Whether mamba_ssm can be imported. Its package's `__init__` would want the CUDA extensions."""
    found = importlib.util.find_spec("mamba_ssm")
    if found is None or found.origin is None:
        return False
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(Path(found.origin).parent)]
    sys.modules["mamba_ssm"] = package
    return True


def rival(t: Inputs) -> Tensor:
    """mamba_ssm's forward at its usual chunk size."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    core = [t[name] for name in ("x", "dt", "A", "B", "C")]
    options = {"D": t["D"], "dt_bias": t["dt_bias"], "dt_softplus": True, "seq_idx": t.get("seq_idx")}
    return mamba_chunk_scan_combined(*core, 256, **options)


def gradients(run: Callable[[Inputs], Tensor], t: Inputs) -> dict[str, Tensor]:
    """Forward and backward."""
    y = run(t)
    grads = torch.autograd.grad(y, [t[name] for name in NAMES], t["dy"].to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(NAMES, grads, strict=True)}


def candidates() -> dict[str, Callable[[Inputs], Tensor]]:
    """Ours, and the rival where it is installed."""
    return {"dualscan": ours} | ({"mamba_ssm": rival} if rival_package() else {})


def errors(shape: tuple[int, ...], packed: bool) -> dict[str, dict[str, float]]:
    """Relative RMS errors against float64, on sequences of at most 2048 tokens and few heads of the shape.

    Over `DRAWS` draws: dA is one number a head, in which what the tokens round cancels, more or less as it happens.
    """
    batch, seqlen, nheads, headdim, ngroups, d_state = shape
    # As divisible as the shape itself, since the rival's kernels are compiled for that.
    rows, few = min(batch, 2 if batch % 16 else 16), nheads if nheads % 16 else 16
    return _errors((rows, min(seqlen, 2048), few, headdim, min(ngroups, 16), d_state), packed)


@cache
def _errors(sizes: tuple[int, ...], packed: bool) -> dict[str, dict[str, float]]:
    squares: dict[str, dict[str, list[float]]] = {name: {} for name in candidates()}
    for seed in range(DRAWS):
        t = inputs(*sizes, packed, seed)
        exact = {name: v.detach().double().requires_grad_() for name, v in t.items() if v.is_floating_point()}
        others = {name: v for name, v in t.items() if name not in exact}
        oracle = gradients(lambda exact, others=others: ours(exact | others, impl="chunked"), exact)
        for name, run in candidates().items():
            for key, g in gradients(run, t).items():
                relative = (g.double() - oracle[key]).norm() / oracle[key].norm()
                squares[name].setdefault(key, []).append(relative.item() ** 2)
    return {name: {key: statistics.mean(v) ** 0.5 for key, v in found.items()} for name, found in squares.items()}


def ceilings() -> tuple[float, float]:
    """Bytes a second of an elementwise kernel (read plus written), and bfloat16 FLOPs a second of a large product."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    calls = {"copy": lambda: torch.neg(source, out=target), "product": lambda: a @ a}
    times = common.interleaved_graphs(calls, repeats=7)
    return 2 * source.nbytes / times["copy"], 2 * 8192**3 / times["product"]


def floors(shape: tuple[int, ...], pass_: str, ceiling: tuple[float, float]) -> dict[str, float]:
    """Least bytes (every input read once, every output written once) and FLOPs of a pass, as milliseconds."""
    batch, seqlen, nheads, headdim, ngroups, d_state = shape
    rows = batch * seqlen
    wide, narrow = 2 * rows * nheads * headdim, 2 * rows * (nheads + 2 * ngroups * d_state)
    flops = library.forward_flops(*shape[:2], nheads, headdim, ngroups, d_state, 64)
    moved = 2 * wide + narrow
    if pass_ == "fwdbwd":
        moved += 3 * wide + 2 * narrow
        flops += library.backward_flops(*shape[:2], nheads, headdim, ngroups, d_state, 64)
    return {"floor_ms": 1e3 * moved / ceiling[0], "flops_ms": 1e3 * flops / ceiling[1], "moved": moved, "flops": flops}


def peak(run: Callable[[], object]) -> float:
    """Peak MiB beyond what is there before the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def report(shape: str, pass_: str, name: str, seconds: float, versus: float | None, **values: Any) -> dict[str, Any]:
    """One record, also printed."""
    import triton

    ratio = {} if versus is None else {"ratio": versus / seconds}
    entry = common.record(
        JOB, shape, pass_, name, kernel_ms=1e3 * seconds, **ratio, **values, triton=triton.__version__
    )
    columns = ("shape", "pass", "impl", "kernel_ms", "call_ms", "ratio", "call_ratio", "floor_ms", "peak_mib")
    print(" | ".join(f"{entry[c]:.4g}" if isinstance(entry.get(c), float) else str(entry.get(c, "")) for c in columns))
    if "error" in values:
        print("    errors", {key: f"{value:.1e}" for key, value in values["error"].items()}, flush=True)
    return entry


def sequences(shape: str, repeats: int, ceiling: tuple[float, float], tested: bool) -> list[dict[str, Any]]:
    """Forward, and forward + backward, of one shape."""
    runs = candidates()
    sizes, packed = SHAPES[shape], "packed" in shape
    t = inputs(*sizes, packed)
    without = {name: v.detach() for name, v in t.items()}
    # The rival tunes itself on the first sizes that it sees: they must be these, not those of the error's check.
    for run in runs.values():
        gradients(run, t)
    error = errors(sizes, packed)
    records = []
    for pass_ in ("fwd", "fwdbwd"):
        calls: dict[str, Callable[[], object]] = {
            name: partial(run, without) if pass_ == "fwd" else partial(gradients, run, t) for name, run in runs.items()
        }
        if pass_ == "fwdbwd":
            calls[LESS] = partial(gradients, partial(ours, keep_states=False), t)
        memory = {name: peak(call) for name, call in calls.items()}
        kernel = common.interleaved_graphs(calls, repeats=repeats, calls=1 if sizes[1] > 2**16 else 2)
        call = common.interleaved(calls, repeats=2 * repeats, warmup=3)
        floor = floors(sizes, pass_, ceiling)
        moved, flops = floor.pop("moved"), floor.pop("flops")
        for name, seconds in kernel.items():
            values = {"gb_per_s": moved / seconds / 1e9, "tflop_per_s": flops / seconds / 1e12, **floor}
            values |= {"call_ms": 1e3 * call[name], "peak_mib": memory[name]}
            if name in error:
                values["error"] = error[name]
            if tested and "mamba_ssm" in call:
                values["call_ratio"] = call["mamba_ssm"] / call[name]
            what, name = (f"{shape}, {LESS}", "dualscan") if name == LESS else (shape, name)
            records.append(report(what, pass_, name, seconds, kernel.get("mamba_ssm") if tested else None, **values))
    return records


def attention(repeats: int) -> list[dict[str, Any]]:
    """Causal attention of the 2.7b layer's width, 20 heads of 128, through cuDNN and FlashAttention-2."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
    records = []
    for shape, batch, seqlen in (("2.7b 8x2048", 8, 2048), ("2.7b 1x16384", 1, 16384)):
        q, k, v, dy = torch.randn(4, batch, 20, seqlen, 128, device="cuda", dtype=torch.bfloat16).unbind(0)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]

        def forward(backend: SDPBackend, qkv: Any = (q, k, v)) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*qkv, is_causal=True)

        def both(backend: SDPBackend, leaves: Any = leaves, dy: Tensor = dy, forward: Any = forward) -> object:
            return torch.autograd.grad(forward(backend, leaves), leaves, dy)

        for pass_, run in (("fwd", forward), ("fwdbwd", both)):
            calls: dict[str, Callable[[], object]] = {name: partial(run, b) for name, b in backends.items()}
            for call in calls.values():
                call()
            times = common.interleaved_graphs(calls, repeats=repeats, calls=1)
            records += [report(shape, pass_, name, seconds, None) for name, seconds in times.items()]
    return records


# What the kernels' page calls the launches of a pass, forward and backward.
LAUNCHES = {
    "decay_kernel": ("decays", "backward: decays"),
    "states": ("states of segments", "backward: states of segments"),
    "combine_kernel": ("their join", "backward: their join"),
    "scan_hopper_kernel": ("scan", "dx, states G, their inner products with S"),
    "gradient_hopper_kernel": ("", "parts of dB and dC, and of the gradients of the decay"),
    "finish_kernel": ("", "dB and dC of their parts"),
    "decay_gradient_kernel": ("", "gradients of dt and A"),
    "total_kernel": ("", "sums over super-chunks"),
}


def launches(shape: str, repeats: int) -> list[dict[str, Any]]:
    """Every launch of a shape's passes by itself, as the profiler sees it."""
    from torch.profiler import ProfilerActivity, profile

    t = inputs(*SHAPES[shape], "packed" in shape)
    without = {name: v.detach() for name, v in t.items()}
    records = []
    for pass_, call in (("fwd", partial(ours, without)), ("fwdbwd", partial(gradients, ours, t))):
        call()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
        events = sorted((e for e in profiler.events() if e.name in LAUNCHES), key=lambda e: e.time_range.start)
        names = [e.name for e in events[: len(events) // repeats]]
        for place, name in enumerate(names):
            own = "states" if names[place + 1 : place + 2] == ["combine_kernel"] else name
            label = LAUNCHES[own][names[: place + 1].count("decay_kernel") - 1]
            seconds = statistics.median(e.time_range.elapsed_us() for e in events[place :: len(names)]) / 1e6
            records.append(report(shape, f"{pass_} launch", label, seconds, None))
    return records


def simple_gla(repeats: int) -> list[dict[str, Any]]:
    """fla's kernel for the same recurrence, forward: it wants keys and queries of every head, and dt multiplied in."""
    if importlib.util.find_spec("fla") is None:
        return []
    try:
        from fla.ops.simple_gla import chunk_simple_gla

        batch, seqlen, nheads, headdim, _, d_state = SHAPES["2.7b 8x2048"]
        q, k = torch.randn(2, batch, seqlen, nheads, d_state, device="cuda", dtype=torch.bfloat16).unbind(0)
        v = torch.randn(batch, seqlen, nheads, headdim, device="cuda", dtype=torch.bfloat16)
        g = -torch.rand(batch, seqlen, nheads, device="cuda")
        run = partial(chunk_simple_gla, q, k, v, g, scale=1.0)
        run()
        seconds = common.interleaved_graphs({"fla": run}, repeats=repeats, calls=1)["fla"]
    except Exception as problem:  # a rival that does not run here is a finding, not a failure of the job
        print("fla simple_gla:", str(problem)[:200])
        return []
    return [report("2.7b 8x2048", "fwd", "fla simple_gla", seconds, None)]


def decoding(repeats: int, ceiling: tuple[float, float], tested: bool) -> list[dict[str, Any]]:
    """One token of the 2.7b layer, with float32 states and, below the public boundary, bfloat16 ones."""
    records = []
    for batch in DECODE_BATCHES:
        t = {name: v.detach() for name, v in inputs(batch, 1, 80, 64, 1, 128).items()}
        token = {name: v[:, 0] if v.ndim > 1 else v for name, v in t.items()}
        states = {"fp32": torch.randn(batch, 80, 64, 128, device="cuda")}
        states["bf16"] = states["fp32"].bfloat16()

        def run(state: Tensor, token: Inputs = token) -> object:
            core = [token[name] for name in ("x", "dt", "A", "B", "C", "D")]
            return library.step_kernel(state, *core, None, token["dt_bias"], True, 0.0, float("inf"))

        def other(state: Tensor, token: Inputs = token) -> object:
            from mamba_ssm.ops.triton.selective_state_update import selective_state_update

            wide = {name: token[name][..., None].expand(*token[name].shape, 64) for name in ("dt", "D", "dt_bias")}
            A = token["A"][:, None, None].expand(80, 64, 128)
            return selective_state_update(
                state, token["x"], wide["dt"], A, token["B"], token["C"], wide["D"], None, wide["dt_bias"], True
            )

        for name, state in states.items():
            calls: dict[str, Callable[[], object]] = {"dualscan": partial(run, state)}
            if rival_package():
                calls["mamba_ssm"] = partial(other, state.clone())
            for call in calls.values():
                call()
            kernel = common.interleaved_graphs(calls, repeats=repeats, calls=16)
            call_times = common.interleaved(calls, repeats=2 * repeats, warmup=3)
            floor = 1e3 * 2 * state.nbytes / ceiling[0]
            for impl, seconds in kernel.items():
                values = {"call_ms": 1e3 * call_times[impl], "floor_ms": floor}
                versus = kernel.get("mamba_ssm") if tested else None
                records.append(report(f"2.7b {batch}, {name} state", "step", impl, seconds, versus, **values))
    return records


FIRST_CALL = """
import time, torch
from benchmarks.ops import ssd as job
t = job.inputs(*job.SHAPES["2.7b 8x2048"])
torch.cuda.synchronize()
start = time.perf_counter()
job.ours({name: v.detach() for name, v in t.items()})
torch.cuda.synchronize()
middle = time.perf_counter()
job.gradients(job.ours, t)
torch.cuda.synchronize()
print(middle - start, time.perf_counter() - middle)
"""


def first_call() -> list[dict[str, Any]]:
    """Seconds of the first forward, and of the first forward and backward after it, with no compiled kernel at hand."""
    with tempfile.TemporaryDirectory() as empty:
        run = subprocess.run(
            [sys.executable, "-c", FIRST_CALL],
            env={**os.environ, "TRITON_CACHE_DIR": empty},
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
    records = []
    for pass_, seconds in zip(("fwd", "fwdbwd"), map(float, run.stdout.split()[-2:]), strict=True):
        print(f"first call, {pass_}: {seconds:.2f} s")
        records.append(common.record(JOB, "2.7b 8x2048", f"{pass_} first call", "dualscan", first_call_s=seconds))
    return records


def both_passes(shape: str) -> None:
    """Forward and backward of ours and the rival's: all the kernels of a shape."""
    t = inputs(*SHAPES[shape], "packed" in shape)
    for run in candidates().values():
        gradients(run, t)


def compile_all(shapes: list[str]) -> None:
    """Compiles the kernels of every family of sizes ahead."""
    families = {(SHAPES[shape][2:], "packed" in shape): shape for shape in reversed(shapes)}
    ahead.wait(ahead.start(both_passes, [(shape,) for shape in families.values()]))


def run_tests() -> dict[str, Any]:
    """Runs the operator's tests on this device: a record of how many passed and failed, and whether that is enough."""
    workers = ["-n", str(min(os.cpu_count() or 1, 14))] if importlib.util.find_spec("xdist") else []
    files = [f"tests/ops/ssd/{name}.py" for name in ("test_triton", "test_triton_cuda")]
    quiet = ["-q", "-p", "no:benchmark", "-p", "no:cacheprovider", "-W", "default"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *quiet, *workers],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = run.stdout.strip().splitlines() or [run.stderr[-500:]]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", lines[-1])}
    print("\n".join(line for line in lines if line.startswith("FAILED")))
    print(
        f"tests: {counts.get('passed', 0)} passed, {counts.get('failed', 0) + counts.get('error', 0)} failed",
        flush=True,
    )
    passed = run.returncode == 0 and counts.get("passed", 0) > 0
    return common.record(JOB, "all", "tests", "dualscan", tested=passed, **counts)


def main(argv: list[str] | None = None) -> int:
    """Runs the job; with --save writes `results/ssd-<device>.json`."""
    parser = argparse.ArgumentParser(prog="dualscan bench ssd", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="turns of each measurement")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES), help="which shapes")
    parser.add_argument("--untested", action="store_true", help="skip the tests; no ratios then")
    parser.add_argument("--save", action="store_true", help="write the result file that README and docs are made from")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("the job ssd needs an NVIDIA GPU")
        return 1
    compile_all(args.shapes)
    ahead.tune_briefly()
    found = [name for name in ("mamba_ssm", "fla") if importlib.util.find_spec(name)]
    print(f"rivals for {sys.executable}: {', '.join(found) or 'none is installed'}")
    tests = [] if args.untested else [run_tests()]
    tested = bool(tests and tests[0]["tested"])
    ceiling = ceilings()
    print(f"copy {ceiling[0] / 1e12:.2f} TB/s, bfloat16 product {ceiling[1] / 1e12:.0f} TFLOP/s")
    device = common.short_device_name("cuda")
    parts: list[Callable[[], list[dict[str, Any]]]] = [
        first_call,
        *(partial(sequences, shape, args.repeats, ceiling, tested) for shape in args.shapes),
        partial(decoding, args.repeats, ceiling, tested),
        *(partial(launches, shape, args.repeats) for shape in ("2.7b 8x2048", "2.7b 1x16384") if shape in args.shapes),
        partial(attention, args.repeats),
        partial(simple_gla, args.repeats),
    ]
    records, failed = list(tests), False
    for part in parts:
        try:
            records += part()
        except Exception:  # the other measurements are worth having; the exit status tells
            traceback.print_exc()
            failed = True
        torch.cuda.empty_cache()
        if args.save:
            common.write(JOB, device, records)
    return int(failed)
