"""A model on disk: weights and configuration in a folder, written whole or not at all; read from any known format.

Our own format is `model.safetensors` and a `config.json` that says `"format": "dualscan"`. What was loaded from another
program's checkpoint remembers it as a `Source`, so that it can go back bit for bit.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dualscan.models import families, hub
from dualscan.models.config import ModelConfig
from dualscan.models.families.express import express
from dualscan.models.families.family import Family
from dualscan.models.families.layout import Layout
from dualscan.models.families.settings import Settings
from dualscan.models.lm import MambaLM
from dualscan.models.tensors import FORMATS, PICKLE, SAFETENSORS, Stored, open_tensors

WEIGHTS, CONFIG = SAFETENSORS, "config.json"
FORMAT = "dualscan"
# Buffers that some programs store and every program can compute.
_DERIVED = (".rotary_emb.inv_freq", ".mup_vector")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a model came from: another program's checkpoint.

    Attributes:
        family: its name, one of `dualscan.models.families.NAMES`.
        config: its `config.json`, unchanged.
        dtypes: the dtype that each of its tensors was stored in.
    """

    family: str
    config: Mapping[str, Any]
    dtypes: Mapping[str, torch.dtype]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names: dict[str, list[str]] = {}
        for name, dtype in self.dtypes.items():
            names.setdefault(_dtype_name(dtype), []).append(name)
        return {"family": self.family, "config": dict(self.config), "dtypes": names}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Source":
        """The inverse of `to_dict`."""
        dtypes = {name: getattr(torch, dtype) for dtype, names in values["dtypes"].items() for name in names}
        return cls(family=values["family"], config=values["config"], dtypes=dtypes)


def save(model: MambaLM, folder: str | Path, *, format: str = FORMAT) -> None:
    """Writes weights and configuration under temporary names and renames them when they are complete.

    Args:
        model: what to save.
        folder: made if it does not exist.
        format: "dualscan"; "source", the format of the checkpoint that the model was loaded from; or the name of a
            family (`dualscan.models.families.NAMES`), for programs that read that. A tensor is written in the dtype
            that it was read in if that loses nothing.

    Raises:
        ValueError: an unknown format, or one that cannot express the model; or adapters that were not merged.
        OSError: the disk is full or the folder cannot be written; files that were there before are untouched.
    """
    folder = Path(folder)
    _check_complete(model)
    tensors, values, file = _own(model) if format == FORMAT else _foreign(model, format)
    other = next((name for name in FORMATS if name != file and (folder / name).exists()), None)
    if other is not None and file != WEIGHTS:
        raise ValueError(f"{folder} holds {other} already, which would be read instead of {file}; use another folder.")
    text = json.dumps(values, indent=2) + "\n"
    _replace_files(
        folder,
        {
            file: lambda path: _write(tensors, path, pickled=file == PICKLE),
            CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
        },
    )


def _check_complete(model: MambaLM) -> None:
    """Refuses what `load` could not read: parameters that do not follow from the configuration."""
    with torch.device("meta"):
        expected = MambaLM(model.config).state_dict()
    state = model.state_dict()
    for name in [*state, *expected]:
        if name not in expected or name not in state:
            what = "has the unknown" if name in state else "misses"
            raise ValueError(
                f"this model {what} {name!r} and could not be loaded again; merge adapters before saving "
                "(peft's merge_and_unload), and undo other changes to its modules."
            )
        shape, asked = tuple(state[name].shape), tuple(expected[name].shape)
        if shape != asked:
            raise ValueError(f"{name} has shape {shape}, but model.config asks for {asked}; set it to what there is.")


def _own(model: MambaLM) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    values: dict[str, Any] = {"format": FORMAT, "model": model.config.to_dict()}
    if model.source is not None:
        values["source"] = model.source.to_dict()
    return {name: t.detach() for name, t in model.state_dict().items()}, values, WEIGHTS


def _foreign(model: MambaLM, format: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors, configuration and the weights' file of a model in a family's format."""
    source = model.source
    if format == "source":
        if source is None:
            raise ValueError("this model was not loaded from another program's checkpoint; name the family to save as.")
        format = source.family
    family = families.family(format)
    known = source is not None and source.family == family.name
    values = dict(source.config) if source is not None and known else express(family, model.config)
    layout, state = family.layout(model.config), model.state_dict()
    tensors: dict[str, Tensor] = {}
    for part in layout.parts(list(state)):
        tensors |= part.write([state[name].detach() for name in part.ours])
    if model.lm_head is None and family.head_when_tied:
        head = model.embedding.weight.detach()
        tensors["lm_head.weight"] = head if family.weights == PICKLE else head.clone()  # safetensors shares no memory
    if source is not None and known:
        tensors = {name: _narrowed(t, source.dtypes.get(name, t.dtype)) for name, t in tensors.items()}
    dtype = _dtype_name(_most_common_dtype(tensors))
    for name in ("dtype", "torch_dtype"):
        if values.get(name) not in (None, dtype):
            values[name] = dtype
    if "model_type" in values and not known:
        # Which tokens end or fill a text is the tokenizer's to say; families have numbers of their own for it.
        values |= {"dtype": dtype, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))}
    return tensors, values, family.weights


def _narrowed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype that it was stored in, if that is not wider and loses nothing."""
    if dtype == t.dtype or dtype.itemsize > t.dtype.itemsize:
        return t
    narrow = t.to(dtype)
    return narrow if torch.equal(narrow.to(t.dtype), t) else t


def _most_common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for t in tensors.values():
        sizes[t.dtype] = sizes.get(t.dtype, 0) + t.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(tensors: Mapping[str, Tensor], path: Path, *, pickled: bool) -> None:
    if pickled:
        torch.save(dict(tensors), path)
    else:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def _replace_files(folder: Path, writers: dict[str, Callable[[Path], object]]) -> None:
    """Writes every file under a temporary name beside its own, and renames them when all are complete."""
    folder.mkdir(parents=True, exist_ok=True)
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


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    norm_groups: int | None = None,
) -> MambaLM:
    """Reads a model: one that `save` wrote, or a checkpoint of transformers or mamba_ssm.

    Args:
        folder: holds `config.json` and the weights; or the name of a repository of the Hugging Face hub, such as
            "state-spaces/mamba2-130m", which is fetched into its cache.
        dtype: casts the matrices; decay rates, norm weights and states stay float32. None keeps the saved dtype.
        device: where the weights go; None is the CPU.
        revision: branch, tag or commit of the repository.
        norm_groups: of a "mamba2" checkpoint: groups of channels that the gated norm treats separately, where the
            checkpoint was made by a program that did it otherwise; 1 is what transformers 4 computed.

    Returns:
        The model, in evaluation mode; `.source` says where it came from.

    Raises:
        FileNotFoundError: no such folder or repository, or a file is missing.
        OSError: the hub cannot be reached.
        ValueError: a truncated file, a checkpoint of an unknown family or one that is out of reach, tensors that do
            not fit the configuration, or a device that is not here.
        TypeError: a dtype that is none of PyTorch's for real numbers.
    """
    _check_target(dtype, device)
    folder = hub.find(folder, revision=revision)
    values = _read_config(folder)
    if norm_groups is not None:
        if values.get("model_type") != "mamba2":
            raise ValueError(f"norm_groups={norm_groups} is for transformers' mamba2; {folder} holds something else.")
        values["norm_groups"] = norm_groups
    family, config = _configuration(folder, values)
    with torch.device("meta"):
        model = MambaLM(config)
    layout = Layout(names={}) if family is None else family.layout(config)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    aliases = {} if family is None else family.aliases
    with open_tensors(folder, device=device) as found:
        stored = {aliases.get(name, name): tensor for name, tensor in found.items()}
        _check(stored, layout, shapes, folder, tied=config.tie_embeddings)
        state: dict[str, Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        parts = layout.parts(list(shapes))
        for part in tqdm(parts, desc=f"reading {folder.name}", unit=" tensors", delay=1, disable=None):
            tensors = [stored[name].read() for name in part.theirs]
            dtypes |= {name: t.dtype for name, t in zip(part.theirs, tensors, strict=True)}
            state |= part.read(tensors, shapes)
        _check_tied_head(stored, state, folder, tied=config.tie_embeddings)
    model.load_state_dict(state, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    if family is not None:
        model.source = Source(family=family.name, config=values, dtypes=dtypes)
    elif "source" in values:
        model.source = Source.from_dict(values["source"])
    model.eval()
    # Also where nothing is asked for: it brings decay rates and norm weights that somebody cast back to float32.
    return model.to(dtype=dtype)


def _check_target(dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    """Before anything is fetched or read: the dtype and the device that are asked for."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype!r} must be a floating-point torch.dtype such as torch.bfloat16, or None.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={str(device)!r} cannot be used here ({reason}); None is the CPU.") from error


def _check(
    stored: Mapping[str, Stored], layout: Layout, shapes: Mapping[str, torch.Size], folder: Path, *, tied: bool
) -> None:
    """Compares names and shapes before any data is read."""
    expected: dict[str, tuple[int, ...]] = {}
    for part in layout.parts(list(shapes)):
        expected |= part.shapes(shapes)
    surplus = {name for name in stored.keys() - expected.keys() if not name.endswith(_DERIVED)}
    if tied:
        surplus.discard("lm_head.weight")
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(surplus)
    files = sorted({entry.file.name for entry in stored.values()})
    path = folder / (files[0] if len(files) == 1 else "*" + Path(files[0]).suffix) if files else folder
    if missing or unknown:
        examples = "; ".join(
            f"{what} {names[0]!r} and {len(names) - 1} more" if len(names) > 1 else f"{what} {names[0]!r}"
            for what, names in (("misses", missing), ("has the unknown", unknown))
            if names
        )
        raise ValueError(f"{path} does not fit its {CONFIG}: it {examples}; it belongs to another model.")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{stored[name].file}: {name} has shape {stored[name].shape}, {CONFIG} asks for {shape}; "
                "the two files belong to different models."
            )


def _check_tied_head(stored: Mapping[str, Stored], state: Mapping[str, Tensor], folder: Path, *, tied: bool) -> None:
    if (
        tied
        and "lm_head.weight" in stored
        and not torch.equal(stored["lm_head.weight"].read(), state["embedding.weight"])
    ):
        raise ValueError(
            f"{folder}: {CONFIG} ties the output projection to the embedding, but lm_head.weight in "
            f"{stored['lm_head.weight'].file.name} is another matrix; the two files belong to different models."
        )


def load_config(folder: str | Path) -> ModelConfig:
    """Reads the configuration of a checkpoint, of whatever family.

    Args:
        folder: holds `config.json`; or the name of a repository of the hub, whose weights are not fetched.

    Returns:
        The `ModelConfig`.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: not JSON, or a checkpoint of another program.
    """
    folder = hub.find(folder, weights=False)
    return _configuration(folder, _read_config(folder))[1]


def is_ours(folder: Path) -> bool:
    """Whether a checkpoint's folder is in our own format."""
    return _read_config(folder).get("format") == FORMAT


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; {_advice(folder)}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it is truncated or of another program.") from error
    return values if isinstance(values, dict) else {}


def _advice(folder: Path) -> str:
    """What to do about a folder that is no checkpoint."""
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter of peft: load its model, and give that and the adapter to peft.PeftModel"
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if below:
        return f"a folder in it has one, {below[-1]}"
    return "give a folder that model.save(), training or transformers wrote"


def _configuration(folder: Path, values: Mapping[str, Any]) -> tuple[Family | None, ModelConfig]:
    """The family (None for our own format) and the configuration of a `config.json`."""
    path = folder / CONFIG
    try:
        if values.get("format") != FORMAT:
            family = families.find(values, str(folder))
            return family, family.config(Settings(family.name, values))
        if not isinstance(values.get("model"), dict):
            raise ValueError(f"{path} has no 'model' section; it is damaged, save or copy it again.")
        return None, ModelConfig.from_dict(values["model"])
    except ValueError as error:
        raise ValueError(str(error) if str(folder) in str(error) else f"{path}: {error}") from error
    except TypeError as error:
        raise ValueError(f"{path}: a value has the wrong type: {error}") from error
