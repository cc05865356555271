"""Job `mamba2_block`: the Mamba-2 layer, forward and backward, against `mamba_ssm.modules.mamba2.Mamba2`.

The same weights and inputs, in turns in one process: float32 weights under bfloat16 autocast, and bfloat16 weights. Per
pass kernel time (CUDA graphs), call time, peak memory beyond what was there, the error against our layer in float64,
and the time of the two projections alone, measured in the same run. `dualscan bench mamba2_block --save --profile`.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ahead, common
from benchmarks.models import rivals
from benchmarks.ops.ssd import peak
from dualscan.nn.mamba2 import Mamba2

JOB = "mamba2_block"
SHAPES = {"d2560 8x2048": (2560, 8, 2048), "d768 16x1024": (768, 16, 1024), "tiny 2x64": (64, 2, 64)}
MEASURED = ("d2560 8x2048", "d768 16x1024")
WEIGHTS = {"": torch.float32, ", bf16 weights": torch.bfloat16}
RIVAL, PRODUCTS = "mamba_ssm", "projections alone"
MODES = {"dualscan": "none", "dualscan activations": "activations", "dualscan block": "block"}
Tensors = dict[str, Tensor]


class Projections(nn.Module):
    """The layer's two matrix products and nothing between them: what no kernel can save."""

    def __init__(self, layer: Mamba2) -> None:
        super().__init__()
        self.in_proj, self.out_proj = copy.deepcopy(layer.in_proj), copy.deepcopy(layer.out_proj)
        self.d_inner = layer.d_inner

    def forward(self, u: Tensor) -> Tensor:
        """Out of the first columns of what goes in."""
        return self.out_proj(self.in_proj(u)[..., : self.d_inner])


def layers(d_model: int, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """All implementations, with the weights of one; the decay rates and norms stay in float32."""
    torch.manual_seed(0)
    with torch.device(device):
        ours = Mamba2(d_model)
    made: dict[str, nn.Module] = {}
    for name, mode in MODES.items():
        made[name] = copy.deepcopy(ours)
        made[name].recompute = mode
    if rivals.available():
        made[RIVAL] = rivals.layer(ours)
    made[PRODUCTS] = Projections(ours)
    for module in made.values():
        for name, parameter in module.named_parameters():
            if name.startswith(("in_proj", "out_proj", "conv1d")):
                parameter.data = parameter.data.to(dtype)
    return made


def run(module: nn.Module, u: Tensor) -> Tensor:
    """The layer's output under autocast."""
    with torch.autocast(u.device.type, torch.bfloat16):
        y = module(u)
    return y if isinstance(y, Tensor) else y[0]


def gradients(forward: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, u: Tensor, dy: Tensor) -> Tensors:
    """Forward and backward: the output and the gradients of input and parameters."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    y = forward(module, u)
    grads = torch.autograd.grad(y, [u, *parameters], dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(("u", *names), grads, strict=True)}


def first_backward(shape: str) -> None:
    """Forward and backward of everybody: all the kernels of a shape."""
    d_model, batch, seqlen = SHAPES[shape]
    u, dy = torch.randn(2, batch, seqlen, d_model, device="cuda", dtype=torch.bfloat16).unbind(0)
    u = u.clone().requires_grad_()
    for name, module in layers(d_model, "cuda", torch.float32).items():
        if name != PRODUCTS:
            gradients(run, module, u, dy)


def errors(made: Mapping[str, nn.Module], u: Tensor, dy: Tensor) -> dict[str, dict[str, float]]:
    """Relative RMS errors on few sequences, against float64 with the same weights."""
    # As divisible as the whole batch, since the rival's kernels are compiled for that.
    rows = 2 if len(u) % 16 else 16
    u, dy = u.detach()[:rows].requires_grad_(), dy[:rows]
    exact = copy.deepcopy(made["dualscan"]).double()
    exact.impl = "chunked"
    oracle = gradients(lambda module, v: module(v)[0], exact, u.detach().double().requires_grad_(), dy.double())

    def error(got: Tensors) -> dict[str, float]:
        return {key: ((g.double() - oracle[key]).norm() / oracle[key].norm()).item() for key, g in got.items()}

    return {name: error(gradients(run, module, u, dy)) for name, module in made.items() if name != PRODUCTS}


def kernels(call: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches of every kernel of a call, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return {e.key[:100]: (e.self_device_time_total / 1e3, e.count) for e in found if e.self_device_time_total}


def measure(shape: str, weights: str, device: str, repeats: int, profiled: bool) -> list[dict[str, Any]]:
    """Forward, and forward and backward, of one shape with one kind of weights."""
    d_model, batch, seqlen = SHAPES[shape]
    made = layers(d_model, device, WEIGHTS[weights])
    u, dy = torch.randn(2, batch, seqlen, d_model, device=device, dtype=torch.bfloat16).unbind(0)
    u = u.clone().requires_grad_()
    # The rival tunes itself on the first sizes that it sees.
    for module in made.values():
        gradients(run, module, u, dy)
    error = errors(made, u, dy)
    records = []
    for pass_ in ("fwd", "fwdbwd"):
        calls: dict[str, Callable[[], object]] = {}
        for name, module in made.items():
            if pass_ == "fwdbwd":
                calls[name] = partial(gradients, run, module, u, dy)
            elif name not in list(MODES)[1:]:
                calls[name] = torch.no_grad()(partial(run, module, u))
        call = common.interleaved(calls, repeats=repeats, warmup=2)
        kernel, memory = call, {}
        if device == "cuda":
            memory = {name: peak(run_) for name, run_ in calls.items()}
            kernel = common.interleaved_graphs(calls, repeats=repeats, calls=2)
        for name, seconds in kernel.items():
            values: dict[str, Any] = {"call_ms": 1e3 * call[name], "floor_ms": 1e3 * kernel[PRODUCTS]}
            if name in error:
                values["error"] = error[name]
            if name in memory:
                values |= {"kernel_ms": 1e3 * seconds, "peak_mib": memory[name]}
            if RIVAL in kernel:
                values |= {"ratio": kernel[RIVAL] / seconds, "call_ratio": call[RIVAL] / call[name]}
            if name == RIVAL:
                values["path"] = rivals.path()
            records.append(common.record(JOB, shape + weights, pass_, name, **values))
            columns = ("shape", "pass", "impl", "kernel_ms", "call_ms", "floor_ms", "ratio", "call_ratio", "peak_mib")
            print(common.table(records[-1:], columns).splitlines()[1], flush=True)
        if profiled and device == "cuda":
            for name in (name for name in ("dualscan", RIVAL) if name in calls):
                spent = kernels(calls[name])
                records.append(common.record(JOB, shape + weights, f"{pass_} kernels", name, kernels=spent))
                print(f"  kernels of {name}, {pass_}: {sum(ms for ms, _ in spent.values()):.3f} ms")
                print("\n".join(f"    {ms:.3f} ms x{count} {key}" for key, (ms, count) in list(spent.items())[:24]))
    for name, values in error.items():
        print(f"  errors of {name}:", {key: f"{value:.1e}" for key, value in values.items()}, flush=True)
    return records


def main(argv: list[str] | None = None) -> int:
    """Runs the job; with --save writes `results/mamba2_block-<device>.json`."""
    parser = argparse.ArgumentParser(prog=f"dualscan bench {JOB}", description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(MEASURED), choices=list(SHAPES), help="which shapes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="a CPU only shows that the job runs")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each measurement")
    parser.add_argument("--profile", action="store_true", help="the time of every kernel, too")
    parser.add_argument("--save", action="store_true", help="write the result file that the pages are made from")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"the job {JOB} needs an NVIDIA GPU; --device cpu --shapes 'tiny 2x64' shows that it runs")
        return 1
    if args.device == "cuda":
        ahead.wait(ahead.start(first_backward, [(shape,) for shape in args.shapes]))
    print("rival:", f"mamba_ssm, {rivals.path()}" if rivals.available() else "mamba_ssm is not installed")
    records: list[dict[str, Any]] = []
    for shape in args.shapes:
        for weights in WEIGHTS:
            records += measure(shape, weights, args.device, args.repeats, args.profile)
            if args.save:
                common.write(JOB, common.short_device_name(args.device), records)
            if args.device == "cuda":
                torch.cuda.empty_cache()
    return 0
