"""Atomic text files and optional libraries: the two things that several data modules need from outside."""

import importlib
import os
from pathlib import Path
from types import ModuleType


def write_text(path: Path, text: str) -> None:
    """Writes `path` as UTF-8 under a temporary name and renames it, so that a failure leaves the old file."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require(library: str, purpose: str) -> ModuleType:
    """Imports a library of the `data` extra.

    Raises:
        ImportError: it is not installed; the message names the install command.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the {library} library; pip install dualscan[data]") from error
