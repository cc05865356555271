"""`dualscan convert`: a checkpoint from one program's format to another's."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from tyro.conf import Positional

from dualscan.cli._support.arguments import parse
from dualscan.cli._support.checkpoints import find
from dualscan.data.tokenizer import BYTES_FILE, ByteTokenizer
from dualscan.generate.text import load_tokenizer
from dualscan.interop.tokenizer import to_transformers_tokenizer
from dualscan.models import families
from dualscan.models.families.express import fitting
from dualscan.models.lm import MambaLM
from dualscan.models.weights import CONFIG, FORMAT, is_ours, load, save

# What lies beside the weights and goes with them, whatever their format.
_COMPANIONS = (
    *(BYTES_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja"),
    "generation_config.json",
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertArguments:
    """Convert a checkpoint from one program's format to another's, bit for bit, with its tokenizer.

    Attributes:
        model: a folder (a run's, or one that transformers or mamba_ssm reads), or a repository of the hub.
        out: the folder to write; it holds no checkpoint yet.
        to: "dualscan", "source" (what a model of ours was converted from), a family such as mamba2 or mamba_ssm, or
            dualscan_hf, which `DualscanForCausalLM` reads; without it, what is foreign becomes ours and what is ours
            becomes what it was.
        dtype: casts the matrices; without it they stay as they are.
        norm_groups: of a mamba2 checkpoint, groups of channels that the gated norm treats separately: 1 computes what
            transformers 4 did.
        revision: branch, tag or commit of the repository.
    """

    model: Positional[str]
    out: Positional[Path]
    to: str | None = None
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    norm_groups: int | None = None
    revision: str | None = None


def main(argv: Sequence[str]) -> int:
    """Converts, says on stderr what it wrote; returns the exit code."""
    arguments = parse(ConvertArguments, argv, prog="dualscan convert")
    out = arguments.out
    if arguments.to not in (None, FORMAT, "source"):
        families.family(arguments.to)  # a wrong name is told before hours of reading
    if (out / CONFIG).exists():
        raise ValueError(f"{out} holds a checkpoint already; give another folder.")
    folder = find(arguments.model, revision=arguments.revision)
    print(f"reading {folder}", file=sys.stderr)
    dtype = None if arguments.dtype is None else _DTYPES[arguments.dtype]
    model = load(folder, dtype=dtype, norm_groups=arguments.norm_groups)
    before, after = _formats(model, folder, arguments.to)
    save(model, out, format=after)
    _bring_along(folder, out, transformers=after not in (FORMAT, "mamba_ssm"))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {out}: {size / 1e6:.4g}M parameters, {before} to {after}", file=sys.stderr)
    return 0


def _bring_along(folder: Path, out: Path, *, transformers: bool) -> None:
    """Copies what lies beside the weights, for transformers in a form that it reads."""
    with TemporaryDirectory(dir=out, prefix=".beside") as temporary:
        beside = Path(temporary)
        for name in _COMPANIONS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, beside / name)
        if transformers:
            _translate(beside)
        for path in beside.iterdir():
            os.replace(path, out / path.name)


def _translate(folder: Path) -> None:
    """Makes the byte tokenizer one of transformers, and says which id begins, ends and fills texts, if nothing does."""
    try:
        tokenizer = load_tokenizer(folder)
        if isinstance(tokenizer, ByteTokenizer):
            to_transformers_tokenizer(tokenizer).save_pretrained(folder)
            (folder / BYTES_FILE).unlink()
    except FileNotFoundError:
        return
    except ImportError as error:
        print(f"transformers will not find a tokenizer there: {error}", file=sys.stderr)
        return
    settings = folder / "generation_config.json"
    if not settings.is_file():
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_id)
        settings.write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def _formats(model: MambaLM, folder: Path, to: str | None) -> tuple[str, str]:
    """The names of the format that was read and of the one to write."""
    origin = None if model.source is None else model.source.family
    ours = is_ours(folder)
    if to == "source" or (to is None and ours):
        if origin is None:
            can = ", ".join(fitting(model.config))
            raise ValueError(f"{folder} was made here and not converted; say --to what: {can} can express it.")
        return FORMAT, origin
    return FORMAT if ours or origin is None else origin, to or FORMAT
