"""Job `generate`: greedy generation by a 2.7B Mamba-2 on a GPU against transformers' own model, same weights, bfloat16.

A prompt of 512 tokens and 128 new ones, batch 1 and 32: seconds of the whole call and milliseconds a token, in turns.
transformers runs on mamba_ssm's Triton kernels where that package is installed (the record says so), eagerly and, where
it runs, compiled with a static cache. `dualscan bench generate --save`.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.models.lm_cpu import relative_error, rival
from benchmarks.ops.ssd import peak, rival_package
from dualscan.models.lm import MambaLM
from dualscan.models.presets import preset

JOB = "generate"
EAGER, COMPILED = "transformers", "transformers compiled"


def models(name: str, device: str) -> tuple[MambaLM, Any]:
    """This library's model and transformers', random and equal."""
    with torch.device(device):
        ours = MambaLM(preset(name))
        # Untrained weights give nearly equal logits: larger ones keep the runs from one another.
        with torch.no_grad():
            ours.embedding.weight.mul_(10)
        theirs = rival(ours.config, ours)
    for model in (ours, theirs):
        model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval().requires_grad_(False)
    theirs.generation_config.eos_token_id = None
    return ours, theirs


def rival_call(model: Any, prompt: Tensor, new: int, **options: Any) -> Callable[[], Tensor]:
    """Their greedy generation: the new tokens."""

    def run() -> Tensor:
        with torch.inference_mode():
            tokens = model.generate(prompt, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)
        return tokens[:, prompt.shape[1] :]

    return run


def seconds_in_turns(
    calls: dict[str, Callable[[], Tensor]], repeats: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median seconds of every call, after one that is not counted; and what it returned."""
    results = {name: call() for name, call in calls.items()}
    return common.interleaved(calls, repeats=repeats, warmup=0), results


def prompt_error(ours: MambaLM, theirs: Any, prompt: Tensor) -> dict[str, float]:
    """Relative RMS errors of the logits after a prompt against this model in float64."""
    with torch.inference_mode():
        got = {"dualscan": ours(prompt, logits_to_keep=1).logits, EAGER: theirs(prompt, logits_to_keep=1).logits}
        wide = copy.deepcopy(ours).double()
        exact = wide(prompt, logits_to_keep=1).logits
    return {name: relative_error(logits[:, -1], exact[:, -1]) for name, logits in got.items()}


def measure(
    name: str, ours: MambaLM, theirs: Any, batch: int, prompt: int, new: int, repeats: int, compiled: bool
) -> list[dict[str, Any]]:
    """One batch size."""
    device = ours.embedding.weight.device
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(ours.config.vocab_size, (batch, prompt), generator=generator).to(device)
    calls: dict[str, Callable[[], Tensor]] = {
        "dualscan": lambda: ours.generate(tokens, max_tokens=new, temperature=0).tokens,
        EAGER: rival_call(theirs, tokens, new),
    }
    if compiled:
        static = rival_call(theirs, tokens, new, cache_implementation="static")
        try:
            started = time.perf_counter()
            static()
            print(f"{COMPILED}: first call {time.perf_counter() - started:.0f} s", flush=True)
            calls[COMPILED] = static
        except Exception as problem:  # a rival's mode that does not run here is a finding
            print(f"{COMPILED}: {str(problem).strip().splitlines()[0][:160]}", flush=True)
    times, results = seconds_in_turns(calls, repeats)
    # The prompt alone, with one token: the rest is decoding.
    first: dict[str, Callable[[], Tensor]] = {
        "dualscan": lambda: ours.generate(tokens, max_tokens=1, temperature=0).tokens,
        EAGER: rival_call(theirs, tokens, 1),
    }
    prefill, _ = seconds_in_turns(first, repeats)
    error = prompt_error(ours, theirs, tokens[:1])
    records = []
    for impl, seconds in times.items():
        prefilled = prefill.get(impl, prefill[EAGER])
        values: dict[str, Any] = {
            "call_ms": 1e3 * seconds,
            "prefill_ms": 1e3 * prefilled,
            "step_ms": 1e3 * (seconds - prefilled) / (new - 1),
            "ratio": times[EAGER] / seconds,
            "rival_kernels": "mamba_ssm.ops.triton.selective_state_update" in sys.modules,
            "same_tokens": (results[impl] == results[EAGER]).double().mean().item(),
        }
        if impl in error:
            values["error"] = {"logits": error[impl]}
        if device.type == "cuda":
            values["peak_mib"] = peak(calls[impl])
        records.append(common.record(JOB, f"{name} {prompt}+{new}, batch {batch}", "generate", impl, **values))
        columns = ("shape", "impl", "call_ms", "prefill_ms", "step_ms", "ratio", "peak_mib", "same_tokens")
        print(common.table(records[-1:], columns).splitlines()[1], flush=True)
    return records


def main(argv: list[str] | None = None) -> int:
    """Runs the job; with --save writes `results/generate-<device>.json`."""
    parser = argparse.ArgumentParser(prog="dualscan bench generate", description=__doc__)
    parser.add_argument("--model", default="mamba2_2_7b", help="a preset of Mamba-2 layers")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32], help="batch sizes")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate, at least 2")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--compiled", action="store_true", help="also transformers' compiled mode, which takes minutes")
    parser.add_argument("--save", action="store_true", help="write the result file")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        rival_package()
    torch.manual_seed(0)
    ours, theirs = models(args.model, device)
    print("rival's kernels loaded:", "mamba_ssm.ops.triton.selective_state_update" in sys.modules)
    records: list[dict[str, Any]] = []
    for batch in args.batches:
        options = args.prompt, args.new, args.repeats, args.compiled
        records += measure(args.model, ours, theirs, batch, *options)
        if args.save:
            common.write(JOB, common.short_device_name(device), records)
    return 0
