"""Head patterns: counts, names and errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualscan.ops.sma.heads import ALIASES, PATTERNS, expand_heads, head_counts


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (("multi-head", "mha", "mhs"), (6, 6, 6)),
        (("multi-query", "multi-contract", "mqa", "mcs"), (6, 1, 1)),
        (("multi-key", "multi-expand", "mka", "mes"), (1, 6, 1)),
        (("multi-value", "multi-input", "mva", "mis"), (1, 1, 6)),
        (("multi-state", "mss"), (1, 1, 1)),
    ],
)
def test_counts_by_every_name(names: tuple[str, ...], counts: tuple[int, int, int]) -> None:
    assert {head_counts(name, 6) for name in names} == {counts}


def test_groups() -> None:
    for name in ("grouped-value", "grouped-input", "gva", "gis"):
        assert head_counts(name, 6, 3) == (3, 3, 6)
    assert head_counts("gva", 6, 1) == head_counts("mva", 6)


def test_every_alias_is_of_a_pattern() -> None:
    assert set(ALIASES.values()) == set(PATTERNS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mqv", 4), ["unknown head pattern 'mqv'", "multi-query", "Did you mean"]),
        (("mqa", 4, 2), ["ngroups=2", "'grouped-value'", "'mqa'"]),
        (("gva", 4, 3), ["ngroups=3", "nheads=4", "divisor"]),
        (("gva", 4, 0), ["ngroups=0"]),
    ],
)
def test_bad_values(arguments: tuple, words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        head_counts(*arguments)
    for word in words:
        assert word in str(raised.value)


@given(st.sampled_from([1, 2, 3, 6]))
def test_expanded_heads(heads: int) -> None:
    t = torch.randn(2, heads, 5)
    expanded = expand_heads(t, 6)
    for h in range(6):
        assert torch.equal(expanded[:, h], t[:, h // (6 // heads)])
