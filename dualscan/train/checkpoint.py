"""Atomic training checkpoints: a folder per step, complete or absent, without pickle.

```
run/
  run.json               the resolved run configuration
  latest                 the name of the newest complete checkpoint
  step-000100/           what `model.save` writes (safetensors and JSON), the tokenizer's files, and
    train.safetensors    optimizer state and random-number-generator states
    train.json           step, planned steps, elapsed time and the loader's position
```

A checkpoint is written into a temporary folder beside its final place and renamed when it is complete; the pointer
`latest` is replaced after that. Whatever fails on the way, a full disk included, the previous checkpoint is still
whole and still `latest`.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualscan.data._files import write_text

LATEST = "latest"
CONFIG = "run.json"
_TENSORS, _STATE = "train.safetensors", "train.json"
_FORMAT = 1


class TrainState(NamedTuple):
    """What training needs besides the model: named tensors, and values that JSON holds exactly."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run / f"step-{step:06d}"


def saved_steps(run: Path) -> list[int]:
    """The steps of the complete checkpoints in a run folder, ascending."""
    names = (path.name for path in run.glob("step-*") if path.is_dir())
    return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())


def save(run: Path, step: int, *, write_model: Callable[[Path], None], state: TrainState, keep: int) -> Path:
    """Writes the checkpoint of a step, points `latest` at it, and removes all but the newest `keep`.

    Args:
        run: the run folder; it exists.
        step: optimizer steps done.
        write_model: writes the model and the tokenizer into the folder it is given.
        state: everything else that training needs to continue.
        keep: how many checkpoints stay, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    final = step_folder(run, step)
    temporary = run / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_model(temporary)
        save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, temporary / _TENSORS)
        values = {"format": _FORMAT, "step": step, **state.values}
        (temporary / _STATE).write_text(json.dumps(values, indent=1), encoding="utf-8")
        if final.exists():  # left by a run that was resumed from before this step
            shutil.rmtree(final)
        os.replace(temporary, final)
        write_text(run / LATEST, final.name)
    except (OSError, SafetensorError) as failure:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _explained(run, step, failure) from failure
    for old in [old for old in saved_steps(run) if old < step][: -(keep - 1) or None]:
        shutil.rmtree(step_folder(run, old), ignore_errors=True)
    return final


def _explained(run: Path, step: int, failure: Exception) -> OSError:
    """One line that says what is left; safetensors reports the system's error number only in its text."""
    kept = latest_or_none(run)
    left = f"{kept.name} in {run} is intact" if kept else f"{run} holds no earlier checkpoint"
    number = failure.errno if isinstance(failure, OSError) else None
    if number == errno.ENOSPC or f"os error {errno.ENOSPC})" in str(failure):
        number, reason = errno.ENOSPC, "no space left on the disk; free some or use another --out"
    else:
        reason = str(failure)
    return OSError(number or errno.EIO, f"cannot save step {step}: {reason}. {left}")


def latest_or_none(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None: what `latest` names, else the highest step."""
    pointer = run / LATEST
    if pointer.is_file():
        folder = run / pointer.read_text(encoding="utf-8").strip()
        if (folder / _STATE).is_file():
            return folder
    steps = saved_steps(run)
    return step_folder(run, steps[-1]) if steps else None


def find(folder: Path) -> Path:
    """The checkpoint that a user means by a folder: the folder itself, or a run folder's newest checkpoint.

    Raises:
        ValueError: there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a run folder (such as runs/demo) or a checkpoint in it.")
    if (folder / _STATE).is_file() or (folder / "model.safetensors").is_file():
        return folder
    newest = latest_or_none(folder)
    if newest is None:
        raise ValueError(f"{folder} holds no checkpoint (no step-* folder and no model.safetensors).")
    return newest


def load(checkpoint: Path) -> TrainState:
    """Reads what `save` wrote besides the model.

    Args:
        checkpoint: one step's folder.

    Returns:
        Tensors on the CPU, and the values with the key "step" among them.

    Raises:
        ValueError: the files are missing, truncated, foreign, or of a newer format.
    """
    try:
        values = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / _TENSORS)
    except FileNotFoundError as missing:
        name = Path(missing.filename).name if missing.filename else _TENSORS
        raise ValueError(
            f"{checkpoint} cannot be resumed: {name} is missing; it holds a model at most, no training state."
        ) from missing
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as damage:
        raise ValueError(
            f"{checkpoint} cannot be resumed: its training state is truncated or foreign ({damage}); "
            f"use an earlier step-* folder beside it."
        ) from damage
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{checkpoint} cannot be resumed: format {found!r} in {_STATE}, this version reads {_FORMAT}.")
    return TrainState(tensors, values)
