"""Everything that a page shows of a model at one text, computed layer by layer and kept small."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dualscan.inspect.layer import LayerView
from dualscan.inspect.memory import effective_context, spectrum
from dualscan.inspect.relevance import add_layer, fuse, mean_mixing
from dualscan.inspect.trace import logit_gradients, trace
from dualscan.inspect.views import look
from dualscan.models.lm import MambaLM

VIEWS = ("operator", "unified")
# Bytes of one temporary of a block of heads.
_BLOCK_BYTES = 8 * 2**20
# Matrices of `seqlen²` float32 elements alive at once: a head's temporaries, the taps of its convolution, sums over
# heads and layers. Measured at 2500 tokens, where one head is computed at a time: 36.
_ALIVE = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """One layer at one text.

    Attributes:
        index: place in the model, from 0.
        kind: "mamba2", "attention", ...
        maps: view -> `(heads, cells, cells)`, the matrices of the heads, a block of tokens a cell (`pool`).
        mean: view -> `(cells, cells)`, the mean of |matrix| over the heads.
        context: view -> `(heads,)`, tokens that hold 90 % of a row, the mean over the text's second half.
        half_lives: `(heads, 5)`, quantiles 5, 25, 50, 75 and 95 % of the decay's half-life in tokens; None without a
            state.
    """

    index: int
    kind: str
    maps: dict[str, Tensor]
    mean: dict[str, Tensor]
    context: dict[str, Tensor]
    half_lives: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """A model at one text.

    Attributes:
        tokens: `(seqlen,)`.
        target: the token whose logit after the last one is explained.
        predictions: the most likely next tokens and their probabilities.
        layers: one entry a layer that mixes tokens.
        map_block, mean_block: tokens a cell of the heads' maps, and of `mean` and `rollout`.
        rollout: view -> `(cells, cells)`, relevance of the columns' tokens for the rows'.
        attribution: view -> `(seqlen,)`, relevance of every token for the prediction (Mamba-attribution).
        input_gradient: `(seqlen,)`, embedding times its gradient.
    """

    tokens: Tensor
    target: int
    predictions: list[tuple[int, float]]
    layers: list[LayerReport] = field(repr=False)
    map_block: int
    mean_block: int
    rollout: dict[str, Tensor] = field(repr=False)
    attribution: dict[str, Tensor] = field(repr=False)
    input_gradient: Tensor = field(repr=False)


@torch.no_grad()
def inspect(
    model: MambaLM,
    tokens: Tensor,
    *,
    target: int | None = None,
    resolution: int = 128,
    mean_resolution: int = 512,
    memory: float = 2.0,
    progress: bool = False,
) -> Inspection:
    """Looks at every layer of a model at one text, and at what its prediction after the last token rests on.

    Args:
        model: the language model.
        tokens: `(seqlen,)` int64, at least one.
        target: the token whose logit is explained; None takes the most likely one.
        resolution: cells a side of the heads' maps, at most; a longer text has several tokens a cell.
        mean_resolution: the same for the means over heads and the rollout.
        memory: GiB that the matrices may take, beside the model.
        progress: shows a progress bar.

    Returns:
        An `Inspection`.

    Raises:
        ValueError: no tokens, tokens that the model does not have, a model without Mamba layers, or a text whose
            matrices do not fit into `memory`.

    Example:
        >>> from dualscan.models.presets import preset
        >>> seen = inspect(MambaLM(preset("tiny")).double(), torch.arange(6))
        >>> seen.layers[0].maps["operator"].shape, seen.attribution["unified"].shape
        (torch.Size([4, 6, 6]), torch.Size([6]))

    Note:
        O(seqlen²) work and memory a head; some heads at a time. The gradients take a second forward pass, a layer at a
        time.
    """
    _check(model, tokens, target)
    if min(resolution, mean_resolution) < 1:
        raise ValueError(f"resolution={min(resolution, mean_resolution)} must be at least 1 cell.")
    seqlen = tokens.shape[0]
    map_block, mean_block = -(-seqlen // resolution), -(-seqlen // mean_resolution)
    _check_memory(model, seqlen, -(-seqlen // map_block), memory)
    stream, inputs = trace(model, tokens[None])
    embedding = stream[0][0]
    predictions = _predictions(model, stream[-1][0, -1])
    target = predictions[0][0] if target is None else target
    gradients = list(logit_gradients(model, stream, position=-1, target=target))[::-1]
    layers = []
    joint: dict[str, Tensor | None] = dict.fromkeys(VIEWS)
    relevance: dict[str, Tensor | None] = dict.fromkeys(VIEWS)
    bar = tqdm(model.layers, desc="layers", unit="", disable=not progress)
    for i, block in enumerate(bar):
        view = look(block.get_submodule("mixer"), inputs[i])
        if view is None:
            continue
        sums = {name: _sum_heads(view, name, map_block) for name in VIEWS}
        for name, (mean, positive, largest) in ((name, found.totals) for name, found in sums.items()):
            joint[name] = add_layer(joint[name], mean_mixing(mean[None]))
            relevance[name] = add_layer(relevance[name], fuse(positive, largest, gradients[i + 1][0]))
        layers.append(
            LayerReport(
                index=i,
                kind=model.config.layer_types[i],
                maps={name: found.maps for name, found in sums.items()},
                mean={name: pool(found.totals[0], mean_block) for name, found in sums.items()},
                context={name: found.context for name, found in sums.items()},
                half_lives=_half_lives(view),
            )
        )
    return Inspection(
        tokens=tokens,
        target=target,
        predictions=predictions,
        layers=layers,
        map_block=map_block,
        mean_block=mean_block,
        rollout={name: pool(matrix, mean_block) for name, matrix in joint.items() if matrix is not None},
        attribution={name: matrix[-1] for name, matrix in relevance.items() if matrix is not None},
        input_gradient=embedding.mul(gradients[0][0]).sum(-1),
    )


def pool(matrix: Tensor, block: int) -> Tensor:
    """The entry of largest magnitude in every `block` x `block` cell: what is sharp stays visible.

    Args:
        matrix: `(..., seqlen, seqlen)`.
        block: tokens a cell.

    Returns:
        `(..., cells, cells)` with `cells = ceil(seqlen / block)`.
    """
    if block == 1:
        return matrix.clone()
    cells = -(-matrix.shape[-1] // block)
    missing = cells * block - matrix.shape[-1]
    tiles = F.pad(matrix, (0, missing, 0, missing)).unflatten(-1, (cells, block)).unflatten(-3, (cells, block))
    high, low = tiles.amax((-3, -1)), tiles.amin((-3, -1))
    return torch.where(high >= -low, high, low)


class _HeadSums(NamedTuple):
    """What is kept of a layer's matrices: pooled maps, effective context, and (mean of |M|, mean and maximum of M+)."""

    maps: Tensor
    context: Tensor
    totals: tuple[Tensor, Tensor, Tensor]


def _sum_heads(view: LayerView, name: str, map_block: int) -> _HeadSums:
    seqlen = view.inputs.shape[1]
    at_once = max(1, _BLOCK_BYTES // (seqlen**2 * view.inputs.element_size()))
    mean = positive = view.inputs.new_zeros(seqlen, seqlen)
    largest, maps, context = mean.new_zeros(()), [], []
    for start in range(0, view.nheads, at_once):
        matrices = getattr(view, name)(slice(start, min(start + at_once, view.nheads)))[0]
        maps.append(pool(matrices, map_block).float())
        context.append(effective_context(matrices)[:, seqlen // 2 :].double().mean(-1))
        mean = mean + matrices.abs().sum(0) / view.nheads
        matrices.clamp_(min=0)
        positive, largest = positive + matrices.sum(0) / view.nheads, torch.maximum(largest, matrices.amax())
    return _HeadSums(torch.cat(maps), torch.cat(context), (mean, positive, largest))


def _half_lives(view: LayerView) -> Tensor | None:
    heads = (view.log_decay(slice(h, h + 1)) for h in range(view.nheads))
    decays = [spectrum(decay) for decay in heads if decay is not None]
    return torch.cat(decays) if decays else None


def _predictions(model: MambaLM, last: Tensor, count: int = 5) -> list[tuple[int, float]]:
    """The most likely next tokens and their probabilities."""
    logits = F.linear(model._finish(last), model.output_weight)[: model.config.vocab_size].float()
    top = logits.softmax(-1).topk(min(count, logits.shape[-1]))
    return [(int(token), float(p)) for p, token in zip(top.values, top.indices, strict=True)]


def _check(model: MambaLM, tokens: Tensor, target: int | None) -> None:
    if tokens.ndim != 1 or not tokens.shape[0]:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected (seqlen,) with at least one token.")
    config = model.config
    asked = tokens.tolist() if target is None else [*tokens.tolist(), target]
    wrong = [token for token in asked if not 0 <= token < config.vocab_size]
    if wrong:
        raise ValueError(f"token {wrong[0]} is not in 0 to {config.vocab_size - 1}; use this model's own tokenizer.")
    if not {"mamba", "mamba2", "parallel", "shared"} & set(config.layer_types):
        raise ValueError(
            f"the model has no Mamba layers (pattern {config.pattern!r}); inspect looks at their matrices."
        )


def _check_memory(model: MambaLM, seqlen: int, cells: int, memory: float) -> None:
    config = model.config
    heads = config.n_layers * max(config.nheads, config.attention_heads)
    needed = 4 * (_ALIVE * seqlen**2 + len(VIEWS) * heads * cells**2) / 2**30
    if needed > memory:
        raise ValueError(
            f"the matrices of {seqlen} tokens at {cells} cells a side need about {needed:.1f} GiB, more than "
            f"memory={memory:g}; shorten the text, lower the resolution, or allow more memory."
        )
