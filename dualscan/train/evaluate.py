"""How well a model predicts text: bits per byte, which does not depend on the tokenizer, and perplexity per token."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dualscan.data.loader import Batch, EvaluationBatch, evaluation_batches
from dualscan.data.packing import IGNORE_INDEX, TokenSource
from dualscan.data.tokenizer import Tokenizer
from dualscan.train.runtime import ComputePrecision, autocast, bar_interval

if TYPE_CHECKING:
    from dualscan.models.lm import MambaLM


class Evaluation(NamedTuple):
    """The likelihood of a text under a model.

    Attributes:
        nll: negative log-likelihood of all targets, in nats.
        tokens: number of targets.
        nbytes: UTF-8 bytes that they stand for.
    """

    nll: float
    tokens: int
    nbytes: int

    @property
    def bits_per_byte(self) -> float:
        """`nll / ln 2 / nbytes`."""
        return self.nll / math.log(2.0) / self.nbytes

    @property
    def perplexity(self) -> float:
        """`exp(nll / tokens)`, per token."""
        return math.exp(self.nll / self.tokens)


def total_nll(model: "MambaLM", batch: Batch | EvaluationBatch, precision: ComputePrecision) -> Tensor:
    """The summed negative log-likelihood of a batch's targets, in nats.

    Args:
        model: the language model.
        batch: on any device; it is moved to the model's. Targets of -100 count for nothing.
        precision: of the matrix products; the loss itself is computed in float32.

    Returns:
        A float32 scalar.
    """
    device = model.embedding.weight.device
    cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
    with autocast(device, precision):
        return model.loss(
            batch.tokens.to(device),
            batch.targets.to(device),
            cu_seqlens=cu_seqlens,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )


@torch.inference_mode()
def evaluate(
    model: "MambaLM",
    source: TokenSource,
    tokenizer: Tokenizer,
    *,
    seqlen: int,
    batch_size: int,
    precision: ComputePrecision,
    packed: bool = False,
    max_tokens: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Predicts every token of a text once, in windows that each begin with a fresh state.

    Args:
        model: the language model.
        source: the tokens.
        tokenizer: what encoded them.
        seqlen: tokens in a window.
        batch_size: windows in a batch.
        precision: of the matrix products.
        packed: begin with a fresh state at every document, too.
        max_tokens: read about this many tokens from the start; None reads all.
        progress: show a bar.

    Returns:
        The sums over all batches; divide by way of `bits_per_byte` and `perplexity`.
    """
    nll, ntokens, nbytes = 0.0, 0, 0
    wanted = min(len(source), max_tokens or len(source))
    with tqdm(
        total=wanted,
        desc="evaluating",
        unit="token",
        unit_scale=True,
        leave=False,
        mininterval=bar_interval(),
        disable=not progress,
    ) as bar:
        batches = evaluation_batches(source, tokenizer, batch_size=batch_size, seqlen=seqlen, packed=packed)
        for batch in batches:
            loss = total_nll(model, batch, precision)
            count = int((batch.targets != IGNORE_INDEX).sum())
            nll, ntokens, nbytes = nll + loss.item(), ntokens + count, nbytes + batch.nbytes
            bar.update(count)
            if ntokens >= wanted:
                break
    return Evaluation(nll, ntokens, nbytes)
