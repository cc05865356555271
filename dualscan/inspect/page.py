"""An `Inspection` as one HTML file that needs nothing else: no network, no library, no font.

Matrices are quantised to 8 bits on a square-root scale, row by row, cut to their causal half, deflated and written in
base64. The page's content security policy lets a browser fetch nothing.
"""

import base64
import json
import math
import os
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualscan.data.tokenizer import Tokenizer
from dualscan.inspect.report import VIEWS, Inspection, LayerReport

_PRECISION = (
    "An entry is stored in 8 bits: its sign, and the square root of its size over the largest one of its row in 127 "
    "steps. It is off by at most 0.8 % of that. The colours have a square-root scale too."
)


def write_page(
    path: str | Path, seen: Inspection, tokens: Sequence[str], *, words: dict[int, str], title: str, about: str
) -> int:
    """Writes the page under a temporary name and renames it.

    Args:
        path: the HTML file.
        seen: what `inspect` returned.
        tokens: the text's tokens as the page shows them, from `token_labels`.
        words: labels of the predicted tokens.
        title: what was looked at, such as the checkpoint's name.
        about: one line about the model.

    Returns:
        The size of the file in bytes.

    Raises:
        OSError: it cannot be written; a file that was there before is untouched.
    """
    path = Path(path)
    content = page(seen, tokens, words=words, title=title, about=about).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; give --out a folder that exists.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(content)


def page(seen: Inspection, tokens: Sequence[str], *, words: dict[int, str], title: str, about: str) -> str:
    """The HTML of `write_page`."""
    parts = {name: (files("dualscan.inspect") / "page" / name).read_text("utf-8") for name in ("page.css", "page.js")}
    data = {
        "title": title,
        "about": about,
        "precision": _PRECISION,
        "tokens": list(tokens),
        "special": int(bool(tokens) and tokens[0] == START),
        "predictions": [[words[token], p] for token, p in seen.predictions],
        "target": words[seen.target],
        "views": VIEWS,
        "mapBlock": seen.map_block,
        "meanBlock": seen.mean_block,
        "mapCells": seen.layers[0].maps[VIEWS[0]].shape[-1],
        "meanCells": seen.layers[0].mean[VIEWS[0]].shape[-1],
        "layers": [_layer(layer) for layer in seen.layers],
        "rollout": {view: pack([matrix[None]]) for view, matrix in seen.rollout.items()},
        "attribution": {view: _numbers(values) for view, values in seen.attribution.items()},
        "inputGradient": _numbers(seen.input_gradient),
    }
    # "</script>" inside a token would end the element; JSON may spell "<" by its number.
    parts["data"] = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    html = (files("dualscan.inspect") / "page" / "page.html").read_text("utf-8")
    # The data come last, so that nothing in them is taken for a place to fill.
    for place, part in (("/*css*/", "page.css"), ("/*js*/", "page.js"), ("/*data*/", "data")):
        html = html.replace(place, parts[part], 1)
    return html


START = "⟨start⟩"


def token_labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token writes: its text, `\\xNN` for what is no character alone, `⟨start⟩` between documents.

    Args:
        tokenizer: the model's.
        ids: token ids.

    Returns:
        One string an id.

    Example:
        >>> from dualscan.data.tokenizer import ByteTokenizer
        >>> token_labels(ByteTokenizer(), [256, 110, 195])
        ['⟨start⟩', 'n', '\\\\xc3']
    """
    table = tokenizer.token_bytes()

    def label(token: int) -> str:
        if token == tokenizer.eos_id:
            return START
        if table is None:
            text = tokenizer.decode([token])
        else:
            text = (table[token] if token < len(table) else b"").decode("utf-8", errors="backslashreplace")
        return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)

    return [label(int(token)) for token in ids]


def pack(groups: Sequence[Tensor]) -> dict[str, str]:
    """Causal matrices in the page's form: codes of every matrix in turn, and for every row what code 127 stands for.

    Args:
        groups: tensors `(matrices, cells, cells)`, each of its own number of cells.

    Returns:
        `codes`, int8 triangles row by row, and `scales`, float32 (little-endian), both deflated and in base64.
    """
    triangles, scales = [], []
    for matrices in groups:
        largest = matrices.abs().amax(-1, keepdim=True)
        codes = matrices.abs().div_(largest.clamp(min=torch.finfo(matrices.dtype).tiny)).sqrt_()
        codes = codes.mul_(127).round_().mul_(matrices.sign()).to(torch.int8)
        rows, columns = torch.tril_indices(*codes.shape[-2:])
        triangles.append(codes[:, rows, columns].reshape(-1).cpu().numpy())
        scales.append(largest.reshape(-1).cpu().numpy().astype("<f4"))
    return {"codes": _deflated(np.concatenate(triangles)), "scales": _deflated(np.concatenate(scales))}


def _deflated(values: np.ndarray) -> str:
    # A higher level takes four times as long for 2 % less.
    return base64.b64encode(zlib.compress(values.tobytes(), level=6)).decode()


def _layer(layer: LayerReport) -> dict[str, Any]:
    return {
        "index": layer.index,
        "kind": layer.kind,
        "heads": layer.maps[VIEWS[0]].shape[0],
        "context": {view: _numbers(values) for view, values in layer.context.items()},
        "halfLives": None if layer.half_lives is None else [_numbers(q) for q in layer.half_lives],
        "maps": {view: pack([layer.mean[view][None], layer.maps[view]]) for view in VIEWS},
    }


def _numbers(values: Tensor) -> list[float | None]:
    """Numbers of 5 digits for JSON, which has no infinity."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]
