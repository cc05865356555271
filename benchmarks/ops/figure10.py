"""Job `figure10`: figure 10 of arXiv 2405.21060 redrawn: SSD, Mamba's scan and attention against d_state and length.

`dualscan bench figure10 --save`, then `python -m benchmarks.report` draws it. All work on the same number of tokens,
cut into sequences of the length in question, in bfloat16: SSD (80 heads of 64) and the selective scan with 5120
channels, ours and mamba_ssm's CUDA kernel where it was built, and causal attention of the layer's 2560 columns, as a
model has it in the place of such a layer. D, dt bias and softplus are inside, the gate is not. Times are those of calls
that follow each other without waiting, in turns. An implementation that cannot run a size is left out there.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import ahead, common
from benchmarks.ops import selective_scan as scan
from benchmarks.ops.selective_scan import Inputs, Run, both_ways, leaves

JOB = "figure10"
LENGTHS = tuple(2**k for k in range(9, 18))
STATES = (16, 32, 64, 128, 256)
LENGTH, STATE = 4096, 64  # the one that stays while the other varies
TOKENS, CHANNELS = 2**17, 5120
NAMES = {"dualscan": "dualscan selective_scan", "mamba_ssm": "mamba_ssm selective_scan", "ssd": "dualscan ssd"}
CHECKED = 256
# Seconds for the turns of one pass at one size; who takes longer is timed once.
BUDGET = 0.25


def attention(backend: SDPBackend, t: Inputs) -> Tensor:
    """Causal attention through one of PyTorch's backends."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], is_causal=True)


def backends(device: str) -> dict[str, SDPBackend]:
    """Those of the device, by their names in the records."""
    if device == "cpu":
        return {"sdpa-flash": SDPBackend.FLASH_ATTENTION}
    return {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}


def ungated(*sizes: int, device: str) -> Inputs:
    """The scan's inputs without z, and dy."""
    t = scan.inputs(*sizes, device=device, dtype=torch.bfloat16)
    t["dy"] = t.pop("z")
    return t


def candidates(batch: int, seqlen: int, channels: int, d_state: int, device: str) -> dict[str, tuple[Run, Inputs]]:
    """Everybody's forward and leaves."""
    t = ungated(batch, seqlen, channels, d_state, device=device)
    found: dict[str, tuple[Run, Inputs]] = {
        NAMES[name]: (run, leaves(order(t))) for name, (order, run) in scan.scans().items()
    }
    headdim = min(128, channels // 2)
    shape = (batch, channels // 2 // headdim, seqlen, headdim)
    qkv = {name: torch.randn(shape, device=device, dtype=torch.bfloat16) for name in ("q", "k", "v", "dy")}
    for name, backend in backends(device).items():
        found[name] = (partial(attention, backend), leaves(qkv))
    return found


@cache
def errors(channels: int, d_state: int, device: str) -> dict[str, float]:
    """Relative RMS error of y against float64, of the scans and SSD, on a short sequence."""
    t = ungated(1, CHECKED, channels, d_state, device=device)
    del t["dy"]
    found = {}
    for name, (order, run) in scan.scans().items():
        exact_run = scan.duality if name == "ssd" else partial(scan.ours, impl="chunked")
        own = order(t)
        exact = exact_run({key: v.double() for key, v in (own if name == "ssd" else t).items()})
        try:
            y = run(own).double()
        except Exception as problem:  # as in `times`
            print(f"N{d_state} {NAMES[name]}: failed: {str(problem)[:150]}", flush=True)
            continue
        exact = exact if exact.shape == y.shape else exact.transpose(1, 2)  # channels first
        found[NAMES[name]] = ((y - exact).norm() / exact.norm()).item()
    return found


def seconds(call: Callable[[], object], calls: int) -> float:
    """Time of one of several calls after each other."""
    common.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    common.synchronize()
    return (time.perf_counter() - start) / calls


def times(calls: Mapping[str, Callable[[], object]], label: str) -> dict[str, float]:
    """Median seconds of whoever runs, in turns."""
    rough = {}
    for name, call in calls.items():
        try:
            call()  # compiles, where that was not done before
            rough[name] = seconds(call, 1)
        except Exception as problem:  # out of memory or unsupported: a finding, not a failure of the job
            print(f"{label} {name}: failed: {str(problem)[:150]}", flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    turns = min(3, int(BUDGET / (sum(rough.values()) + 1e-9)))
    if turns == 0:
        return rough
    share = BUDGET / max(len(rough), 1) / turns
    measured: dict[str, list[float]] = {name: [] for name in rough}
    for _ in range(turns):
        for name, once in rough.items():
            calls[name]()  # the allocator may have to give back first what others took
            measured[name].append(seconds(calls[name], max(1, min(10, int(share / once)))))
    return {name: statistics.median(values) for name, values in measured.items()}


def measure(seqlen: int, d_state: int, tokens: int, channels: int, device: str) -> list[dict[str, Any]]:
    """Both passes of one size."""
    batch = max(1, tokens // seqlen)
    shape, records = f"N{d_state} {batch}x{seqlen}", []
    error = errors(channels, d_state, device)
    ready = candidates(batch, seqlen, channels, d_state, device)
    for pass_ in ("fwd", "fwdbwd"):
        calls: dict[str, Callable[[], object]] = {}
        for name, (run, own) in ready.items():
            without = {key: v.detach() for key, v in own.items() if key != "dy"}
            calls[name] = partial(run, without) if pass_ == "fwd" else partial(both_ways, run, own)
        for name, median in times(calls, f"{shape} {pass_}").items():
            values: dict[str, Any] = {"seqlen": seqlen, "d_state": d_state, "channels": channels}
            values |= {"call_ms": 1e3 * median, "ns_per_token": 1e9 * median / (batch * seqlen)}
            if name in error:
                values["error"] = {"y": error[name]}
            records.append(common.record(JOB, shape, pass_, name, **values))
            print(f"{shape} {pass_} {name}: {1e3 * median:.4g} ms, {values.get('error', '')}", flush=True)
    return records


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time a token against d_state and against length, both passes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = {
        "dualscan ssd": ("SSD (dualscan)", "#3b6fb6", "o-"),
        "dualscan selective_scan": ("selective scan (dualscan)", "#d1603d", "s-"),
        "mamba_ssm selective_scan": ("selective scan (mamba_ssm, CUDA)", "#d1603d", "s:"),
        "sdpa-cudnn": ("attention (cuDNN)", "#4d4d4d", "^-"),
        "sdpa-flash": ("attention (FlashAttention-2)", "#4d4d4d", "^:"),
    }
    figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharey="row")
    for row, (pass_, words) in zip(grid, (("fwd", "forward"), ("fwdbwd", "forward + backward")), strict=True):
        for axes, (varied, fixed, value) in zip(
            row, (("seqlen", "d_state", STATE), ("d_state", "seqlen", LENGTH)), strict=True
        ):
            for impl, (label, colour, style) in looks.items():
                mine = [r for r in records if (r["impl"], r["pass"], r[fixed]) == (impl, pass_, value)]
                points = sorted({r[varied]: r["ns_per_token"] for r in mine}.items())
                if points:
                    axes.loglog(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
            axes.set_xscale("log", base=2)
            known = sorted({r[varied] for r in records if r[fixed] == value})
            axes.set_xticks(known, [str(n) if n < 1024 else f"{n // 1024}K" for n in known])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
            if varied == "seqlen":
                axes.set_ylabel(f"{words}, ns a token")
            axes.set_title(
                f"against length, d_state {STATE}"
                if varied == "seqlen"
                else f"against d_state, length {LENGTH // 1024}K"
            )
    for axes, words in zip(grid[1], ("length of the sequences", "d_state"), strict=True):
        axes.set_xlabel(words)
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compile_all(channels: int) -> None:
    """Compiles our kernels ahead: SSD has some for every d_state, and both have some for sequences cut into segments.

    Few sequences are cut, and a length matters no further.
    """
    calls = [("ssd", False, 2, LENGTH, channels, d_state) for d_state in STATES]
    calls += [("ssd", False, 1, LENGTH, channels, STATE)]
    calls += [("dualscan", False, batch, LENGTH, channels, STATE) for batch in (1, 4)]
    ahead.wait(ahead.start(scan.first_call, calls))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job."""
    parser = argparse.ArgumentParser(prog="dualscan bench figure10", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS, help=f"with d_state {STATE}")
    parser.add_argument("--states", nargs="*", type=int, default=STATES, help=f"with length {LENGTH}")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a call")
    parser.add_argument(
        "--channels", type=int, default=CHANNELS, help="of the scans; attention has half as many columns"
    )
    parser.add_argument("--save", action="store_true", help="write the result file, after every size")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("the job figure10 needs an NVIDIA GPU; --device cpu takes small sizes")
        return 1
    start = time.perf_counter()
    if args.device == "cuda":
        compile_all(args.channels)
        print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    # The longest first: they are what the figure is about.
    sizes = [(length, STATE) for length in sorted(args.lengths, reverse=True)]
    sizes += [(LENGTH, d_state) for d_state in args.states if (LENGTH, d_state) not in sizes]
    records: list[dict[str, Any]] = []
    for seqlen, d_state in sizes:
        records += measure(seqlen, d_state, args.tokens, args.channels, args.device)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        if args.save:
            common.write(JOB, common.short_device_name(args.device), records)
    print(f"done after {time.perf_counter() - start:.0f} s")
    return 0
