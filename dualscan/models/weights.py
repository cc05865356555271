"""A model on disk: `model.safetensors` and `config.json` in a folder, written whole or not at all."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "dualscan"


def save(model: MambaLM, folder: str | Path) -> None:
    """Writes weights and configuration under temporary names and renames them when they are complete.

    Args:
        model: what to save.
        folder: made if it does not exist.

    Raises:
        OSError: the disk is full or the folder cannot be written; files that were there before are untouched.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    text = json.dumps({"format": FORMAT, "model": model.config.to_dict()}, indent=2) + "\n"
    _replace_files(
        folder,
        {
            WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
        },
    )


def _replace_files(folder: Path, writers: dict[str, Callable[[Path], object]]) -> None:
    """Writes every file under a temporary name beside its own, and renames them when all are complete."""
    temporaries = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            write(temporaries[name])
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot save into {folder}: {error}; what was there before is kept.") from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> MambaLM:
    """Reads a model that `save` wrote.

    Args:
        folder: holds `model.safetensors` and `config.json`.
        dtype: casts the matrices; decay rates, norm weights and states stay float32. None keeps the saved dtype.
        device: where the weights go; None is the CPU.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: a truncated file, a checkpoint of another program, or tensors that do not fit the configuration.
    """
    folder = Path(folder)
    config = load_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}; give a folder that model.save() or training wrote.")
    try:
        tensors = load_file(path, device=str(device or "cpu"))
    except (SafetensorError, struct.error) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); save or copy it again.") from error
    with torch.device("meta"):
        model = MambaLM(config)
    expected = {name: t.shape for name, t in model.state_dict().items()}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        examples = "; ".join(
            f"{what} {names[0]!r} and {len(names) - 1} more" if len(names) > 1 else f"{what} {names[0]!r}"
            for what, names in (("misses", missing), ("has the unknown", unknown))
            if names
        )
        raise ValueError(f"{path} does not fit its {CONFIG}: it {examples}; it belongs to another model.")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, {CONFIG} asks for {tuple(shape)}; "
                "the two files belong to different models."
            )
    model.load_state_dict(tensors, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.eval()
    # Also where nothing is asked for: it brings decay rates and norm weights that somebody cast back to float32.
    return model.to(dtype=dtype)


def load_config(folder: str | Path) -> ModelConfig:
    """Reads the configuration of a saved model.

    Args:
        folder: holds `config.json`.

    Returns:
        The `ModelConfig`.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: not JSON, or a checkpoint of another program.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give one that model.save() or training wrote.")
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; give a folder that model.save() or training wrote.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it is truncated or of another program.") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        kind = values.get("model_type") if isinstance(values, dict) else None
        other = f"a transformers checkpoint of type {kind!r}" if kind else "a checkpoint of another program"
        raise ValueError(f"{folder} holds {other}; this version reads folders that model.save() or training wrote.")
    if not isinstance(values.get("model"), dict):
        raise ValueError(f"{path} has no 'model' section; it is damaged, save or copy it again.")
    try:
        return ModelConfig.from_dict(values["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
