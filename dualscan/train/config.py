"""What a training run is: one frozen configuration, recipes that return complete ones, and their JSON form."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dualscan.models.config import ModelConfig
from dualscan.models.presets import preset
from dualscan.ops._recompute import Recompute, check_recompute
from dualscan.train.schedule import Schedule

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A training run. Written as JSON beside its checkpoints, it is enough to run again.

    Attributes:
        model: sizes and layer pattern of the model.
        data: text file, JSON lines (.gz, .xz, .zst too) or a folder of them; None is the built-in text.
        tokenizer: folder or file of a tokenizer; None is UTF-8 bytes.
        packed: pack whole documents, each with its own state, instead of cutting one stream into rows.
        seqlen: tokens in a row.
        batch_size: rows in a micro-batch.
        accumulation: micro-batches that one optimizer step adds up.
        max_steps: optimizer steps of the run; None leaves it to max_minutes.
        max_minutes: budget of training time (evaluation and saving not counted); the schedule is fitted to it. None
            leaves it to max_steps; with both, whichever ends first.
        lr: peak learning rate.
        min_lr_ratio: where the schedule ends, as a part of the peak.
        schedule: decay of the learning rate after warmup: cosine, wsd (flat, then linear) or constant.
        warmup_steps: steps of linear warmup.
        betas: AdamW's decay rates of the two moments.
        weight_decay: AdamW's decoupled weight decay, on matrices only.
        grad_clip: largest norm of the whole gradient; 0 switches clipping off.
        seed: of the initial weights and of the order of the data.
        dtype: of the matrix products: auto takes bf16 where the device computes it faster, fp32 elsewhere.
        recompute: what the backward computes again instead of keeping it in memory: none, convolution, activations or
            block; see `Mamba2`.
        compile: torch.compile every block; what is left between the operators becomes fewer kernels.
        graph: replay the gradients of a step as a CUDA graph, which spares a small model the cost of its launches; not
            with packed. None does so on a GPU where the model can be recorded.
        device: auto takes a GPU if there is one.
        threads: CPU threads; None leaves PyTorch's choice.
        log_every: steps between metrics records.
        eval_every: steps between evaluations during the run; 0 evaluates at the end only.
        eval_seqlen: tokens in a window of an evaluation; None is seqlen. A state space model may read longer ones than
            it was trained on.
        eval_tokens: validation tokens of an evaluation during the run; the one at the end takes all.
        save_every: steps between checkpoints; 0 saves at the end only.
        keep: newest checkpoints that stay on disk.
        out: the run's folder: checkpoints, metrics, loss curve, configuration.
    """

    model: ModelConfig
    data: Path | None = None
    tokenizer: Path | None = None
    packed: bool = False
    seqlen: int = 512
    batch_size: int = 8
    accumulation: int = 1
    max_steps: int | None = 1000
    max_minutes: float | None = None
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    schedule: Schedule = "cosine"
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0
    dtype: Precision = "auto"
    recompute: Recompute = "none"
    compile: bool = False
    graph: bool | None = None
    device: str = "auto"
    threads: int | None = None
    log_every: int = 5
    eval_every: int = 100
    eval_seqlen: int | None = None
    eval_tokens: int = 32768
    save_every: int = 200
    keep: int = 2
    out: Path = Path("runs/default")

    def __post_init__(self) -> None:
        for name in ("seqlen", "batch_size", "accumulation", "log_every", "eval_tokens", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("eval_every", "save_every", "warmup_steps", "weight_decay", "grad_clip", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more.")
        if self.max_steps is None and self.max_minutes is None:
            raise ValueError("max_steps and max_minutes are both None, so the run would never end; give one of them.")
        for name in ("max_steps", "max_minutes", "eval_seqlen", "threads", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive.")
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio} must lie in [0, 1]; it is a part of the peak lr.")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must lie in [0, 1), such as (0.9, 0.95).")
        check_recompute(self.recompute)
        if self.graph and self.packed:
            raise ValueError(
                "graph=True needs steps of one size, and those of packed=True are not; use one of the two."
            )

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one optimizer step."""
        return self.seqlen * self.batch_size * self.accumulation


def demo() -> TrainConfig:
    """A byte-level Mamba-2 of about a million parameters that two CPU cores train in three minutes."""
    return TrainConfig(
        model=preset("demo"),
        seqlen=256,
        batch_size=8,
        max_steps=None,
        max_minutes=3.0,
        lr=3e-3,
        # Three minutes are several passes over the built-in text: without this much decay the model learns it by heart.
        weight_decay=0.5,
        min_lr_ratio=0.0,
        warmup_steps=20,
        log_every=2,
        eval_every=200,
        eval_seqlen=1024,
        eval_tokens=2**17,  # all of the held-out play
        save_every=200,
        out=Path("runs/demo"),
    )


def recipe(name: str) -> TrainConfig:
    """The configuration that a preset is trained with unless something else is asked for.

    The peak learning rate falls with the width as 0.77 / d_model, at most 3e-3 and at least 2e-4: 1e-3 at d_model 768.

    Args:
        name: a model preset.

    Raises:
        ValueError: an unknown preset.
    """
    if name == "demo":
        return demo()
    model = preset(name)
    return TrainConfig(model=model, lr=max(2e-4, min(3e-3, round(0.77 / model.d_model, 4))), out=Path("runs") / name)


def to_json(config: TrainConfig) -> str:
    """The resolved configuration as JSON text; paths with forward slashes."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values["model"] = config.model.to_dict()
    return json.dumps(values, indent=1, default=Path.as_posix) + "\n"


def from_json(text: str) -> TrainConfig:
    """Reads what `to_json` wrote.

    Raises:
        ValueError: not JSON, not a training configuration, or keys that this version does not know.
    """
    values = json.loads(text)
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ValueError('not a training configuration: expected a JSON object with the key "model".')
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(values) - names):
        raise ValueError(f"unknown training settings {', '.join(unknown)}; another version wrote them.")
    values["model"] = ModelConfig.from_dict(values["model"])
    if "betas" in values:
        values["betas"] = tuple(values["betas"])
    for name in ("data", "tokenizer", "out"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    return TrainConfig(**values)
