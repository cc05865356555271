"""Named tensors on disk, whatever the format: safetensors, PyTorch's pickle read without running code, and shards of
either with an index. Names and shapes are known before any data is read."""

import json
import pickle
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
# In the order in which they are looked for, which is that of transformers.
FORMATS = (SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLE, f"{PICKLE}.index.json")


class Stored(NamedTuple):
    """A tensor on disk.

    Attributes:
        file: the file that holds it.
        shape: its shape.
        read: loads it.
    """

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@contextmanager
def open_tensors(folder: Path, *, device: torch.device | str | None = None) -> Iterator[dict[str, Stored]]:
    """The tensors of a checkpoint's folder by name, readable for as long as the context lasts.

    Args:
        folder: holds `model.safetensors` or `pytorch_model.bin`, or an index of shards of either.
        device: where tensors are read to; None is the CPU.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a file is truncated or something else, wants to run code, or does not agree with its index.
    """
    where = str(device or "cpu")
    with ExitStack() as stack:
        yield _find(folder, where, stack)


def _find(folder: Path, device: str, stack: ExitStack) -> dict[str, Stored]:
    for name in FORMATS:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return _open(path, device, stack)
        found: dict[str, Stored] = {}
        index = _index(path)
        for shard in dict.fromkeys(index.values()):
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder} has no {shard}, which {name} lists; copy the checkpoint again.")
            found |= _open(folder / shard, device, stack)
        for key, shard in index.items():
            if key not in found or found[key].file.name != shard:
                raise ValueError(f"{folder / shard} has no {key}, which {name} promises; copy the checkpoint again.")
        return found
    raise FileNotFoundError(
        f"{folder} has no {SAFETENSORS} (nor {', '.join(FORMATS[1:])}); "
        "give a folder that model.save(), training or transformers wrote."
    )


def _index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an index of shards ({error!r}); copy the checkpoint again.") from error
    if not isinstance(index, dict) or not all(isinstance(s, str) and Path(s).name == s for s in index.values()):
        raise ValueError(f"{path} names something else than files beside it; copy the checkpoint again.")
    return index


def _open(path: Path, device: str, stack: ExitStack) -> dict[str, Stored]:
    return (_open_pickle if path.suffix == ".bin" else _open_safetensors)(path, device, stack)


def _open_safetensors(path: Path, device: str, stack: ExitStack) -> dict[str, Stored]:
    try:
        file = stack.enter_context(safe_open(path, framework="pt", device=device))
        return {
            name: Stored(path, tuple(file.get_slice(name).get_shape()), lambda name=name: file.get_tensor(name))
            for name in file.keys()  # noqa: SIM118 - not a dictionary
        }
    except (SafetensorError, struct.error) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); save or copy it again.") from error


def _open_pickle(path: Path, device: str, stack: ExitStack) -> dict[str, Stored]:
    del stack  # nothing stays open
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it goes on to refuse
            tensors: Any = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} holds more than tensors, which would run code when it is read, or is damaged ({reason}); "
            "convert it to safetensors where you trust it."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is truncated or not a PyTorch checkpoint ({reason}); copy it again.") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} is not a dictionary of tensors; give a model's weights.")
    return {str(name): Stored(path, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}
