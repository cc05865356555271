"""Runs: they learn, stop, fail and continue without a difference."""

import dataclasses
import errno
import json
import shutil
import signal

import pytest
import torch

from dualscan.models.presets import preset
from dualscan.models.weights import load
from dualscan.train import checkpoint, loop, metrics, step
from dualscan.train.config import from_json
from dualscan.train.evaluate import evaluate
from dualscan.train.loop import Trainer, TrainingDivergedError, train
from tests.oracle import CAPS


def losses(config) -> list[tuple[int, float]]:
    records = metrics.read(config.out / metrics.FILE)
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def validations(config) -> list[tuple[int, float]]:
    records = metrics.read(config.out / metrics.FILE)
    return [(record["step"], record["validation_bpb"]) for record in records if "validation_bpb" in record]


def quiet(config, **options):
    return train(config, progress=False, **options)


def test_a_run_learns_and_leaves_everything(config):
    result = quiet(config)
    steps = losses(config)
    assert [step for step, _ in steps] == list(range(1, 21))
    assert steps[-1][1] < 0.8 * steps[0][1]
    assert [step for step, _ in validations(config)] == [10, 20]
    assert result.validation is not None
    assert validations(config)[-1][1] == result.validation.bits_per_byte
    assert (result.step, result.interrupted) == (20, None)
    assert result.checkpoint == config.out / "step-000020"
    assert checkpoint.saved_steps(config.out) == [10, 20]
    names = {path.name for path in config.out.iterdir()}
    assert {"run.json", "metrics.jsonl", "latest", "loss.png"} <= names
    assert load(result.checkpoint).config == config.model


def test_the_written_configuration_runs_again_with_the_same_losses(config, tmp_path):
    quiet(config)
    written = from_json((config.out / "run.json").read_text(encoding="utf-8"))
    assert written == config
    again = dataclasses.replace(written, out=tmp_path / "again")
    quiet(again)
    assert losses(again) == losses(config)


VARIANTS = {
    "rows": {},
    "packed": {"packed": True},
    "accumulation": {"accumulation": 3},
    "packed accumulation": {"packed": True, "accumulation": 2},
    "wsd without clipping": {"schedule": "wsd", "grad_clip": 0.0},
    "bf16": {"dtype": "bf16"},
    "recomputed": {"recompute": "block", "accumulation": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_has_identical_losses(config, tmp_path, monkeypatch, variant):
    """Twenty steps straight against ten, a stop, and ten more in a new process's objects: equal bit for bit."""
    straight = dataclasses.replace(config, **VARIANTS[variant])
    expected = quiet(straight)
    halted = dataclasses.replace(straight, out=tmp_path / "halted")
    stop_after(monkeypatch, 10)
    assert quiet(halted).interrupted == "SIGINT"
    monkeypatch.undo()
    torch.manual_seed(12345)
    result = quiet(halted, resume=True)
    assert losses(halted) == losses(straight)
    assert validations(halted)[-1] == validations(straight)[-1]
    weights, wanted = load(result.checkpoint).state_dict(), load(expected.checkpoint).state_dict()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def stop_after(monkeypatch, step: int) -> None:
    """Sends Ctrl-C in the middle of the step after which the run should end."""
    real = Trainer._train_step

    def interrupted(self):
        if self.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return real(self)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)


def test_records_after_the_checkpoint_are_made_anew(config):
    """Records up to step 20 and a newest checkpoint of step 10, as a crash leaves them."""
    quiet(config)
    expected = losses(config)
    shutil.rmtree(config.out / "step-000020")
    quiet(config, resume=True)
    assert losses(config) == expected


def test_computing_again_changes_no_loss(config, tmp_path):
    quiet(dataclasses.replace(config, max_steps=4))
    for mode in ("activations", "block"):
        other = dataclasses.replace(config, max_steps=4, recompute=mode, out=tmp_path / mode)
        quiet(other)
        assert losses(other) == losses(config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own code
def test_compiled_blocks_give_the_same_losses(config, tmp_path):
    compiled = dataclasses.replace(config, max_steps=4, compile=True, out=tmp_path / "compiled")
    try:
        quiet(compiled)
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("torch.compile needs a C++ compiler for the CPU")
    quiet(dataclasses.replace(config, max_steps=4))
    for (_, actual), (_, expected) in zip(losses(compiled), losses(config), strict=True):
        assert actual == pytest.approx(expected, rel=CAPS[torch.float32][1])


def test_accumulation_is_one_larger_batch(config, tmp_path):
    """The same windows in one batch of four and in two of two: the same first losses to rounding."""
    whole = dataclasses.replace(config, batch_size=4, max_steps=3, out=tmp_path / "whole")
    parts = dataclasses.replace(config, accumulation=2, max_steps=3, out=tmp_path / "parts")
    quiet(whole)
    quiet(parts)
    assert [loss for _, loss in losses(parts)] == pytest.approx(
        [loss for _, loss in losses(whole)], rel=CAPS[torch.float32][0]
    )


def test_interruption_saves_and_says_what_came(config, monkeypatch):
    stop_after(monkeypatch, 7)
    result = quiet(config)
    assert (result.step, result.interrupted, result.validation) == (7, "SIGINT", None)
    assert checkpoint.find(config.out).name == "step-000007"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(config, monkeypatch):
    real = step.total_nll

    def poisoned(model, batch, precision):
        loss = real(model, batch, precision)
        return loss * float("nan") if trainer.step == 12 else loss

    monkeypatch.setattr(step, "total_nll", poisoned)
    trainer = Trainer(config, progress=False)
    with pytest.raises(TrainingDivergedError, match=r"step 13 gives loss nan .*step-000010 is intact\. Try --lr"):
        trainer.run()
    assert checkpoint.load(checkpoint.find(config.out)).values["step"] == 10
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_full_disk_stops_and_keeps_the_checkpoint(config, monkeypatch):
    real = checkpoint.save_file

    def full(tensors, path):
        if "step-000020" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"cannot save step 20: no space left .*step-000010 in .* is intact"):
        quiet(config)
    monkeypatch.undo()
    assert quiet(config, resume=True).step == 20


def test_evaluation_may_read_longer_windows(config):
    trainer = Trainer(dataclasses.replace(config, eval_seqlen=128, max_steps=1), progress=False)
    longer = trainer.evaluate()
    by_hand = evaluate(
        trainer.model,
        trainer.corpus.validation,
        trainer.tokenizer,
        seqlen=128,
        batch_size=loop.EVALUATION_TOKENS // 128,
        precision=trainer.precision,
    )
    assert longer == by_hand
    assert longer.tokens == len(trainer.corpus.validation)


def test_a_time_budget_ends_the_run_at_the_end_of_its_schedule(config):
    result = quiet(dataclasses.replace(config, max_steps=None, max_minutes=1.5 / 60, min_lr_ratio=0.0))
    records = [r for r in metrics.read(config.out / metrics.FILE) if "lr" in r]
    assert result.seconds < 2.5
    assert records[-1]["lr"] < 0.3 * config.lr
    assert records[-1]["total_steps"] == pytest.approx(result.step, rel=0.2)


def test_longer_limits_extend_a_finished_run(config):
    quiet(config)
    result = quiet(dataclasses.replace(config, max_steps=25), resume=True)
    assert result.step == 25
    assert [step for step, _ in losses(config)] == list(range(1, 26))


def test_a_finished_run_has_nothing_left_to_do(config):
    quiet(config)
    before = losses(config)
    assert quiet(config, resume=True).step == 20
    assert losses(config) == before


def test_a_run_is_not_replaced_by_accident(config):
    quiet(dataclasses.replace(config, max_steps=2))
    with pytest.raises(ValueError, match=r"already holds a run \(step-000002\); continue it with --resume"):
        quiet(config)
    (config.out / "notes.txt").write_text("mine", encoding="utf-8")
    quiet(dataclasses.replace(config, max_steps=3), overwrite=True)
    assert checkpoint.saved_steps(config.out) == [3]
    assert (config.out / "notes.txt").exists()


def test_there_must_be_something_to_resume(config):
    with pytest.raises(ValueError, match="is not a folder"):
        quiet(config, resume=True)
    config.out.mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        quiet(config, resume=True)


def test_a_checkpoint_of_another_run_is_recognised(config):
    quiet(dataclasses.replace(config, max_steps=2))
    other = dataclasses.replace(config, model=preset("tiny"))
    with pytest.raises(ValueError, match="holds another model"):
        quiet(other, resume=True)
    with pytest.raises(ValueError, match="seqlen=32, not 16"):
        quiet(dataclasses.replace(config, seqlen=16), resume=True)
    state = config.out / "step-000002" / "train.json"
    values = json.loads(state.read_text(encoding="utf-8"))
    del values["loader"]
    state.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be resumed: it has no 'loader'"):
        quiet(config, resume=True)


def test_the_vocabulary_must_hold_the_tokenizer(config):
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=100))
    with pytest.raises(ValueError, match="the tokenizer has 257 ids, the model's vocab_size is 100"):
        quiet(small)


def test_without_matplotlib_the_run_goes_on(config, monkeypatch, caplog):
    monkeypatch.setattr(loop.plot, "available", lambda: False)
    with caplog.at_level("INFO", logger="dualscan"):
        quiet(dataclasses.replace(config, max_steps=2))
    assert "pip install 'dualscan[plot]'" in caplog.text
    assert not (config.out / "loss.png").exists()


def test_decayed_learning_rate_is_what_the_schedule_says(config):
    quiet(dataclasses.replace(config, min_lr_ratio=0.5))
    rates = [r["lr"] for r in metrics.read(config.out / metrics.FILE) if "lr" in r]
    assert rates[3] == config.lr
    assert rates[-1] == pytest.approx(0.5 * config.lr)


def test_ctrl_c_in_the_last_evaluation_loses_nothing(config, monkeypatch):
    def interrupted(self, max_tokens=None, *, progress=False):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    # A shell's background job, as a test run may be, is started with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            quiet(dataclasses.replace(config, eval_every=0))
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint.find(config.out).name == "step-000020"
