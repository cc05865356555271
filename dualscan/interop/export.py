"""Prefill and the decoding step as programs that run without this package: `torch.export` and ONNX."""

import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from dualscan.interop.extras import require
from dualscan.interop.plain import decompositions
from dualscan.models.lm import MambaLM


class _Prefill(nn.Module):
    """Tokens to logits and a state that needs no class of this package: a dictionary of tensors."""

    def __init__(self, model: MambaLM, logits_to_keep: int):
        super().__init__()
        self.model, self.logits_to_keep = model, logits_to_keep

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits, state = self.model(tokens, logits_to_keep=self.logits_to_keep)
        return logits, _by_name(state)


class _Step(nn.Module):
    """One token and such a dictionary, to the same; `state` is an example of the model's own."""

    def __init__(self, model: MambaLM, state: Any):
        super().__init__()
        self.model = model
        leaves, self.spec = pytree.tree_flatten_with_path(state)
        self.names = [_name(path) for path, _ in leaves]

    def forward(self, tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        own = pytree.tree_unflatten([state.get(name) for name in self.names], self.spec)
        logits, own = self.model(tokens, state=own)
        return logits, _by_name(own)


def export_prefill(model: MambaLM, *, seqlen: int, batch: int = 1, logits_to_keep: int = 1) -> ExportedProgram:
    """The model over prompts of one length, in ATen operations alone.

    Args:
        model: in the dtype and on the device that the program is for.
        seqlen: tokens of a prompt.
        batch: prompts.
        logits_to_keep: as in `MambaLM.forward`; 0 is all.

    Returns:
        A program from `tokens` `(batch, seqlen)` to the logits and the state, a dictionary of tensors such as
            `"0.ssm"`, that of layer 0.

    Raises:
        ValueError: `seqlen` or `batch` is below 1, or the model has experts.

    Example:
        >>> from dualscan.models.presets import preset
        >>> model = MambaLM(preset("tiny")).eval()
        >>> tokens = torch.randint(256, (1, 20))
        >>> logits, state = export_prefill(model, seqlen=20).module()(tokens)
        >>> torch.allclose(logits, model(tokens).logits[:, -1:], atol=1e-4)
        True
    """
    return _export(_Prefill(model, logits_to_keep), _tokens(model, batch, seqlen))


def export_step(model: MambaLM, *, batch: int = 1) -> ExportedProgram:
    """One token of each of `batch` sequences, in ATen operations alone.

    All shapes are fixed but the length of attention's cache, in a model that has attention.

    Args:
        model: in the dtype and on the device that the program is for.
        batch: sequences.

    Returns:
        A program from `tokens` `(batch, 1)` and the state, as `export_prefill`'s gives it, to the logits and the state.

    Raises:
        ValueError: `batch` is below 1, or the model has experts.
    """
    tokens = _tokens(model, batch, 4)
    with torch.no_grad():
        state = model(tokens).state
    context = Dim("context", min=1)
    # Keys and values, whose third dimension is the sequence.
    shapes = {name: {2: context} if name.endswith((".k", ".v")) else None for name in _by_name(state)}
    step = _Step(model, state)
    return _export(step, tokens[:, :1], _by_name(state), dynamic_shapes=(None, shapes))


def save_onnx(program: ExportedProgram, path: str | Path) -> None:
    """Writes a program as ONNX; the file appears when it is complete.

    The inputs are `tokens` and, for a step, `state.0.conv` and the like; the outputs `logits` and `next.0.conv` and the
    like. States start at zero.

    Args:
        program: of `export_prefill` or `export_step`.
        path: ends in `.onnx`. Weights beyond 2 GiB go into a second file, `path` with `.data` behind it.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        OSError: the file cannot be written.
    """
    require("onnxscript", "onnx")
    path = Path(path)
    signature = program.module_call_graph[0].signature
    assert signature is not None
    inputs = _names(signature.in_spec.child(0), "tokens", "state")
    outputs = _names(signature.out_spec, "logits", "next")
    converted = torch.onnx.export(program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False)
    assert converted is not None
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        converted.save(Path(folder, path.name))
        # The weights first, where they have a file of their own.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))


def _tokens(model: MambaLM, batch: int, seqlen: int) -> Tensor:
    if "moe" in model.config.layer_types:
        raise ValueError(
            f"pattern={model.config.pattern!r} has experts (E), whose work depends on the data; there is "
            "no fixed program. A model without E can be exported."
        )
    for name, value in (("batch", batch), ("seqlen", seqlen)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    return torch.zeros(batch, seqlen, dtype=torch.int64, device=model.embedding.weight.device)


def _export(module: nn.Module, *arguments: Any, dynamic_shapes: Any = None) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        # Of torch's own copies of a program.
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        program = torch.export.export(module.eval(), arguments, dynamic_shapes=dynamic_shapes, strict=False)
        return program.run_decompositions(decompositions())


def _by_name(state: Any) -> dict[str, Tensor]:
    return {_name(path): t for path, t in pytree.tree_leaves_with_path(state) if t is not None}


def _name(path: pytree.KeyPath) -> str:
    """`0.conv` for the field `conv` of the first entry."""
    return ".".join(re.findall(r"\w+", pytree.keystr(path)))


def _names(spec: pytree.TreeSpec, first: str, second: str) -> list[str]:
    """The tensors of a program's inputs or outputs: one by itself, and a dictionary of them."""
    leaves = pytree.tree_leaves_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
    names = [_name(path) for path, _ in leaves]
    return [first, *(f"{second}.{name.partition('.')[2]}" for name in names[1:])]
