"""Job `selective_scan`: Mamba's scan against its rivals, and against SSD of its size.

`dualscan bench selective_scan --save`. Passes "fwd" and "fwdbwd". SSD computes another operator, of as many channels
and states; it stands beside the scan because replacing it is what Mamba-2 is about.

On a GPU, in bfloat16 with float32 A, D and dt_bias: kernel time (CUDA graphs, in turns), call time, the time of the
bytes alone, peak memory, and errors of the result and all gradients against float64. The rival is mamba_ssm's CUDA
kernel, where it was built. On a CPU: layers of Mamba-130M against the PyTorch path of `transformers`.
"""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import ahead, block, common
from benchmarks.ops.ssd import ceilings, peak, rival_package
from dualscan.ops.selective_scan import selective_scan
from dualscan.ops.ssd import ssd

JOB = "selective_scan"
# batch, seqlen, channels, d_state
SHAPES = {"130m 1x128": (1, 128, 1536, 16), "130m 1x2048": (1, 2048, 1536, 16), "130m N64 1x512": (1, 512, 1536, 64)}
GPU_SHAPES = {
    "2.8b 8x2048": (8, 2048, 5120, 16),
    "2.8b N64 8x2048": (8, 2048, 5120, 64),
    "2.8b 1x16384": (1, 16384, 5120, 16),
    "130m 16x1024": (16, 1024, 1536, 16),
    "130m 1x16384": (1, 16384, 1536, 16),
}
# The backward of the PyTorch path takes a time that is quadratic in the length: minutes at 2048 tokens.
LONGEST_RIVAL_BACKWARD = 128
HEADDIM = 64
CHECKED, CHECKED_ON_GPU = 64, (2, 300, 256)
Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]
Order = Callable[[Inputs], Inputs]


def inputs(
    batch: int, seqlen: int, channels: int, d_state: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Inputs:
    """Step sizes and decays as an untrained model has them."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    tokens = {name: normal(batch, seqlen, channels) for name in ("x", "dt", "z")}
    columns = {name: normal(batch, seqlen, d_state) for name in ("B", "C")}
    rates = -torch.arange(1.0, d_state + 1, device=device).repeat(channels, 1)
    vectors = {"D": torch.ones(channels, device=device), "dt_bias": torch.full((channels,), -4.0, device=device)}
    return {**tokens, **columns, "A": rates, **vectors}


def ours(t: Inputs, impl: str | None = None) -> Tensor:
    """This library's; the Triton kernels on a GPU."""
    impl = impl or ("triton" if t["x"].is_cuda else "auto")
    return selective_scan(**t, dt_softplus=True, impl=impl).y


def transformers(t: Inputs) -> Tensor:
    """Theirs, channels first as it wants them."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    x, dt, B, C, z = (t[name].transpose(1, 2) for name in ("x", "dt", "B", "C", "z"))
    y = mamba_selective_scan(x, dt, t["A"], B, C, t["D"], z, t["dt_bias"], True)
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)


def heads(t: Inputs) -> Inputs:
    """The inputs of SSD with heads of 64 channels; "dy", where it is there, goes along."""
    wide = {name: t[name].unflatten(-1, (-1, HEADDIM)) for name in ("x", "z", "dy") if name in t}
    columns = {name: t[name].unsqueeze(2) for name in ("B", "C")}
    vectors = {name: t[name][::HEADDIM] for name in ("D", "dt_bias")}
    return {
        **wide,
        **columns,
        **vectors,
        "dt": t["dt"][..., ::HEADDIM].contiguous(),
        "A": t["A"][::HEADDIM, 0].contiguous(),
    }


def duality(t: Inputs) -> Tensor:
    """SSD of `heads`."""
    tensors: dict[str, Any] = dict(t)
    return ssd(**tensors, dt_softplus=True).y


@cache
def rival_kernel() -> Callable[..., Any] | None:
    """mamba_ssm's operator; None where the package, its CUDA extension or a GPU is missing."""
    if not torch.cuda.is_available() or importlib.util.find_spec("selective_scan_cuda") is None or not rival_package():
        return None
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyrefly: ignore[missing-import]

    return selective_scan_fn


def channels_first(t: Inputs) -> Inputs:
    """The inputs in the memory order that mamba_ssm works in."""
    tokens = ("x", "dt", "z", "B", "C", "dy")
    return {name: v.transpose(1, 2).contiguous() if name in tokens else v for name, v in t.items()}


def rival(t: Inputs) -> Tensor:
    """mamba_ssm's, of `channels_first`."""
    run, z = rival_kernel(), t.get("z")
    assert run is not None
    return run(*(t[name] for name in ("x", "dt", "A", "B", "C", "D")), z, t["dt_bias"], delta_softplus=True)


def leaves(t: Inputs) -> Inputs:
    """The same tensors, asking for gradients, but "dy"."""
    return {name: v.detach().requires_grad_(name != "dy") for name, v in t.items()}


def both_ways(run: Run, t: Inputs) -> None:
    """Forward and backward from `dy`, for all `leaves`."""
    values = {name: v for name, v in t.items() if name != "dy"}
    torch.autograd.grad(run(values), list(values.values()), t["dy"])


def on_cpu(shape: str, repeats: int) -> list[dict[str, Any]]:
    """Both passes of one shape."""
    t, per_token = inputs(*SHAPES[shape]), ("x", "dt", "z", "B", "C")
    dy = torch.randn_like(t["x"])
    runs: dict[str, Run] = {impl: partial(ours, impl=impl) for impl in ("numba", "chunked")}
    runs |= {"transformers": transformers, "ssd": lambda t: duality(heads(t)).flatten(2)}
    short = {name: value[:, :CHECKED] if name in per_token else value for name, value in t.items()}
    exact = ours({name: value.double() for name, value in short.items()}, "recurrent")
    records = []
    for name, candidates in (
        ("fwd", {impl: torch.no_grad()(partial(run, t)) for impl, run in runs.items()}),
        ("fwdbwd", {impl: partial(both_ways, run, leaves({**t, "dy": dy})) for impl, run in runs.items()}),
    ):
        if name == "fwdbwd" and dy.shape[1] > LONGEST_RIVAL_BACKWARD:
            del candidates["transformers"]
        for impl, seconds in common.interleaved(candidates, repeats=repeats).items():
            values: dict[str, Any] = {"call_ms": 1e3 * seconds}
            if impl != "ssd":
                values["error"] = {"y": ((runs[impl](short) - exact).norm() / exact.norm()).item()}
            records.append(common.record(JOB, shape, name, impl, **values))
            print(f"{shape} {name} {impl}: {values['call_ms']:.4g} ms {values.get('error', '')}", flush=True)
    return records


def scans() -> dict[str, tuple[Order, Run]]:
    """What is compared on a GPU: name -> (the order of its inputs, its forward)."""
    theirs = {} if rival_kernel() is None else {"mamba_ssm": (channels_first, rival)}
    return {"dualscan": (dict, ours), **theirs, "ssd": (heads, duality)}


def errors(d_state: int) -> dict[str, dict[str, float]]:
    """Relative RMS errors of results and gradients against float64, on a few channels and tokens."""
    t = inputs(*CHECKED_ON_GPU, d_state, "cuda", torch.bfloat16)
    t = leaves({**t, "dy": torch.randn_like(t["x"])})

    def straight(order: Order, run: Run) -> Run:
        def call(t: Inputs) -> Tensor:
            y = run(order({name: v for name, v in t.items() if name != "dy"}))
            return y.transpose(1, 2) if order is channels_first else y

        return call

    runs = {name: straight(*scan) for name, scan in scans().items() if name != "ssd"}
    return block.errors(runs, straight(dict, partial(ours, impl="chunked")), t)


def floor_ms(shape: tuple[int, int, int, int], pass_: str, bandwidth: float) -> float:
    """The time of every input read once (the backward reads them again) and every output written once."""
    batch, seqlen, channels, d_state = shape
    wide, narrow = 2 * batch * seqlen * channels, 2 * batch * seqlen * d_state
    moved = 4 * wide + 2 * narrow  # x, dt, z, B and C in, y out
    if pass_ == "fwdbwd":
        moved += 7 * wide + 4 * narrow  # x, dt, z, dy, B and C in, five gradients out
    return 1e3 * moved / bandwidth


def on_gpu(shape: str, repeats: int, bandwidth: float) -> list[dict[str, Any]]:
    """Both passes of one shape; whoever fails is left out with a line."""
    import triton

    sizes = GPU_SHAPES[shape]
    t = inputs(*sizes, "cuda", torch.bfloat16)
    t["dy"] = torch.randn_like(t["x"])
    error, records = errors(sizes[3]), []
    ready = {name: (run, leaves(order(t))) for name, (order, run) in scans().items()}
    for pass_ in ("fwd", "fwdbwd"):
        calls: dict[str, Callable[[], object]] = {}
        memory = {}
        for name, (run, own) in ready.items():
            without = {key: v.detach() for key, v in own.items() if key != "dy"}
            call = partial(run, without) if pass_ == "fwd" else partial(both_ways, run, own)
            try:
                call()
                memory[name] = peak(call)
            except Exception as problem:  # one that does not run here is a finding, not a failure of the job
                print(f"{shape} {pass_} {name}: failed: {str(problem)[:200]}", flush=True)
            else:
                calls[name] = call
        kernel = common.interleaved_graphs(calls, repeats=repeats, calls=2)
        whole = common.interleaved(calls, repeats=repeats)
        for name, seconds in kernel.items():
            values: dict[str, Any] = {"call_ms": 1e3 * whole[name], "peak_mib": memory[name]}
            if name != "ssd":
                values |= {"floor_ms": floor_ms(sizes, pass_, bandwidth), "error": error[name]}
            if "mamba_ssm" in kernel:
                values |= {"ratio": kernel["mamba_ssm"] / seconds, "call_ratio": whole["mamba_ssm"] / whole[name]}
            records.append(
                common.record(JOB, shape, pass_, name, kernel_ms=1e3 * seconds, **values, triton=triton.__version__)
            )
            line = f"{shape} {pass_} {name}: {1e3 * seconds:.4g} ms, call {values['call_ms']:.4g} ms"
            print(f"{line}, {values.get('ratio', 0):.2f}x, peak {memory[name]:.0f} MiB", flush=True)
    print(
        "    errors", {name: {key: f"{e:.1e}" for key, e in each.items()} for name, each in error.items()}, flush=True
    )
    return records


def first_call(name: str, gate: bool, *sizes: int) -> None:
    """Calls one of `scans`, with and without gradients: all its kernels."""
    order, run = scans()[name]
    t = inputs(*sizes, device="cuda", dtype=torch.bfloat16)
    t["dy"] = torch.randn_like(t["x"])
    if not gate:
        del t["z"]
    t = leaves(order(t))
    both_ways(run, t)
    run({key: v.detach() for key, v in t.items() if key != "dy"})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job."""
    parser = argparse.ArgumentParser(prog="dualscan bench selective_scan", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=[*GPU_SHAPES, *SHAPES], help="which ones of the device's")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--save", action="store_true", help="write the result file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.device == "cpu":
        measure: Callable[[str], list[dict[str, Any]]] = partial(on_cpu, repeats=args.repeats)
        shapes = [shape for shape in args.shapes or SHAPES if shape in SHAPES]
    else:
        shapes = [shape for shape in args.shapes or GPU_SHAPES if shape in GPU_SHAPES]
        sizes = [(name, True, *GPU_SHAPES[shape]) for shape in shapes for name in ("dualscan", "ssd")]
        checked = [("dualscan", True, *CHECKED_ON_GPU, d_state) for d_state in {GPU_SHAPES[s][3] for s in shapes}]
        ahead.wait(ahead.start(first_call, [*sizes, *checked]))
        bandwidth = ceilings()[0]
        print(f"copy {bandwidth / 1e12:.2f} TB/s", flush=True)
        measure = partial(on_gpu, repeats=args.repeats, bandwidth=bandwidth)
    records: list[dict[str, Any]] = []
    for shape in shapes:
        records += measure(shape)
        if args.save:
            print("wrote", common.write(JOB, common.short_device_name(args.device), records).name)
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return 0
