"""Triton's interpreter for the kernel tests of a machine without a GPU."""

import importlib.util

import pytest


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
