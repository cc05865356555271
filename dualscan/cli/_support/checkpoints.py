"""Checkpoints that a user names: a run's folder, a checkpoint's, another program's, or a repository of the hub."""

from pathlib import Path

from dualscan.data.tokenizer import ByteTokenizer, HFTokenizer
from dualscan.generate.text import load_tokenizer
from dualscan.models import hub
from dualscan.models.weights import CONFIG
from dualscan.train import checkpoint


def find(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint; a run's folder stands for its newest one.

    Args:
        name: a folder; a string may also name a repository of the hub, which is fetched.
        revision: of the repository.

    Raises:
        ValueError: a folder without a checkpoint, or none at all.
        OSError: the hub cannot be reached.
    """
    folder = hub.find(name, revision=revision) if isinstance(name, str) else name
    return folder if (folder / CONFIG).is_file() else checkpoint.find(folder)


def tokenizer_of(folder: Path, name: str | None) -> ByteTokenizer | HFTokenizer:
    """The tokenizer that a user names (a folder, a file, a repository), or else the checkpoint's own.

    Raises:
        ValueError: neither is there.
    """
    if name is not None:
        return load_tokenizer(name)
    try:
        return load_tokenizer(folder)
    except FileNotFoundError as error:
        raise ValueError(
            f"{error} Give one with --tokenizer: a folder, a file, or a repository of the hub (mamba_ssm's models use "
            "EleutherAI/gpt-neox-20b)."
        ) from error
