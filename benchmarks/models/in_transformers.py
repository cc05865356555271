"""Job `in_transformers`: transformers' own 130M Mamba-2 on the CPU, alone and with `use_in_transformers`; float32.

Prefill of a prompt with all logits, and greedy decoding after it. The module is theirs in both cases. Run it on an idle
machine: `dualscan bench in_transformers`.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import common
from benchmarks.models.lm_cpu import Decoder, prefill, relative_error, rival
from dualscan.interop import use_in_transformers
from dualscan.models.lm import MambaLM
from dualscan.models.presets import preset

JOB = "in_transformers"
ALONE, PATCHED = "transformers", "transformers on dualscan"


def on_ours(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same with our operators in place."""

    def patched() -> Any:
        with use_in_transformers(["mamba2"]):
            return run()

    return patched


def measure(model: nn.Module, vocab_size: int, lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    """Both passes, in turns."""
    records = []

    def add(shape: str, pass_: str, times: dict[str, float], **values: Any) -> None:
        for name, seconds in times.items():
            entry = {"call_ms": 1e3 * seconds, "ratio": times[ALONE] / seconds, **values}
            records.append(common.record(JOB, shape, pass_, name, **entry))
            print(common.table(records[-1:], ("shape", "pass", "impl", "call_ms", "ratio")).splitlines()[1], flush=True)

    for length in lengths:
        tokens = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))

        def run(tokens: torch.Tensor = tokens) -> torch.Tensor:
            return prefill(ALONE, model, tokens)

        difference = relative_error(on_ours(run)(), run().double())
        runs = {ALONE: run, PATCHED: on_ours(run)}
        add(f"130m 1x{length}", "prefill", common.interleaved(runs, repeats=repeats), difference=difference)
    decoders = [Decoder(ALONE, model, tokens) for _ in range(2)]
    runs = {ALONE: decoders[0], PATCHED: on_ours(decoders[1])}
    add("130m 1", "decode", common.interleaved(runs, repeats=16 * repeats, warmup=4))
    return records


def main(argv: list[str] | None = None) -> None:
    """Runs the job and writes `results/in_transformers-cpu.json`."""
    parser = argparse.ArgumentParser(prog="dualscan bench in_transformers", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each measurement")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="prompt lengths")
    parser.add_argument("--save", action="store_true", help="write the result file that the pages are made from")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    config = preset("mamba2_130m")
    torch.manual_seed(0)
    model = rival(config, MambaLM(config))
    records = measure(model, config.vocab_size, args.lengths, args.repeats)
    if args.save:
        print("wrote", common.write(JOB, "cpu", records).name)


if __name__ == "__main__":
    main()
