"""Prefill, then one token at a time, with the model's state as a value that goes in and comes out.

A state space model carries a state of constant size, so that every step costs the same, however long the text before
it.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Generator, Tensor

from dualscan.generate.graph import Stepper
from dualscan.generate.sampling import Sampling, choose

if TYPE_CHECKING:
    from dualscan.models.lm import MambaLM

# Longer prompts are read in pieces of this many tokens: the activations of one piece bound the memory of a prefill.
PREFILL_TOKENS = 2048


class GenerateOutput(NamedTuple):
    """Generated tokens.

    Attributes:
        tokens: `(batch, n)` int64; a row that stopped is filled up with its stop id.
        lengths: `(batch,)` int64, tokens of each row before its stop id.
    """

    tokens: Tensor
    lengths: Tensor


@torch.inference_mode()
def prefill(
    model: "MambaLM", prompts: Tensor | Sequence[Tensor], *, state_dtype: torch.dtype | None = None
) -> tuple[Tensor, Any]:
    """Reads the prompts.

    Args:
        model: on the device that the prompts will be moved to.
        prompts: `(batch, seqlen)` int64, or a sequence of `batch` one-dimensional int64 tensors of any lengths >= 1.
            Prompts of different lengths are read as one packed sequence, each from a fresh state.
        state_dtype: of the SSM states that Mamba-2 layers are left with, as in `generate`.

    Returns:
        The logits after each prompt, `(batch, vocab_size)`, and the model's state, of the same batch size.

    Raises:
        ValueError: no prompt, an empty one, or a wrong shape; or an unknown `state_dtype`.
        TypeError: prompts that are not tensors, or not of int64.
    """
    device = next(model.parameters()).device
    rows = _rows(prompts)
    lengths = [row.shape[0] for row in rows]
    if len(set(lengths)) == 1:
        tokens, state, logits = torch.stack(rows).to(device), None, None
        for piece in tokens.split(PREFILL_TOKENS, dim=1):
            logits, state = model(piece, state=state, logits_to_keep=1, state_dtype=state_dtype)
        assert logits is not None
        return logits[:, -1], state
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens, ends = torch.cat(rows)[None].to(device), ends.to(device)
    hidden, state = model.hidden_states(tokens, cu_seqlens=ends, state_dtype=state_dtype)
    last = hidden[:, ends[1:] - 1]  # a vocabulary's logits of every other token are not wanted
    return model.project_out(last)[0], state


def _rows(prompts: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(prompts, Tensor) and prompts.ndim != 2:
        raise ValueError(
            f"prompts have shape {tuple(prompts.shape)}; expected (batch, seqlen): use tokens[None] for one."
        )
    rows = list(prompts)
    if not rows:
        raise ValueError("no prompt was given; pass at least one.")
    for index, row in enumerate(rows):
        if not isinstance(row, Tensor):
            kind = type(row).__name__
            raise TypeError(f"prompt {index} is of type {kind}; pass tensors: torch.tensor(tokenizer.encode(text)).")
        if row.ndim != 1:
            raise ValueError(f"prompt {index} has shape {tuple(row.shape)}; expected (seqlen,).")
        if row.dtype != torch.int64:
            raise TypeError(f"prompt {index} has dtype {row.dtype}; tokens are torch.int64 (tokens.long()).")
        if row.shape[0] == 0:
            raise ValueError(f"prompt {index} is empty; begin with the tokenizer's eos_id, which opens a document.")
    return rows


@torch.inference_mode()
def stream(
    model: "MambaLM",
    prompts: Tensor | Sequence[Tensor],
    *,
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    state_dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every row until all rows have stopped or `max_tokens` are made.

    Args:
        model: the language model.
        prompts: `(batch, seqlen)` int64, or one-dimensional int64 tensors of different lengths.
        max_tokens: tokens to make at most, for each row.
        sampling: how a token is drawn; None is `Sampling()`, plain sampling at temperature 1.
        stop_ids: a row ends at any of these; the stop id is yielded, and again for as long as other rows go on.
        seed: equal seeds draw equal tokens on one device; None draws from PyTorch's global generator.
        state_dtype: as in `generate`.

    Yields:
        `(batch,)` int64 on the model's device.

    Raises:
        ValueError: `max_tokens` is negative, `state_dtype` unknown, or the prompts are not as described.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens} must be 0 or more.")
    if max_tokens == 0:
        return
    sampling = sampling or Sampling()
    vocab_size = model.config.vocab_size  # the logits beyond belong to padding rows of the embedding
    device = next(model.parameters()).device
    # Copies to a GPU wait for it: all of them come before the prompts are read.
    seen = _seen(_rows(prompts), vocab_size, device) if sampling.repetition_penalty != 1.0 else None
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    generator = None if seed is None else Generator(device=device).manual_seed(seed)
    logits, state = prefill(model, prompts, state_dtype=state_dtype)
    logits = logits[:, :vocab_size]
    step = Stepper(model, state, max_tokens - 1)
    del state  # the stepper's alone: it is changed in place
    stopped = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    tokens = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    for made in range(1, max_tokens + 1):
        drawn = choose(logits, sampling, seen, generator)
        tokens = torch.where(stopped, tokens, drawn)
        if stop_ids:
            stopped = stopped | torch.isin(tokens, stops)
        yield tokens
        if made == max_tokens or (stop_ids and stopped.all()):
            return
        if seen is not None:
            seen = seen.scatter(1, tokens[:, None], True)
        logits = step(tokens)[:, :vocab_size]


def _seen(rows: list[Tensor], vocab_size: int, device: torch.device) -> Tensor:
    """`(batch, vocab_size)` bool: the tokens of each prompt."""
    seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
    for index, row in enumerate(rows):
        seen[index, row.to(device)] = True
    return seen


def generate(
    model: "MambaLM",
    prompts: Tensor | Sequence[Tensor],
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    state_dtype: torch.dtype | None = None,
) -> GenerateOutput:
    """Continues each prompt.

    Args:
        model: the language model.
        prompts: `(batch, seqlen)` int64, or one-dimensional int64 tensors of different lengths.
        max_tokens: tokens to make at most, for each row.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; None keeps all.
        min_p: keep tokens at least this many times as likely as the most likely one; None keeps all.
        repetition_penalty: above 1 makes tokens less likely that are in the prompt or already made.
        stop_ids: a row ends at any of these.
        seed: equal seeds draw equal tokens on one device; None draws from PyTorch's global generator.
        state_dtype: in which the SSM states of Mamba-2 layers are kept from token to token, `torch.float32` or
            `torch.bfloat16`; None keeps them as they are computed, in float32. Half the bytes are read and written a
            token, which many rows at once wait for, and every token rounds the state, or on a GPU, with four rows and
            more, every eighth. All else stays as it is.

    Returns:
        `tokens` `(batch, n)` int64 without the prompts, and `lengths` `(batch,)`.

    Raises:
        ValueError: a sampling value out of its range, another `state_dtype`, or prompts that are not as described.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    columns = list(
        stream(
            model,
            prompts,
            max_tokens=max_tokens,
            sampling=sampling,
            stop_ids=stop_ids,
            seed=seed,
            state_dtype=state_dtype,
        )
    )
    tokens = torch.stack(columns, dim=1) if columns else torch.empty(len(_rows(prompts)), 0, dtype=torch.int64)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=tokens.device)
    return GenerateOutput(tokens, (~torch.isin(tokens, stops)).sum(dim=1))
