"""One step: what plain PyTorch does in more lines, and nothing where the numbers are not finite."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dualscan.data.loader import Batch
from dualscan.models.lm import MambaLM
from dualscan.models.presets import preset
from dualscan.train import step
from dualscan.train.optim import adamw
from dualscan.train.runtime import ComputePrecision
from dualscan.train.step import TrainStep
from dualscan.train.step.update import Update

FP32, BF16 = ComputePrecision(torch.float32, "a test"), ComputePrecision(torch.bfloat16, "a test")


def model() -> MambaLM:
    torch.manual_seed(1)
    return MambaLM(preset("tiny", pattern="M", chunk_size=8))


def batches(count: int = 2) -> list[Batch]:
    made = []
    for i in range(count):
        tokens = torch.randint(256, (2, 17))
        targets = tokens[:, 1:].clone()
        targets[0, : 5 * i] = -100
        made.append(Batch(tokens[:, :-1], targets, None))
    return made


def optimizer(of: MambaLM, **options: Any) -> torch.optim.Optimizer:
    made = adamw(of, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for group in made.param_groups:
        group.update(options)
    return made


def by_hand(of: MambaLM, with_: torch.optim.Optimizer, given: list[Batch], grad_clip: float) -> tuple[float, float]:
    logits = [of(batch.tokens).logits.flatten(0, 1) for batch in given]
    loss = F.cross_entropy(torch.cat(logits), torch.cat([batch.targets.flatten() for batch in given]))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(of.parameters(), grad_clip or math.inf)
    with_.step()
    with_.zero_grad()
    return loss.item(), norm.item()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("grad_clip", [0.0, 0.1, 100.0])
def test_is_what_pytorch_does_by_hand(grad_clip: float, fused: bool) -> None:
    ours = model()
    theirs = copy.deepcopy(ours)
    run = TrainStep(ours, optimizer(ours, fused=fused), precision=FP32, grad_clip=grad_clip)
    other = optimizer(theirs, fused=False)
    for _ in range(3):
        given = batches()
        expected = by_hand(theirs, other, given, grad_clip)
        assert run(given).values() == pytest.approx(expected, rel=1e-5)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5, msg=name)
        assert p.grad is None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(where: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = model()
    run = TrainStep(ours, optimizer(ours, fused=fused), precision=FP32, grad_clip=1.0)
    run(batches())
    before = copy.deepcopy(ours.state_dict())
    moments = copy.deepcopy(run.optimizer.state_dict()["state"])
    poison = torch.tensor(math.inf)
    hook = ours.norm_f.weight.register_hook(lambda g: g * poison)
    if where == "loss":
        poison.fill_(1.0)
        real = step.total_nll
        monkeypatch.setattr(step, "total_nll", lambda *given: real(*given) + torch.nan)
    loss, norm = run(batches()).values()
    assert math.isfinite(loss) == (where == "gradient")
    assert math.isfinite(norm) == (where == "loss")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), name
    for key, value in run.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value[name], moments[key][name]) for name in value)
    hook.remove()
    monkeypatch.undo()
    loss, norm = run(batches()).values()
    assert math.isfinite(loss + norm)
    assert not torch.equal(ours.norm_f.weight, before["norm_f.weight"])


def test_a_graph_needs_a_gpu() -> None:
    ours = model()
    run = TrainStep(ours, optimizer(ours), precision=FP32)
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device, not cpu"):
        run.record(batches())


@pytest.mark.cuda
def test_a_graph_gives_the_same_bits() -> None:
    ours = model().cuda()
    theirs = copy.deepcopy(ours)
    run, plain = (TrainStep(m, optimizer(m), precision=FP32, grad_clip=1.0) for m in (ours, theirs))
    run.record(batches())
    for _ in range(4):
        given = batches()
        assert run(given).values() == plain(given).values()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.cuda
def test_a_graph_refuses_what_has_no_fixed_size() -> None:
    ours = model().cuda()
    run = TrainStep(ours, optimizer(ours), precision=FP32)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    packed = Batch(tokens, tokens, torch.tensor([0, 3, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match="packed batches have not"):
        run.record([packed])


@pytest.mark.cuda
def test_a_step_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch itself says where a program waits for the GPU."""
    ours = model().cuda()
    run = TrainStep(ours, optimizer(ours), precision=FP32, grad_clip=1.0)
    run(batches()).values()
    torch.cuda.set_sync_debug_mode("error")
    try:
        reading = run(batches())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loss, norm = reading.values()
    assert math.isfinite(loss + norm)


def test_reading_keeps_its_numbers() -> None:
    """A later step does not change what an earlier one said."""
    ours = model()
    run = TrainStep(ours, optimizer(ours), precision=FP32)
    first = run(batches())
    kept = first.values()
    run(batches())
    assert first.values() == kept


def test_the_kernel_trains_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping, decay and the division by the number of targets; what is not finite; weights that change meanwhile."""
    pytest.importorskip("triton")
    there = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = model().to(there)
    theirs = copy.deepcopy(ours)
    run, plain = (TrainStep(m, optimizer(m), precision=FP32, grad_clip=0.5) for m in (ours, theirs))
    used = []
    real = Update.__call__
    monkeypatch.setattr(Update, "__call__", lambda *given: used.append(real(*given)) or used[-1])
    for i in range(5):
        given = batches()
        monkeypatch.setattr(Update, "runs", staticmethod(lambda *_: True))
        mine = run(given).values()
        monkeypatch.setattr(Update, "runs", staticmethod(lambda *_: False))
        assert mine == pytest.approx(plain(given).values(), rel=1e-5)
        if i == 2:
            with torch.no_grad():
                for m in (ours, theirs):
                    m.embedding.weight.mul_(1.1)
    assert used == [False, True, True, True, True]  # the first step makes the optimizer's states
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5, msg=name)
        assert p.grad is None
