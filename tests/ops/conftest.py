"""Triton's interpreter, and the emulator of Gluon, for the kernel tests of a machine without a GPU."""

import importlib.util
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What launchers do is not remembered from one test to the next, which may have replaced a part of it."""
    from dualscan.ops._launch import replay

    monkeypatch.setattr(replay, "_PROGRAMS", {})


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips without Triton. With numpy >= 2.4 an array of one element is no number: the interpreter's loops need it."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from triton.runtime import interpreter  # pyrefly: ignore[missing-import]

    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor: type, scope: "interpreter._LangPatchScope") -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_index)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches go to the emulator of Gluon, and to the kernels for Hopper GPUs; returns the names of those launched."""
    pytest.importorskip("triton")
    from dualscan.ops import _triton

    if not _triton.interpreted():
        pytest.skip("there is a GPU: what is launched is compiled")
    from dualscan.ops.ssd import configs, triton_scan
    from tests import gluon

    launched: list[str] = []

    def launch(_: Any, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
        launched.append(kernel.fn.__name__)
        gluon.run(kernel, grid, arguments, **constants)

    monkeypatch.setattr(_triton.Launcher, "__call__", launch)
    monkeypatch.setattr(configs, "on_hopper", lambda _: True)
    monkeypatch.setattr(triton_scan, "_FAMILIES", {})
    return launched
