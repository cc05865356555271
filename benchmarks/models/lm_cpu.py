"""Job `lm_cpu`: a 130M Mamba-2 on the CPU against `transformers`' Mamba2ForCausalLM (its PyTorch path), same weights.

Prefill with all logits, a training step's forward and backward, and greedy decoding after a 512-token prompt; float32,
and bfloat16 weights and matrix products with float32 decays, states and norms. `--lengths` shows how prefill grows with
the prompt. Run it on an idle machine: `dualscan bench lm_cpu`.
"""

import argparse
import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from dualscan.models.presets import preset

JOB = "lm_cpu"
IMPLS = ("dualscan fp32", "dualscan bf16", "transformers fp32", "transformers bf16")


def rival(config: ModelConfig, model: MambaLM) -> nn.Module:
    """transformers' Mamba-2 with the same weights."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    other = Mamba2ForCausalLM(
        Mamba2Config(
            num_heads=config.nheads,
            head_dim=config.headdim,
            vocab_size=config.padded_vocab_size,
            hidden_size=config.d_model,
            state_size=config.d_state,
            num_hidden_layers=config.n_layers,
            layer_norm_epsilon=config.norm_eps,
            expand=config.expand,
            conv_kernel=config.d_conv,
            n_groups=config.ngroups,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    names = {"embedding.weight": "backbone.embeddings.weight", "norm_f.weight": "backbone.norm_f.weight"}
    weights = {names.get(name, f"backbone.{name}"): t for name, t in model.state_dict().items()}
    weights["lm_head.weight"] = model.embedding.weight
    other.load_state_dict(weights)
    return other.eval()


def build(config: ModelConfig, names: list[str]) -> dict[str, nn.Module]:
    """The models, all with the weights of one."""
    torch.manual_seed(0)
    ours = MambaLM(config).eval()
    makers = {
        "dualscan fp32": lambda: ours,
        "dualscan bf16": lambda: copy.deepcopy(ours).bfloat16(),
        "transformers fp32": lambda: rival(config, ours),
        "transformers bf16": lambda: rival(config, ours).bfloat16(),
    }
    return {name: makers[name]() for name in names}


def prefill(name: str, model: Any, tokens: Tensor) -> Tensor:
    """All logits of a prompt."""
    with torch.inference_mode():
        return model(tokens).logits if "dualscan" in name else model(tokens, use_cache=True).logits


def training(name: str, model: Any, tokens: Tensor) -> None:
    """Forward and backward of the next-token loss."""
    model.zero_grad(set_to_none=True)
    logits = model(tokens[:, :-1]).logits if "dualscan" in name else model(tokens[:, :-1], use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()


class Decoder:
    """Greedy decoding, one token a call, after a prompt."""

    def __init__(self, name: str, model: Any, prompt: Tensor):
        self.model, self.ours = model, "dualscan" in name
        with torch.inference_mode():
            if self.ours:
                logits, self.state = model(prompt)
            else:
                out = model(prompt, use_cache=True)
                logits, self.state = out.logits, out.cache_params
        self.token = logits[:, -1:].argmax(-1)

    def __call__(self) -> None:
        with torch.inference_mode():
            if self.ours:
                logits, self.state = self.model(self.token, state=self.state, reuse_state=True)
            else:
                out = self.model(self.token, cache_params=self.state, use_cache=True)
                logits, self.state = out.logits, out.cache_params
            self.token = logits[:, -1:].argmax(-1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def quality(models: dict[str, nn.Module], config: ModelConfig, tokens: Tensor) -> dict[str, dict[str, float]]:
    """Error of the logits, and difference of the mean log-likelihood in nats, against this model in float64."""
    with torch.inference_mode():
        exact = copy.deepcopy(models["dualscan fp32"]).double()
        oracle = exact(tokens).logits.double()
        del exact
    loss = F.cross_entropy(oracle[0, :-1], tokens[0, 1:]).item()
    results = {}
    for name, model in models.items():
        logits = prefill(name, model, tokens).double()
        results[name] = {
            "error": relative_error(logits, oracle),
            "loss_difference": F.cross_entropy(logits[0, :-1], tokens[0, 1:]).item() - loss,
        }
    return results


def measure(models: dict[str, nn.Module], config: ModelConfig, repeats: int) -> list[dict[str, Any]]:
    """The table's records."""
    generator = torch.Generator().manual_seed(0)
    errors = quality(models, config, torch.randint(config.vocab_size, (1, 512), generator=generator))
    records = []

    def add(shape: str, pass_: str, times: dict[str, float], scale: float = 1.0) -> None:
        for name, seconds in times.items():
            values = {"call_ms": 1e3 * seconds / scale, "ratio": times["transformers fp32"] / seconds}
            records.append(common.record(JOB, shape, pass_, name, **values, **errors[name]))
            print(common.table(records[-1:], ("shape", "pass", "impl", "call_ms", "ratio")).splitlines()[1], flush=True)

    for length in (512, 2048):
        tokens = torch.randint(config.vocab_size, (1, length), generator=generator)
        runs = {name: partial(prefill, name, model, tokens) for name, model in models.items()}
        add(f"130m 1x{length}", "prefill", common.interleaved(runs, repeats=repeats))
    tokens = torch.randint(config.vocab_size, (1, 513), generator=generator)
    runs = {name: partial(training, name, model, tokens) for name, model in models.items()}
    add("130m 1x512", "fwdbwd", common.interleaved(runs, repeats=max(2, repeats // 2)))
    for model in models.values():
        model.zero_grad(set_to_none=True)
    decoders = {name: Decoder(name, model, tokens[:, :512]) for name, model in models.items()}
    add("130m 1", "decode", common.interleaved(decoders, repeats=16 * repeats, warmup=4))
    return records


def measure_lengths(models: dict[str, nn.Module], config: ModelConfig, repeats: int) -> list[dict[str, Any]]:
    """Prefill time of our models at growing lengths, last logits only."""
    records = []
    for length in (512, 1024, 2048, 4096, 8192, 16384):
        tokens = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        for name in ("dualscan fp32", "dualscan bf16"):

            def run(model: Any = models[name], tokens: Tensor = tokens) -> None:
                with torch.inference_mode():
                    model(tokens, logits_to_keep=1)

            seconds = common.interleaved({name: run}, repeats=repeats)[name]
            values = {"call_ms": 1e3 * seconds, "tokens_per_s": length / seconds}
            records.append(common.record(JOB, f"130m 1x{length}", "prefill last", name, **values))
            print(common.table(records[-1:], ("shape", "impl", "call_ms", "tokens_per_s")).splitlines()[1], flush=True)
    return records


def memory(name: str, pass_: str) -> float:
    """Peak resident MiB of one model doing one pass in this process."""
    config = preset("mamba2_130m")
    # The rival copies its weights from ours, so ours is built either way and dropped.
    model = build(config, [name])[name]
    tokens = torch.randint(config.vocab_size, (1, 2048 if pass_ == "prefill" else 513))
    before = common.own_peak_mib()
    (prefill if pass_ == "prefill" else training)(name, model, tokens)
    return max(common.own_peak_mib(), before)


def main(argv: list[str] | None = None) -> None:
    """Runs the job and writes `results/lm_cpu-cpu.json`."""
    parser = argparse.ArgumentParser(prog="dualscan bench lm_cpu", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each measurement")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--save", action="store_true", help="write the result file that README and docs are made from")
    parser.add_argument("--memory-of", nargs=2, metavar=("IMPL", "PASS"), help="print one process's peak memory")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(memory(*args.memory_of))
        return
    config = preset("mamba2_130m")
    models = build(config, list(IMPLS))
    records = measure(models, config, args.repeats) + measure_lengths(models, config, max(1, args.repeats // 2))
    for pass_, shape in (("prefill", "130m 1x2048"), ("fwdbwd", "130m 1x512")):
        for name in IMPLS:
            peak = common.peak_memory_mib("benchmarks.models.lm_cpu", ["--memory-of", name, pass_])
            for entry in records:
                if (entry["shape"], entry["pass"], entry["impl"]) == (shape, pass_, name):
                    entry["peak_mib"] = peak
            print(f"{shape}  {pass_}  {name}  peak {peak:.0f} MiB", flush=True)
    if args.save:
        print("wrote", common.write(JOB, "cpu", records).name)


if __name__ == "__main__":
    main()
