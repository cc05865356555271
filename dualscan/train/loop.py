"""The training loop: one process, one device; everything it needs to continue goes into its checkpoints."""

import logging
import math
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from dualscan.data._files import write_text
from dualscan.data.corpus import prepare
from dualscan.data.loader import Batch, Loader
from dualscan.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from dualscan.models.lm import MambaLM
from dualscan.models.weights import load as load_model
from dualscan.nn.block import set_recompute
from dualscan.train import checkpoint, metrics, plot
from dualscan.train.checkpoint import TrainState
from dualscan.train.config import TrainConfig, to_json
from dualscan.train.evaluate import Evaluation, evaluate, total_nll
from dualscan.train.optim import adamw, load_state_tensors, state_tensors
from dualscan.train.runtime import StopSignals, bar_interval, pick_device, pick_precision
from dualscan.train.schedule import StepBudget, lr_factor
from dualscan.train.step import Reading, TrainStep

logger = logging.getLogger("dualscan.train")

# Smallest batch of an evaluation, in tokens: no activations are kept, so that it may be larger than in training.
EVALUATION_TOKENS = 4096
BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is no longer finite."""


class _Begun(NamedTuple):
    """A step whose results are on their way."""

    step: int
    tokens: int
    lr: float
    reading: Reading


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
        checkpoint: the folder of its last checkpoint.
        step: optimizer steps done.
        seconds: training time, without evaluation and saving.
        validation: on all held-out text; None when the run was interrupted.
        interrupted: the signal that ended it, or None.
    """

    checkpoint: Path
    step: int
    seconds: float
    validation: Evaluation | None
    interrupted: str | None


def read_tokenizer(path: Path | None) -> Tokenizer:
    """The tokenizer of a configuration: a file or folder, or bytes for None."""
    return ByteTokenizer() if path is None else load_tokenizer(path)


class Trainer:
    """A run in progress.

    Args:
        config: the run.
        resume: continue from the newest checkpoint in `config.out`.
        overwrite: replace a run that `config.out` already holds.
        progress: show a progress bar.

    Raises:
        ValueError: `config.out` holds a run and neither flag is given, there is nothing to resume, the checkpoint does
            not fit the configuration, or the tokenizer has more ids than the model.
    """

    def __init__(
        self, config: TrainConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True
    ) -> None:
        self.config = config
        newest = checkpoint.latest_or_none(config.out)
        if newest is not None and not resume and not overwrite:
            raise ValueError(
                f"{config.out} already holds a run ({newest.name}); continue it with --resume {config.out}, replace it "
                f"with --overwrite, or choose another --out."
            )
        self._progress = progress
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = pick_device(config.device)
        self.precision = pick_precision(config.dtype, self.device)
        self.tokenizer = read_tokenizer(config.tokenizer)
        if self.tokenizer.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} ids, the model's vocab_size is "
                f"{config.model.vocab_size}; use at least as many."
            )
        self.corpus = prepare(config.data, self.tokenizer, cache=config.out.parent / "tokens")
        self.loader = Loader(
            self.corpus.train,
            batch_size=config.batch_size,
            seqlen=config.seqlen,
            packed=config.packed,
            seed=config.seed,
        )
        self.step, self.tokens = 0, 0
        self.budget = StepBudget(max_steps=config.max_steps, max_minutes=config.max_minutes)
        self._saved: Path | None = None
        self._begun: _Begun | None = None
        if resume:
            self._restore(checkpoint.find(config.out))
        else:
            torch.manual_seed(config.seed)
            self.model = MambaLM(config.model).to(self.device)
            self.optimizer = self._new_optimizer()
            if newest is not None:
                _remove_run(config.out)
        set_recompute(self.model, config.recompute)
        if config.compile:
            for block in self.model.layers:
                block.compile(fullgraph=True)
        self._run_step = TrainStep(self.model, self.optimizer, precision=self.precision, grad_clip=config.grad_clip)
        config.out.mkdir(parents=True, exist_ok=True)
        write_text(config.out / checkpoint.CONFIG, to_json(config))

    def _new_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        return adamw(self.model, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)

    def _restore(self, folder: Path) -> None:
        state = checkpoint.load(folder)
        self.model = load_model(folder, device=self.device)
        if self.model.config != self.config.model:
            raise ValueError(f"{folder} holds another model than the configuration; resume without --model options.")
        self.optimizer = self._new_optimizer()
        values = state.values
        try:
            load_state_tensors(self.optimizer, _without_prefix(state.tensors, "optimizer/"))
            self.loader.load_state_dict(values["loader"])
            self.budget.load_state_dict(values["budget"])
            self.step, self.tokens = values["step"], values["tokens"]
            torch.set_rng_state(state.tensors["rng/cpu"])
            if self.device.type == "cuda" and "rng/cuda" in state.tensors:
                torch.cuda.set_rng_state(state.tensors["rng/cuda"], self.device)
        except KeyError as missing:
            raise ValueError(f"{folder} cannot be resumed: it has no {missing}.") from missing
        self._saved = folder

    def run(self) -> TrainResult:
        """Trains to the end, or to the first Ctrl-C or SIGTERM; writes metrics, checkpoints and the loss curve.

        Raises:
            TrainingDivergedError: the loss is not finite; the last checkpoint stays.
            OSError: a checkpoint cannot be written; the one before it stays.
        """
        after_step = self.step if self.step else None
        with metrics.MetricsLog(self.config.out / metrics.FILE, after_step=after_step) as log:
            with StopSignals() as signals, self._bar() as bar:
                self._compile_kernels(bar)
                while not self.budget.done(self.step) and not signals.requested:
                    self._advance(log, bar)
                self._settle(log, bar)
                bar.refresh()
            folder, validation = self.save(), None
            # Everything is on disk now, so that Ctrl-C may end the last evaluation at once.
            if signals.requested is None:
                validation = self.evaluate(progress=self._progress)
                log.write(self.step, tokens=self.tokens, validation_bpb=validation.bits_per_byte, final=True)
        self._draw()
        return TrainResult(folder, self.step, self.budget.seconds, validation, signals.requested)

    def _compile_kernels(self, bar: tqdm) -> None:
        """A small step that changes nothing: kernels are compiled on their first call, which is no training time."""
        bar.set_postfix_str("compiling kernels", True)
        config = self.config
        if config.graph or (config.graph is None and self.device.type == "cuda" and not config.packed):
            tokens = torch.zeros(config.batch_size, config.seqlen, dtype=torch.int64)
            try:
                self._run_step.record([Batch(tokens, tokens, None)] * config.accumulation)
            except ValueError as obstacle:
                if config.graph:
                    raise
                logger.info("steps are not replayed from a CUDA graph: %s", obstacle)
            else:
                return
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        total_nll(self.model, Batch(tokens, tokens, None), self.precision).backward()
        self.optimizer.zero_grad()

    def _advance(self, log: metrics.MetricsLog, bar: tqdm) -> None:
        """One step, and the evaluation and the checkpoint that are due after it."""
        started = time.perf_counter()
        config = self.config
        begun = self._train_step()
        evaluate = bool(config.eval_every) and self.step % config.eval_every == 0
        save = bool(config.save_every) and self.step % config.save_every == 0
        at_once = evaluate or save or self.device.type != "cuda"
        awaited = begun if at_once else self._begun
        if awaited is not None:
            awaited.reading.values()
        self.budget.record(self.step, time.perf_counter() - started)
        self._settle(log, bar)
        self._begun = begun
        if at_once or self.budget.done(self.step):
            self._settle(log, bar)
        if self.budget.done(self.step):
            return
        if evaluate:
            result = self.evaluate(max_tokens=config.eval_tokens)
            log.write(self.step, tokens=self.tokens, validation_bpb=result.bits_per_byte)
            logger.info("step %d: %.3f validation bits per byte", self.step, result.bits_per_byte)
        if save:
            self.save()

    def _settle(self, log: metrics.MetricsLog, bar: tqdm) -> None:
        """Looks at the step that was begun last: on a GPU it ends only after the program has begun the next one.

        Raises:
            TrainingDivergedError: its loss or its gradient is not finite.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return
        loss, grad_norm = begun.reading.values()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingDivergedError(self._diverged(begun, loss, grad_norm))
        bits = self._bits_per_byte(loss)
        bar.total = self.budget.total_steps
        bar.set_postfix_str(f"loss {loss:.3f}, {bits:.3f} bits/byte, {self._speed():,.0f} tokens/s", False)
        bar.update()
        if begun.step % self.config.log_every == 0 or begun.step == 1:
            log.write(
                begun.step,
                tokens=begun.tokens,
                seconds=round(self.budget.seconds, 3),
                loss=loss,
                train_bpb=bits,
                grad_norm=grad_norm,
                lr=begun.lr,
                tokens_per_s=round(self._speed(), 1),
                total_steps=self.budget.total_steps,
            )

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.budget.total_steps,
            initial=self.step,
            desc="training",
            bar_format=BAR_FORMAT,
            mininterval=bar_interval(),
            disable=not self._progress,
        )

    def _train_step(self) -> _Begun:
        """Begins an optimizer step."""
        config = self.config
        lr = config.lr * lr_factor(
            self.step,
            total_steps=self.budget.total_steps,
            warmup_steps=config.warmup_steps,
            min_ratio=config.min_lr_ratio,
            schedule=config.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        reading = self._run_step([next(self.loader) for _ in range(config.accumulation)])
        self.step += 1
        self.tokens += config.tokens_per_step
        return _Begun(self.step, self.tokens, lr, reading)

    def _diverged(self, begun: _Begun, loss: float, grad_norm: float) -> str:
        kept = f"{self._saved} is intact" if self._saved else "no checkpoint was saved before"
        return (
            f"step {begun.step} gives loss {loss} and gradient norm {grad_norm} at learning rate {begun.lr:.3g}; "
            f"{kept}. Try --lr {self.config.lr / 3:.1g} or more --warmup-steps."
        )

    def _speed(self) -> float:
        """Tokens a second over the last steps."""
        per_step = self.budget.seconds_per_step or self.budget.seconds
        return self.config.tokens_per_step / per_step

    def _bits_per_byte(self, nats_per_token: float) -> float:
        """Bits per byte of training text, with the corpus's mean bytes per token."""
        source = self.corpus.train
        return nats_per_token / math.log(2.0) * len(source) / int(source.document_nbytes.sum())

    def evaluate(self, max_tokens: int | None = None, *, progress: bool = False) -> Evaluation:
        """The held-out text's likelihood; all of it for `max_tokens=None`."""
        config = self.config
        seqlen = config.eval_seqlen or config.seqlen
        return evaluate(
            self.model,
            self.corpus.validation,
            self.tokenizer,
            seqlen=seqlen,
            batch_size=max(1, max(config.batch_size * config.seqlen, EVALUATION_TOKENS) // seqlen),
            precision=self.precision,
            packed=config.packed,
            max_tokens=max_tokens,
            progress=progress,
        )

    def save(self) -> Path:
        """Writes a checkpoint of this step, unless it is on disk already."""
        if self._saved is not None and self._saved == checkpoint.step_folder(self.config.out, self.step):
            return self._saved
        tensors = {f"optimizer/{name}": tensor for name, tensor in state_tensors(self.optimizer).items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        values = {
            "tokens": self.tokens,
            "budget": self.budget.state_dict(),
            "loader": self.loader.state_dict(),
        }

        def write_model(folder: Path) -> None:
            self.model.save(folder)
            self.tokenizer.save(folder)

        self._saved = checkpoint.save(
            self.config.out,
            self.step,
            write_model=write_model,
            state=TrainState(tensors, values),
            keep=self.config.keep,
        )
        return self._saved

    def _draw(self) -> None:
        if not plot.available():
            logger.info(plot.MISSING)
            return
        records = metrics.read(self.config.out / metrics.FILE)
        if any("train_bpb" in record for record in records):
            size = sum(parameter.numel() for parameter in self.model.parameters())
            title = f"{self.config.out.name}: {size / 1e6:.2g}M parameters, {self.corpus.name}"
            plot.loss_curve(records, self.config.out / "loss.png", title=title)


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True) -> TrainResult:
    """Runs a configuration to its end; see `Trainer` and `Trainer.run`."""
    return Trainer(config, resume=resume, overwrite=overwrite, progress=progress).run()


def _without_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _remove_run(run: Path) -> None:
    """Deletes the checkpoints and metrics of a run, and nothing else in its folder."""
    for step in checkpoint.saved_steps(run):
        shutil.rmtree(checkpoint.step_folder(run, step))
    for name in (checkpoint.LATEST, metrics.FILE, "loss.png"):
        (run / name).unlink(missing_ok=True)
