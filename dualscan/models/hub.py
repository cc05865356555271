"""Checkpoints by name: a folder on disk, or a repository of the Hugging Face hub, fetched when it is asked for."""

import re
from functools import partial
from pathlib import Path

# What a checkpoint consists of, for us: configuration and tokenizer, and weights in one of two formats.
_SETTINGS = ["*.json", "tokenizer.model", "*.txt", "*.jinja"]
_SAFETENSORS, _PICKLES = "*.safetensors", "pytorch_model*.bin"
# The same weights once more, in formats that are not read.
_OTHERS = ["consolidated*", "original/*", "*.gguf"]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def find(name: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint.

    Args:
        name: a folder, or the name of a repository such as "state-spaces/mamba2-130m". A folder goes first.
        revision: branch, tag or commit of the repository; None is its main branch.
        weights: False leaves the weights of a repository where they are.

    Returns:
        The folder; for a repository, the one in the cache of `huggingface_hub`.

    Raises:
        FileNotFoundError: neither a folder nor a repository that exists.
        OSError: the hub cannot be reached and the cache does not have it.
        ImportError: `huggingface_hub` is not installed.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise FileNotFoundError(f"{name} is a file; give the folder that it is in.")
    if not isinstance(name, str) or not _REPOSITORY.fullmatch(name):
        raise FileNotFoundError(f"{name} is not a folder; give one that model.save(), training or transformers wrote.")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{name} is no folder here; to fetch it from the hub, pip install 'dualscan[hf]' (huggingface_hub)."
        ) from error
    try:
        fetch = partial(snapshot_download, name, revision=revision, ignore_patterns=_OTHERS)
        found = Path(fetch(allow_patterns=[*_SETTINGS, _SAFETENSORS] if weights else _SETTINGS))
        # Many repositories hold both formats, of which one is enough.
        if weights and not any(found.glob(_SAFETENSORS)):
            found = Path(fetch(allow_patterns=[*_SETTINGS, _PICKLES]))
        return found
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"{name} is neither a folder here nor a repository{at} of the hub that you may read; check the name."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise OSError(
            f"{name} is no folder here, and the hub cannot be reached (no network, or HF_HUB_OFFLINE=1), nor is it in "
            "the cache; download it elsewhere and give the folder."
        ) from error
