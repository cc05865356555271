"""Job `train_step`: a whole optimizer step of Mamba-2 language models, against `mamba_ssm`'s with the same weights.

Forward, backward, clipping and fused AdamW as `dualscan.train` runs them: bfloat16 autocast, float32 weights, one GPU.
The rival's model goes through the same step with the same optimizer and PyTorch's loss. A step has the same number of
tokens at every length of context.

Model FLOP utilisation (MFU) counts what `models/accounting.py` counts for training: 6 FLOPs a weight and token for the
matrix products, logits included, and SSD by its own formulas in chunks of 64; nothing that a memory setting computes
again. `mfu` is against the peak of the data sheet (989 TFLOP/s, dense bfloat16 on an H100 or H200), `of_product`
against a bfloat16 product of 8192 x 8192 x 8192 in the same run.

Variants are joined by +: plain, activations and block (what the backward computes again), graph (gradients as a CUDA
graph), compile (blocks through torch.compile). Each is timed in turns with the rival. Where the two models do not fit
side by side, one is measured after the other, in the same process; records say so: `in_turns`. `dualscan bench
train_step --save`.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from benchmarks import ahead, common
from benchmarks.models import rivals
from benchmarks.ops.ssd import ceilings
from dualscan.data.loader import Batch
from dualscan.models.accounting import training_flops_per_sequence
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from dualscan.models.presets import PRESETS, preset
from dualscan.nn.block import set_recompute
from dualscan.ops._recompute import Recompute
from dualscan.train.evaluate import total_nll
from dualscan.train.optim import adamw
from dualscan.train.runtime import ComputePrecision
from dualscan.train.step import TrainStep

JOB = "train_step"
RIVAL = "mamba_ssm"
MODELS = ("mamba2_130m", "mamba2_370m", "mamba2_1_3b")
CONTEXTS = (2048, 4096, 8192, 16384, 32768)
VARIANTS = ("plain", "convolution", "activations", "block", "graph", "graph+convolution", "graph+activations")
PARTS = {"plain", "convolution", "activations", "block", "graph", "compile"}
PEAK = 989e12
BF16 = ComputePrecision(torch.bfloat16, "as measured")


def batches(config: ModelConfig, tokens: int, context: int) -> Iterator[list[Batch]]:
    """Endless steps of one micro-batch each, of random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, tokens // context)
    while True:
        drawn = torch.randint(config.vocab_size, (rows, context + 1), generator=generator)
        yield [Batch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous(), None)]


def step_of(model: Any) -> TrainStep:
    """The step of a model with an optimizer of its own."""
    optimizer = adamw(model, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    return TrainStep(model, optimizer, precision=BF16, grad_clip=1.0)


@contextmanager
def variant(model: MambaLM, run: TrainStep, name: str, example: list[Batch]) -> Iterator[None]:
    """Inside, the model trains in that way."""
    parts = set(name.split("+"))
    try:
        again: tuple[Recompute, ...] = ("block", "activations", "convolution")
        set_recompute(model, next((name for name in again if name in parts), "none"))
        if "compile" in parts:
            for block in model.layers:
                block.compile(fullgraph=True)
        if "graph" in parts:
            run.record(example)
        yield
    finally:
        run.forget()
        set_recompute(model, "none")
        for block in model.layers:
            block._compiled_call_impl = None


def timed(run: TrainStep, stream: Iterator[list[Batch]], steps: int) -> float:
    """Seconds a step, of steps that follow one another as in training: the host may be ahead of the GPU."""
    run(next(stream)).values()
    start = time.perf_counter()
    for _ in range(steps):
        reading = run(next(stream))
    reading.values()
    common.synchronize()
    return (time.perf_counter() - start) / steps


def free() -> None:
    """Gives memory back, so that what comes next does not split the blocks of what was."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def words(values: dict[str, Any]) -> str:
    """A record as one line."""
    forms = {
        "call_ms": "{:.1f} ms",
        "tokens_per_s": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "of_product": "{:.1%} of a product",
        "ratio": "{:.2f}x the rival",
        "peak_mib": "{:,.0f} MiB",
        "loss": "loss {:.3f}",
        "path": "{}",
        "failed": "failed: {}",
    }
    return ", ".join(form.format(values[key]) for key, form in forms.items() if key in values)


def first_backward(name: str, tokens: int, context: int, with_rival: bool) -> None:
    """Forward and backward of our model and the rival's, with two layers: all the kernels of a step."""
    for rival in [True, False] if with_rival and rivals.available() else [False]:
        config = preset(name)
        config = replace(config, pattern=config.pattern[:2])
        # Our kernels do not depend on the batch, nor the rival's on the vocabulary, and many processes share the GPU.
        config, size = (replace(config, vocab_size=64), tokens) if rival else (config, min(tokens, 4096))
        with torch.device("cuda"):
            model = MambaLM(config)
        batch = next(batches(config, size, context))[0]
        batch = Batch(batch.tokens.cuda(), batch.targets.cuda(), None)
        for recompute in ("none",) if rival else ("none", "convolution", "activations"):
            set_recompute(model, recompute)
            total_nll(rivals.Model(model) if rival else model, batch, BF16).backward()


class Job:
    """The measurements of one model.

    Args:
        name: of its preset.
        args: device, tokens, steps, rounds.
        product: FLOPs a second of a large matrix product; None on a CPU.
        impls: "dualscan", `RIVAL` or both; both have the same weights.
    """

    def __init__(self, name: str, args: argparse.Namespace, product: float | None, impls: Sequence[str]) -> None:
        self.name, self.config, self.args, self.product = name, preset(name), args, product
        torch.manual_seed(0)
        with torch.device(args.device):
            model = MambaLM(self.config)
        self.in_turns = len(impls) > 1
        self.steps = {impl: step_of(rivals.Model(model) if impl == RIVAL else model) for impl in impls}

    def measure(self, context: int, variants: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """All variants at one length of context: first step and memory of each, then time in turns with the rival.

        The records so far come after every variant. The rival comes second, since its first step takes long.
        """
        stream = batches(self.config, self.args.tokens, context)
        example = next(stream)
        kinds = [*variants] if "dualscan" in self.steps else []
        if RIVAL in self.steps:
            kinds.insert(1, RIVAL)
        runs: dict[str, dict[str, Any]] = {}
        times: dict[str, list[float]] = {}
        for kind in kinds:
            runs[kind] = self._alone(kind, example)
            partner = kinds[0] if kind == RIVAL else RIVAL
            turns = [k for k in dict.fromkeys((kind, partner)) if "loss" in runs.get(k, {}) and "loss" in runs[kind]]
            for _ in range(self.args.rounds):
                for each in turns:
                    times.setdefault(each, []).append(self._turn(each, example, stream))
            records = [self._record(k, context, example[0].tokens.numel(), runs[k], times.get(k)) for k in runs]
            print(f"{records[-1]['shape']} {records[-1]['impl']}: {words(records[-1])}", flush=True)
            if kind == RIVAL and len(turns) == 2:
                print(f"the losses of the same weights differ by {abs(runs[kind]['loss'] - runs[partner]['loss']):.1e}")
            yield records

    def _record(
        self, kind: str, context: int, size: int, alone: dict[str, Any], times: list[float] | None
    ) -> dict[str, Any]:
        values = {**alone, "in_turns": self.in_turns}
        if times:
            seconds = statistics.median(times)
            flops = training_flops_per_sequence(self.config, context, batch=size // context)
            values |= {"call_ms": 1e3 * seconds, "tokens_per_s": size / seconds, "flops": flops}
            if self.product is not None:
                values |= {"mfu": flops / seconds / PEAK, "of_product": flops / seconds / self.product}
                values |= {"peak_flops": PEAK, "product_flops": self.product}
        if kind == RIVAL:
            values["path"] = rivals.path()
        impl = RIVAL if kind == RIVAL else f"dualscan {kind}"
        return common.record(JOB, f"{self.name} {size // context}x{context}", "step", impl, **values)

    def _alone(self, kind: str, example: list[Batch]) -> dict[str, Any]:
        """Loss and peak memory of a variant, without anything beside it; the first step compiles."""
        values: dict[str, Any] = {}
        start = time.perf_counter()
        try:
            with self._ready(kind, example) as run:
                values["loss"] = run(example).values()[0]
                print(f"{kind}: first step {time.perf_counter() - start:.1f} s", flush=True)
                if self.args.device == "cuda":
                    run.forget()
                    free()
                    torch.cuda.reset_peak_memory_stats()
                    if "graph" in kind:
                        run.record(example)
                    run(example).values()
                    values["peak_mib"] = (torch.cuda.max_memory_allocated() - self._others(run)) / 2**20
        except Exception as problem:  # what does not run or fit is a finding; the others go on
            values = {"failed": str(problem).splitlines()[0][:160]}
        free()
        return values

    def _turn(self, kind: str, example: list[Batch], stream: Iterator[list[Batch]]) -> float:
        with self._ready(kind, example) as run:
            seconds = timed(run, stream, self.args.steps)
        free()
        return seconds

    @contextmanager
    def _ready(self, kind: str, example: list[Batch]) -> Iterator[TrainStep]:
        """The step of a variant or of the rival."""
        run = self.steps[RIVAL if kind == RIVAL else "dualscan"]
        if kind == RIVAL:
            yield run
            run.forget()
            return
        with variant(run.model, run, kind, example):
            yield run

    def _others(self, run: TrainStep) -> int:
        """Bytes of the other model with its optimizer."""
        total = 0
        for other in self.steps.values():
            if other is not run:
                total += sum(p.nbytes for p in other.model.parameters())
                total += sum(t.nbytes for s in other.optimizer.state.values() for t in s.values())
        return total


def side_by_side(name: str, choice: str) -> bool:
    """Whether both models are on the GPU together: if they leave two thirds of its memory to what they compute."""
    if choice != "auto":
        return choice == "yes"
    with torch.device("meta"):
        weights = sum(p.nbytes for p in MambaLM(preset(name)).parameters())
    return 2 * 4 * weights <= torch.cuda.get_device_properties(0).total_memory / 3


def with_ratios(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, ours with the ratio to the rival's time at the same shape where that is known."""
    rival = {r["shape"]: r["call_ms"] for r in records if r["impl"] == RIVAL and "call_ms" in r}
    return [
        {**r, "ratio": rival[r["shape"]] / r["call_ms"]} if r["shape"] in rival and "call_ms" in r else r
        for r in records
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the job; with --save writes `results/train_step-<device>.json` after every variant."""
    parser = argparse.ArgumentParser(prog=f"dualscan bench {JOB}", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(PRESETS), help="presets")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS), help="tokens of context")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a step, or one context if that is more")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="ways to train, see above")
    parser.add_argument("--alone", action="store_true", help="leave the rival out")
    parser.add_argument("--in-turns", choices=["auto", "yes", "no"], default="auto", help="with the rival, if it fits")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every variant")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="a CPU only shows that the job runs")
    parser.add_argument("--save", action="store_true", help="write the result file that the pages are made from")
    args = parser.parse_args(argv)
    for name in args.variants:
        if unknown := set(name.split("+")) - PARTS:
            parser.error(f"--variants {name}: unknown {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"the job {JOB} needs an NVIDIA GPU; --device cpu --models tiny --contexts 64 shows that it runs")
        return 1
    product, with_rival, start = None, False, time.perf_counter()
    if args.device == "cuda":
        with_rival = rivals.available() and not args.alone
        context = args.contexts[0]
        compiling = ahead.start(first_backward, [(name, args.tokens, context, with_rival) for name in args.models])
        if with_rival:
            rivals.language_model()
        print("rival:", f"mamba_ssm, {rivals.path()}" if rivals.available() else "mamba_ssm is not installed")
        ahead.wait(compiling)
        product = ceilings()[1]
        print(f"compiled after {time.perf_counter() - start:.0f} s; bfloat16 product {product / 1e12:.0f} TFLOP/s")
    done: list[dict[str, Any]] = []
    for name in args.models:
        groups = [["dualscan"]]
        if with_rival:
            groups = [["dualscan", RIVAL]] if side_by_side(name, args.in_turns) else [["dualscan"], [RIVAL]]
        for impls in groups:
            job = Job(name, args, product, impls)
            for context in args.contexts:
                records: list[dict[str, Any]] = []
                for records in job.measure(context, args.variants):
                    if args.save:
                        common.write(JOB, common.short_device_name(args.device), with_ratios(done + records))
                done += records
            del job
            free()
        for r in with_ratios(done):
            if r["shape"].split()[0] == name:
                print(f"{r['shape']} {r['impl']}: {words(r)}", flush=True)
    return 0
