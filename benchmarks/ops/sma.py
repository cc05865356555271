"""Job `sma`: structured masked attention on a CPU, the linear order against the quadratic one, and 1-SS masks against
`linear_attention`.

`dualscan bench sma --save`. Three passes: "mask", a mask times 64 columns, by its own multiplication and dense; "fwd",
attention with d_state = headdim = 16 or 64; "operator", a 1-semiseparable mask beside the operator that it goes
through. Every result is compared with the quadratic order in float64 before it is timed.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from dualscan.ops.sma import masks, sma
from dualscan.ops.ssd import linear_attention
from dualscan.semiseparable import Cosine, Fourier, StructuredMatrix, Toeplitz

JOB = "sma"
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
COLUMNS = 64
Mask = Callable[[int, bool], StructuredMatrix]


def kernel(length: int) -> Tensor:
    """The entries of a Toeplitz mask: a slowly falling weight of the distance."""
    return 1 / torch.arange(1.0, length + 1)


# Name -> the mask of a length, in double precision or not.
MASKS: dict[str, Mask] = {
    "toeplitz": lambda n, double: Toeplitz(kernel(n).double() if double else kernel(n)),
    "fourier": lambda n, double: Fourier(n, torch.complex128 if double else torch.complex64),
    "cosine": lambda n, double: Cosine(n, torch.float64 if double else torch.float32),
}


def timed(
    shape: str, pass_: str, runs: Mapping[str, Callable[[], Tensor]], exact: Tensor, baseline: str, seconds: float
) -> list[dict[str, Any]]:
    """A record for each run, with its error and its time relative to the baseline's."""
    errors = {name: ((run() - exact).abs().norm() / exact.abs().norm()).item() for name, run in runs.items()}
    once = sum(common.interleaved(runs, repeats=1).values())
    times = common.interleaved(runs, repeats=max(3, min(99, int(seconds / once))), warmup=0)
    records = []
    for name, time in times.items():
        values = {"call_ms": 1e3 * time, "ratio": times[baseline] / time, "error": errors[name]}
        records.append(common.record(JOB, shape, pass_, name, **values))
        print(
            f"{shape} {pass_} {name}: {1e3 * time:.4g} ms, {values['ratio']:.2f}x, error {errors[name]:.1e}", flush=True
        )
    return records


@torch.inference_mode()
def multiplications(length: int, seconds: float) -> list[dict[str, Any]]:
    """A mask times columns, by its own algorithm and by a product with its entries."""
    records = []
    x = torch.randn(length, COLUMNS)
    for name, mask in MASKS.items():
        fast, dense = mask(length, False), mask(length, False).to_dense()
        exact = mask(length, True).to_dense() @ x.to(mask(length, True).dtype)
        runs = {"linear": partial(fast.matmul, x), "quadratic": partial(torch.matmul, dense, x.to(dense.dtype))}
        records += timed(f"{name} {length}", "mask", runs, exact, "quadratic", seconds)
    return records


@torch.inference_mode()
def attention(length: int, width: int, seconds: float) -> list[dict[str, Any]]:
    """Both orders of attention, of one head."""
    records = []
    q, k, v = torch.randn(3, 1, length, 1, width).unbind(0)
    for name in ("toeplitz", "cosine"):
        mask = MASKS[name](length, False)
        exact = sma(q.double(), k.double(), v.double(), MASKS[name](length, True), impl="quadratic")
        runs = {impl: partial(sma, q, k, v, mask, impl=impl) for impl in ("linear", "quadratic", "auto")}
        records += timed(f"{name} {width} {length}", "fwd", runs, exact, "quadratic", seconds)
    return records


@torch.inference_mode()
def operator(length: int, seconds: float) -> list[dict[str, Any]]:
    """A layer of 24 heads of 64 with d_state 128: the mask of SSD, and the operator by itself."""
    q, k = torch.randn(2, 1, length, 1, 128).unbind(0)
    v, log_decay = torch.randn(1, length, 24, 64), -torch.rand(1, length, 24)
    exact = linear_attention(q.double(), k.double(), v.double(), log_decay=log_decay.double()).y

    def masked() -> Tensor:
        return sma(q, k, v, masks.selective(log_decay))

    def direct() -> Tensor:
        return linear_attention(q, k, v, log_decay=log_decay).y

    runs = {"linear_attention": direct, "sma": masked}
    return timed(f"130m {length}", "operator", runs, exact, "linear_attention", seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job."""
    parser = argparse.ArgumentParser(prog="dualscan bench sma", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long each measurement takes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more of them wait for each other")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="T", help="tokens")
    parser.add_argument("--save", action="store_true", help="write the result file that the pages are made from")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    records = []
    for length in args.lengths:
        records += multiplications(length, args.seconds)
        for width in (16, 64):
            records += attention(length, width, args.seconds)
        records += operator(length, 6 * args.seconds)  # a ratio close to 1 needs more turns
    if args.save:
        print("wrote", common.write(JOB, "cpu", records).name)
    return 0


if __name__ == "__main__":
    main()
