"""The update by one kernel against PyTorch's AdamW: in Triton's interpreter, on a GPU as it is."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dualscan.train.optim import load_state_tensors, state_tensors
from dualscan.train.step.update import Update

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# A matrix of several blocks with a part of one at its end, one that fits, and vectors shorter than a vector of memory.
SIZES = [(37, 61), (32, 64), (3,), (24,)]


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from dualscan.train.step import triton_adamw

    monkeypatch.setattr(triton_adamw, "BLOCK", 512)


def problem() -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(3)
    made = [nn.Parameter(torch.randn(size, device=DEVICE)) for size in SIZES]
    named = [(f"p{i}", p) for i, p in enumerate(made)]
    groups = [{"params": named[:2], "weight_decay": 0.1}, {"params": named[2:], "weight_decay": 0.0}]
    return made, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), fused=True)


def give(*lists: list[nn.Parameter]) -> None:
    """The same random gradients to every list."""
    for members in zip(*lists, strict=True):
        gradient = torch.randn_like(members[0])
        for p in members:
            p.grad = gradient.clone()


def number(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def test_is_what_adamw_does() -> None:
    mine, optimizer = problem()
    exact = [nn.Parameter(p.detach().double()) for p in mine]
    other = torch.optim.AdamW(
        [{"params": exact[:2], "weight_decay": 0.1}, {"params": exact[2:], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.999),
    )  # fmt: skip
    update = Update(optimizer)
    for i in range(6):
        give(mine)
        for p, q in zip(exact, mine, strict=True):
            assert q.grad is not None
            p.grad = q.grad.double() / 4
        for group in (*optimizer.param_groups, *other.param_groups):
            group["lr"] = 1e-2 / (i + 1)
        other.step()
        if i:
            before = [p._version for p in mine]
            assert update(number(4.0), number(0.0))
            assert all(p._version > version for p, version in zip(mine, before, strict=True))
        else:  # the optimizer itself makes its states
            assert not update(number(4.0), number(0.0))
            optimizer.grad_scale = number(4.0)  # pyrefly: ignore[missing-attribute]
            optimizer.found_inf = number(0.0)  # pyrefly: ignore[missing-attribute]
            optimizer.step()
        for p, q in zip(mine, exact, strict=True):
            torch.testing.assert_close(p.double(), q, rtol=1e-6, atol=1e-6)
            for name, value in optimizer.state[p].items():
                torch.testing.assert_close(value.double(), other.state[q][name].double(), rtol=1e-5, atol=1e-7)


def test_skips_what_is_not_finite() -> None:
    mine, optimizer = problem()
    update = Update(optimizer)
    give(mine)
    optimizer.step()
    before = copy.deepcopy((mine, state_tensors(optimizer)))
    give(mine)
    assert update(number(float("nan")), number(1.0))
    assert all(torch.equal(p, q) for p, q in zip(mine, before[0], strict=True))
    assert all(torch.equal(t, before[1][name]) for name, t in state_tensors(optimizer).items())


def test_goes_on_from_loaded_states_and_with_parameters_left_out() -> None:
    mine, optimizer = problem()
    theirs, other = problem()
    update = Update(optimizer)
    give(mine, theirs)
    other.step()
    load_state_tensors(optimizer, state_tensors(other))
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.copy_(q)
    for _ in range(2):
        give(mine, theirs)
        mine[1].grad = theirs[1].grad = None
        other.step()
        assert update(number(1.0), number(0.0))
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_what_it_leaves_to_pytorch() -> None:
    mine, optimizer = problem()
    assert Update.runs(optimizer, torch.device(DEVICE)) == CUDA
    for option in ("amsgrad", "maximize"):
        assert not Update.runs(torch.optim.AdamW(mine, **{option: True}), torch.device(DEVICE))
    assert not Update.runs(torch.optim.SGD(mine), torch.device(DEVICE))
    update = Update(optimizer)
    give(mine)
    optimizer.step()
    give(mine)
    mine[0].grad = torch.randn(61, 37, device=DEVICE).t()
    assert not update(number(1.0), number(0.0))
