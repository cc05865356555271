"""Job `selective_scan`: Mamba's scan on a CPU, against the PyTorch path of `transformers` and against SSD of its size.

`dualscan bench selective_scan --save`. Passes "fwd" and "fwdbwd" over layers of Mamba-130M; every result is compared
with the float64 recurrence on the first tokens before it is timed. SSD computes another operator, of as many channels
and states; it stands beside the scan because replacing it is what Mamba-2 is about.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from dualscan.ops.selective_scan import selective_scan
from dualscan.ops.ssd import ssd

JOB = "selective_scan"
# batch, seqlen, channels, d_state
SHAPES = {"130m 1x128": (1, 128, 1536, 16), "130m 1x2048": (1, 2048, 1536, 16), "130m N64 1x512": (1, 512, 1536, 64)}
# The backward of the PyTorch path takes a time that is quadratic in the length: minutes at 2048 tokens.
LONGEST_RIVAL_BACKWARD = 128
HEADDIM = 64
CHECKED = 64


def inputs(batch: int, seqlen: int, channels: int, d_state: int) -> dict[str, Tensor]:
    """Step sizes and decays as an untrained model has them."""
    tokens = {name: torch.randn(batch, seqlen, channels) for name in ("x", "dt", "z")}
    columns = {name: torch.randn(batch, seqlen, d_state) for name in ("B", "C")}
    rates = -torch.arange(1.0, d_state + 1).repeat(channels, 1)
    return {**tokens, **columns, "A": rates, "D": torch.ones(channels), "dt_bias": torch.full((channels,), -4.0)}


def ours(t: dict[str, Tensor], impl: str) -> Tensor:
    """This library's."""
    return selective_scan(**t, dt_softplus=True, impl=impl).y


def transformers(t: dict[str, Tensor]) -> Tensor:
    """Theirs, channels first as it wants them."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    x, dt, B, C, z = (t[name].transpose(1, 2) for name in ("x", "dt", "B", "C", "z"))
    y = mamba_selective_scan(x, dt, t["A"], B, C, t["D"], z, t["dt_bias"], True)
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)


def duality(t: dict[str, Tensor]) -> Tensor:
    """SSD with heads of 64 channels."""
    x, z = (t[name].unflatten(-1, (-1, HEADDIM)) for name in ("x", "z"))
    A, D, dt_bias = t["A"][::HEADDIM, 0], t["D"][::HEADDIM], t["dt_bias"][::HEADDIM]
    dt, B, C = t["dt"][..., ::HEADDIM], t["B"].unsqueeze(2), t["C"].unsqueeze(2)
    return ssd(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True).y.flatten(2)


def both_ways(run: Callable[[dict[str, Tensor]], Tensor], t: dict[str, Tensor], dy: Tensor) -> None:
    """Forward and backward."""
    leaves = {name: value.detach().requires_grad_() for name, value in t.items()}
    run(leaves).backward(dy)


def measure(shape: str, repeats: int) -> list[dict[str, Any]]:
    """Both passes of one shape."""
    t, per_token = inputs(*SHAPES[shape]), ("x", "dt", "z", "B", "C")
    dy = torch.randn_like(t["x"])
    runs = {impl: partial(ours, impl=impl) for impl in ("numba", "chunked")}
    runs |= {"transformers": transformers, "ssd": duality}
    short = {name: value[:, :CHECKED] if name in per_token else value for name, value in t.items()}
    exact = ours({name: value.double() for name, value in short.items()}, "recurrent")
    records = []
    for name, candidates in (
        ("fwd", {impl: torch.no_grad()(partial(run, t)) for impl, run in runs.items()}),
        ("fwdbwd", {impl: partial(both_ways, run, t, dy) for impl, run in runs.items()}),
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job."""
    parser = argparse.ArgumentParser(prog="dualscan bench selective_scan", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which ones")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--save", action="store_true", help="write the result file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    records = [r for shape in args.shapes for r in measure(shape, args.repeats)]
    if args.save:
        print("wrote", common.write(JOB, "cpu", records).name)
    return 0
