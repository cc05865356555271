"""From logits to the next token: penalties and truncation rules as pure functions.

The order is fixed: repetition penalty, temperature, top-k, top-p, min-p. Each rule sees what the rule before it left.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

_REMOVED = float("-inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 is greedy (the most likely token, the first one among equals).
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; None or 1 keeps all (nucleus
            sampling, Holtzman et al., arXiv 1904.09751).
        min_p: keep tokens at least this many times as likely as the most likely one; None or 0 keeps all (Nguyen et
            al., arXiv 2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens already seen; 1 changes nothing
            (Keskar et al., arXiv 1909.05858, section 4.1).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or a positive number, such as 0.8.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out to keep all tokens.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; leave it out to keep all tokens.")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1]; leave it out to keep all tokens.")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive; 1 switches it off.")


def penalise_seen(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of the tokens in `seen` by `penalty`.

    Args:
        logits: `(batch, vocab_size)`.
        seen: `(batch, vocab_size)` bool.
        penalty: above 1 makes seen tokens less likely.

    Returns:
        `(batch, vocab_size)`.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Removes (sets to -inf) all but the `k` largest logits of each row; equals of the k-th stay.

    Example:
        >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist()
        [[-inf, 3.0, 2.0]]
    """
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, _REMOVED)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Removes all but the smallest set of most likely tokens whose probabilities sum to at least `p`."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the more likely tokens
    removed = before >= p
    removed[..., 0] = False
    return logits.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), _REMOVED)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Removes tokens less than `p` times as likely as the most likely one."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), _REMOVED)


def distribution(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The probabilities that the next token is drawn from.

    Args:
        logits: `(batch, vocab_size)`, any floating dtype; computed in float32.
        sampling: the rules.
        seen: `(batch, vocab_size)` bool, tokens that the repetition penalty applies to; None applies none.

    Returns:
        `(batch, vocab_size)` float32, rows sum to 1.

    Example:
        >>> distribution(torch.tensor([[0.0, 0.0, -9.0]]), Sampling(top_k=2)).tolist()
        [[0.5, 0.5, 0.0]]
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1.0:
        logits = penalise_seen(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    # The largest logit goes to 0 first, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None and sampling.min_p > 0.0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits.softmax(dim=-1)


def draw(probabilities: Tensor, generator: Generator | None = None) -> Tensor:
    """One token per row.

    Args:
        probabilities: `(batch, vocab_size)`.
        generator: on the same device; None uses PyTorch's global one.

    Returns:
        `(batch,)` int64.
    """
    if probabilities.is_cuda:
        return _race(probabilities, generator)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _race(probabilities: Tensor, generator: Generator | None) -> Tensor:
    """The first of exponential arrival times with these rates, which is what `multinomial` draws too: but that waits
    for the device to check its argument, and a decoding step must not."""
    times = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / times).argmax(dim=-1)


def choose(
    logits: Tensor, sampling: Sampling, seen: Tensor | None = None, generator: Generator | None = None
) -> Tensor:
    """The next token of every row: `draw` from `distribution`, which at temperature 0 is the largest logit.

    Args:
        logits: `(batch, vocab_size)`, any floating dtype.
        sampling: the rules.
        seen: as in `distribution`.
        generator: as in `draw`.

    Returns:
        `(batch,)` int64.
    """
    if sampling.temperature > 0.0:
        return draw(distribution(logits, sampling, seen), generator)
    if seen is not None and sampling.repetition_penalty != 1.0:
        logits = penalise_seen(logits.float(), seen, sampling.repetition_penalty)
    return logits.argmax(dim=-1)
