"""The kernels of a first call are compiled side by side, in a rehearsal that launches none."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dualscan.ops import _launch, _triton

triton = pytest.importorskip("triton")
# How long a compilation waits for the one beside it.
PATIENCE = 20


class Kernel:
    """A kernel as a launcher sees it, that writes down what happens to it."""

    def __init__(self, name: str, log: list[str], beside: threading.Barrier | None = None) -> None:
        self.fn, self.params = SimpleNamespace(__name__=name), [None]
        self.name, self.log, self.beside = name, log, beside

    def _compile(self) -> SimpleNamespace:
        if self.beside is None:
            raise RuntimeError("does not compile")
        self.beside.wait(PATIENCE)
        self.log.append("compiled")
        return SimpleNamespace(src=self.name, metadata=None)

    def run(self, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        from triton.runtime._async_compile import active_mode

        assert warmup
        mode = active_mode.get()
        assert mode is not None
        mode.submit(self.name, self._compile, lambda kernel: None)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            if self.beside is None:
                raise RuntimeError(f"{self.name} does not compile")
            self.log.append(f"{self.name} launched")

        return launch


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Triton's driver builds here what starts kernels; everything is taken to be on a GPU."""
    from triton.runtime import driver

    built: list[str] = []
    fake = SimpleNamespace(launcher_cls=lambda src, metadata: built.append(src))
    monkeypatch.setattr(type(driver), "active", fake)
    monkeypatch.setattr(_launch, "_may_rehearse", lambda args: True)
    return built


def test_a_first_call_compiles_side_by_side(stubs: list[str]) -> None:
    log: list[str] = []
    beside = threading.Barrier(2)
    one, other = Kernel("one", log, beside), Kernel("other", log, beside)
    launchers = _launch.Launcher(one), _triton.Launcher()

    def launcher(t: Tensor) -> Tensor:
        launchers[0]((1, 1, 1), (t,), (), (), 4)
        launchers[1](other, (1,), (t,))
        return t + 1

    call = _launch.rehearsed(launcher)
    assert torch.equal(call(torch.ones(2)), torch.full((2,), 2.0))
    assert log == ["compiled", "compiled", "one launched", "other launched"]
    assert sorted(stubs) == ["one", "other"]
    assert launchers[1].start is None
    call(torch.ones(2))
    assert log[4:] == ["one launched", "other launched"]


def test_what_does_not_compile_says_so_at_its_launch(stubs: list[str]) -> None:
    kernel = Kernel("one", [])
    call = _launch.rehearsed(lambda t: _triton.Launcher()(kernel, (1,), (t,)))
    with pytest.raises(RuntimeError, match="one does not compile"):
        call(torch.ones(2))


def test_a_rehearsal_inside_one_is_part_of_it(stubs: list[str]) -> None:
    log: list[str] = []
    beside = threading.Barrier(2)
    inner = _launch.rehearsed(lambda t: _triton.Launcher()(Kernel("inner", log, beside), (1,), (t,)))

    def launcher(t: Tensor) -> None:
        _triton.Launcher()(Kernel("outer", log, beside), (1,), (t,))
        inner(t)

    _launch.rehearsed(launcher)(torch.ones(2))
    assert log == ["compiled", "compiled", "outer launched", "inner launched"]


def test_the_backward_of_a_first_call_is_compiled_beside_it(stubs: list[str]) -> None:
    log: list[str] = []
    beside = threading.Barrier(2)
    kernels = [Kernel(name, log, beside) for name in ("forward", "backward")]
    seen = []

    def launcher(t: Tensor) -> tuple[Tensor]:
        _triton.Launcher()(kernels[0], (1,), (t,))
        return (t + 1,)

    def following(results: Any, args: Any) -> None:
        seen.append((results, args))
        _triton.Launcher()(kernels[1], (1,), args)

    call, leaf = _launch.rehearsed(launcher, following), torch.ones(2, requires_grad=True)
    call(leaf)
    assert log == ["compiled", "compiled", "forward launched"]
    assert torch.equal(seen[0][0][0], torch.full((2,), 2.0))
    assert seen[0][1] == (leaf,)
    call(leaf)
    assert len(seen) == 1
    kernels[0].beside = threading.Barrier(1)  # alone, where no gradient is asked for
    call(torch.ones(2))
    assert len(seen) == 1
    assert log[3:] == ["forward launched", "compiled", "forward launched"]


def test_who_rehearses() -> None:
    on_gpu = SimpleNamespace(is_cuda=True, is_floating_point=lambda: True)
    assert not _launch._may_rehearse([torch.ones(2), None, 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "Tensor", (Tensor, SimpleNamespace))
        assert _launch._may_rehearse([None, on_gpu, torch.ones(2)])
        assert not _launch._may_rehearse([on_gpu, torch.ones(2, dtype=torch.int32)])
