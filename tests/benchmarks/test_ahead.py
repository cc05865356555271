"""Kernels of a job are compiled side by side, every candidate by one process, and not one is launched."""

from pathlib import Path

import pytest
import torch

from benchmarks import ahead

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


class Hopper:
    """The driver of a GPU that is not there: enough to compile for it."""

    @staticmethod
    def get_current_target():
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0


def call(length: int) -> None:
    """Launches a kernel that tunes itself over four candidates, and a plain one."""
    from triton.runtime import driver

    driver.set_active(Hopper())

    def add(target, number, BLOCK: tl.constexpr):
        place = target + tl.arange(0, BLOCK)
        tl.store(place, tl.load(place) + number)

    plain = triton.jit(add)
    candidates = [triton.Config({"BLOCK": 2**i}, num_warps=1) for i in range(5, 9)]
    tuned = triton.autotune(configs=candidates, key=[])(triton.jit(add))
    target = torch.zeros(length)
    tuned[(1,)](target, 3)
    tuned[(1,)](target, 3)
    plain[(1,)](target, 3, BLOCK=16)
    assert tuned.best_config in candidates
    assert not target.any()


@pytest.mark.slow
def test_every_process_compiles_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST_PROCESSES", 2)
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 2)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ahead.wait(ahead.start(call, [(256,)]))
    assert len(list(tmp_path.rglob("*.cubin"))) == 5


def test_who_fails_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 1)
    ahead.wait(ahead.start(call, [("none",)]))
    assert "1 of 1 processes failed" in capsys.readouterr().out


def test_turns_deal_everything_out_once() -> None:
    things = ["a", "b", "a", "c", "d", "b", "e"]
    players = [ahead.Turns(i, 3) for i in range(3)]
    taken = [[thing for thing in things if player.take(thing)] for player in players]
    assert taken == [["a", "d"], ["b", "e"], ["c"]]


def test_what_a_kernel_is_compiled_for() -> None:
    assert ahead.kind(torch.zeros(3, dtype=torch.bfloat16)) is torch.bfloat16
    assert [ahead.kind(value) for value in (3, 1.5, None, "float32", (1, 2))] == [3, 1.5, None, "float32", "(1, 2)"]
