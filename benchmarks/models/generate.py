"""Job `generate`: greedy generation by a 2.7B Mamba-2 on a GPU against transformers' own model, same weights, bfloat16.

A prompt of 512 tokens and 128 new ones, batch 1 and 32: seconds of the whole call and milliseconds a token, in turns,
with states in float32 and in bfloat16. transformers runs on mamba_ssm's Triton kernels where that package is installed
(the record says so), eagerly and, with --compiled, compiled with its static cache. `dualscan bench generate --save`.
"""

import argparse
import copy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.models.lm_cpu import relative_error, rival
from benchmarks.ops.ssd import peak, rival_package
from dualscan.generate.engine import prefill
from dualscan.generate.graph import Stepper
from dualscan.models.lm import MambaLM
from dualscan.models.presets import preset

JOB = "generate"
OURS = {"dualscan": None, "dualscan bf16 states": torch.bfloat16}
EAGER, COMPILED = "transformers", "transformers compiled"


class TimeIsUp(BaseException):
    """Not an `Exception`, which a compiler may catch to go on without what failed."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises `TimeIsUp` in what takes longer, as soon as Python gets to run, and again as long as it goes on."""

    def stop(*_: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


def ours_call(model: MambaLM, prompt: Tensor, new: int, state_dtype: torch.dtype | None) -> Callable[[], Tensor]:
    """This library's greedy generation: the new tokens."""
    return lambda: model.generate(prompt, max_tokens=new, temperature=0, state_dtype=state_dtype).tokens


def compiled_call(model: Any, prompt: Tensor, new: int, limit: int) -> Callable[[], Tensor] | str:
    """Their generation with a static cache, which they compile, after its first calls; or why it is none."""
    run = rival_call(model, prompt, new, cache_implementation="static")
    started = time.perf_counter()
    try:
        with time_limit(limit):
            run()
            run()  # the first calls of what is compiled also record its graphs
    except TimeIsUp:
        return f"not compiled within {limit} s"
    except Exception as problem:  # a rival's mode that does not run here is a finding
        return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:200] if str(problem) else ''}"
    print(f"{COMPILED}: first calls {time.perf_counter() - started:.0f} s", flush=True)
    return run


@torch.inference_mode()
def errors(ours: MambaLM, theirs: Any, tokens: Tensor, prompt: int) -> dict[str, dict[str, float]]:
    """Relative RMS errors against this model in float64: of the logits after the prompt, and after all tokens, of which
    those behind the prompt are read one by one."""
    wide = copy.deepcopy(ours).double()
    exact = [wide(tokens[:, :length], logits_to_keep=1).logits[:, -1] for length in (prompt, tokens.shape[1])]
    del wide
    found = {EAGER: {"logits": relative_error(theirs(tokens[:, :prompt], logits_to_keep=1).logits[:, -1], exact[0])}}
    for name, state_dtype in OURS.items():
        logits, state = prefill(ours, tokens[:, :prompt], state_dtype=state_dtype)
        found[name] = {"logits": relative_error(logits, exact[0])}
        step = Stepper(ours, state, tokens.shape[1] - prompt)
        del state
        for place in range(prompt, tokens.shape[1]):
            logits = step(tokens[:, place])
        found[name]["decoded"] = relative_error(logits, exact[1])
    return found


def measure(
    name: str, ours: MambaLM, theirs: Any, batch: int, prompt: int, new: int, repeats: int, limit: int | None
) -> Iterator[dict[str, Any]]:
    """The records of one batch size, each as soon as it is known; with a limit in seconds also their compiled mode."""
    device = ours.embedding.weight.device
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(ours.config.vocab_size, (batch, prompt), generator=generator).to(device)
    shape = f"{name} {prompt}+{new}, batch {batch}"
    calls = {impl: ours_call(ours, tokens, new, dtype) for impl, dtype in OURS.items()}
    calls[EAGER] = rival_call(theirs, tokens, new)
    # The prompt alone, with one token: the rest is decoding.
    first = {impl: ours_call(ours, tokens, 1, dtype) for impl, dtype in OURS.items()}
    first[EAGER] = rival_call(theirs, tokens, 1)
    if limit is not None:
        compiled = compiled_call(theirs, tokens, new, limit)
        if isinstance(compiled, str):
            print(f"{COMPILED}: {compiled}", flush=True)
            yield common.record(JOB, shape, "generate", COMPILED, failed=compiled)
        else:
            calls[COMPILED] = compiled
    times, results = seconds_in_turns(calls, repeats)
    prompts, _ = seconds_in_turns(first, repeats)
    following = torch.randint(ours.config.vocab_size, (1, new), generator=generator).to(device)
    error = errors(ours, theirs, torch.cat([tokens[:1], following], 1), prompt)
    for impl, seconds in times.items():
        prompt_seconds = prompts.get(impl, prompts[EAGER])  # what they compile is the step alone
        values: dict[str, Any] = {
            "call_ms": 1e3 * seconds,
            "prefill_ms": 1e3 * prompt_seconds,
            "step_ms": 1e3 * (seconds - prompt_seconds) / (new - 1),
            "ratio": times[EAGER] / seconds,
            "rival_kernels": "mamba_ssm.ops.triton.selective_state_update" in sys.modules,
            "same_tokens": (results[impl] == results[EAGER]).double().mean().item(),
        }
        if impl in error:
            values["error"] = error[impl]
        if device.type == "cuda":
            values["peak_mib"] = peak(calls[impl])
        entry = common.record(JOB, shape, "generate", impl, **values)
        columns = ("shape", "impl", "call_ms", "prefill_ms", "step_ms", "ratio", "peak_mib", "same_tokens")
        print(common.table([entry], columns).splitlines()[1], error.get(impl, ""), flush=True)
        yield entry


def main(argv: list[str] | None = None) -> int:
    """Runs the job; with --save writes `results/generate-<device>.json`."""
    parser = argparse.ArgumentParser(prog="dualscan bench generate", description=__doc__)
    parser.add_argument("--model", default="mamba2_2_7b", help="a preset of Mamba-2 layers")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32], help="batch sizes")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate, at least 2")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--compiled", action="store_true", help="also transformers' compiled mode, which takes minutes")
    parser.add_argument("--limit", type=int, default=240, help="seconds that compiling may take, for each batch size")
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
        options = args.prompt, args.new, args.repeats, args.limit if args.compiled else None
        for entry in measure(args.model, ours, theirs, batch, *options):
            records.append(entry)
            if args.save:
                common.write(JOB, common.short_device_name(device), records)
    return 0
