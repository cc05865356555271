"""Shared fixtures: a fixed seed, NaN-poisoned memory, one thread a process, and slow tests only on request."""

import os

# Before torch is imported, and inherited by what the tests start: several test processes share the cores, and every
# machine adds in the same order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is fetched while testing.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Before any kernel module is imported: without a GPU, kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# PyTorch collects its factory functions at the first use of a device context; if that came after `_poison`, layers on
# the meta device would take real memory.
with torch.device("meta"):
    torch.empty(0)

_REAL_EMPTY = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is slow here unless it is asked for by `-m` or RUN_SLOW=1, and `cuda` where there is no GPU."""
    run_slow = bool(config.getoption("-m")) or os.environ.get("RUN_SLOW") == "1"
    slow = {"slow"} if torch.cuda.is_available() else {"slow", "slow_interpreted"}
    for item in items:
        if not run_slow and any(mark.name in slow for mark in item.iter_markers()):
            item.add_marker(pytest.mark.skip(reason="slow: RUN_SLOW=1 runs it"))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that an element nobody wrote cannot pass for a zero."""

    def poisoned(name: str):
        real = _REAL_EMPTY[name]

        def allocate(*args, **kwargs):
            out = real(*args, **kwargs)
            if out.is_floating_point() and out.device.type != "meta" and type(out) is torch.Tensor:
                out.detach().fill_(float("nan"))  # detached: PyTorch's own checkpoints make a leaf this way
            return out

        return allocate

    for name in _REAL_EMPTY:
        monkeypatch.setattr(torch, name, poisoned(name))
