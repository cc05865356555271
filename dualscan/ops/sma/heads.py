"""Head patterns: which of q, k and v have a head each and which share one (section 7.2 of arXiv 2405.21060).

Decays are always per head, so `nheads` heads of output come of every pattern. In the names of state spaces q, k and v
are C, B and X.
"""

import difflib
from typing import NamedTuple

from torch import Tensor

# pattern -> which of q, k and v have all heads ("h"), one a group ("g") or a single one ("1").
PATTERNS = {
    "multi-head": "hhh",
    "multi-query": "h11",
    "multi-key": "1h1",
    "multi-value": "11h",
    "grouped-value": "ggh",
    "multi-state": "111",
}
# The paper's other names, and the usual abbreviations of both.
ALIASES = {
    "mha": "multi-head",
    "mhs": "multi-head",
    "multi-contract": "multi-query",
    "mqa": "multi-query",
    "mcs": "multi-query",
    "multi-expand": "multi-key",
    "mka": "multi-key",
    "mes": "multi-key",
    "multi-input": "multi-value",
    "mva": "multi-value",
    "mis": "multi-value",
    "grouped-input": "grouped-value",
    "gva": "grouped-value",
    "gis": "grouped-value",
    "mss": "multi-state",
}


class HeadCounts(NamedTuple):
    """Heads of the queries (C), the keys (B) and the values (X).

    Attributes:
        q: heads of q.
        k: heads of k.
        v: heads of v.
    """

    q: int
    k: int
    v: int


def head_counts(pattern: str, nheads: int, ngroups: int = 1) -> HeadCounts:
    """How many heads q, k and v have (table 5 of arXiv 2405.21060).

    Args:
        pattern: "multi-head" (all have `nheads`), "multi-query" (q only; multi-contract), "multi-key" (k only;
            multi-expand), "multi-value" (v only; multi-input), "grouped-value" (v, with `ngroups` heads of q and k),
            "multi-state" (none), or an abbreviation such as "mqa" or "mcs".
        nheads: heads of the decays and of the output.
        ngroups: groups of "grouped-value"; 1 elsewhere.

    Returns:
        `HeadCounts(q, k, v)`.

    Raises:
        ValueError: an unknown pattern, or groups that do not fit it.

    Example:
        >>> head_counts("multi-query", 8)
        HeadCounts(q=8, k=1, v=1)
        >>> head_counts("gva", 8, 2)
        HeadCounts(q=2, k=2, v=8)
    """
    shares = PATTERNS[pattern_name(pattern)]
    if "g" not in shares and ngroups != 1:
        raise ValueError(
            f"ngroups={ngroups} goes with the head pattern 'grouped-value' only, not with {pattern!r}; use ngroups=1."
        )
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(f"ngroups={ngroups} does not divide nheads={nheads}; use 1 or another divisor.")
    return HeadCounts(*({"h": nheads, "g": ngroups, "1": 1}[share] for share in shares))


def pattern_name(pattern: str) -> str:
    """The full name of a head pattern.

    Raises:
        ValueError: there is no such pattern.
    """
    name = ALIASES.get(pattern, pattern)
    if name not in PATTERNS:
        close = difflib.get_close_matches(str(pattern), [*PATTERNS, *ALIASES], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown head pattern {pattern!r}; the patterns are {', '.join(PATTERNS)}.{hint}")
    return name


def expand_heads(t: Tensor, nheads: int) -> Tensor:
    """Repeats `(..., heads, width)` to `(..., nheads, width)`: head `h` takes `h // (nheads // heads)`.

    A single head is repeated without a copy.
    """
    heads = t.shape[-2]
    if heads == 1:
        return t.expand(*t.shape[:-2], nheads, -1)
    return t if heads == nheads else t.repeat_interleave(nheads // heads, dim=-2)
