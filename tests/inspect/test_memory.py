"""Effective context against a search, half-lives against their definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualscan.inspect.memory import effective_context, half_lives, spectrum

quick = settings(max_examples=40, deadline=None, derandomize=True)


@quick
@given(st.integers(1, 9), st.floats(0.05, 0.999), st.integers(0, 1000))
def test_effective_context_is_the_shortest_window_with_the_mass(seqlen: int, mass: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(2, seqlen, seqlen, dtype=torch.float64, generator=generator).tril()
    actual = effective_context(matrix, mass=mass)
    for h in range(2):
        for i in range(seqlen):
            row = matrix[h, i, : i + 1].abs().tolist()
            shortest = next(n for n in range(1, i + 2) if math.fsum(row[i + 1 - n :]) >= mass * math.fsum(row) - 1e-12)
            assert actual[h, i].item() == shortest


def test_effective_context_of_one_token_and_of_nothing():
    assert effective_context(torch.eye(4)).tolist() == [1, 1, 1, 1]
    assert effective_context(torch.zeros(3, 3)).tolist() == [1, 1, 1]
    first = torch.zeros(3, 3)
    first[:, 0] = 1
    assert effective_context(first, mass=1.0).tolist() == [1, 2, 3]


@pytest.mark.parametrize("mass", [0.0, 1.5])
def test_a_mass_out_of_range_is_named(mass):
    with pytest.raises(ValueError, match=f"mass={mass} must lie in"):
        effective_context(torch.eye(2), mass=mass)


def test_half_life_halves():
    log_decay = -torch.rand(50, dtype=torch.float64)
    torch.testing.assert_close((log_decay * half_lives(log_decay)).exp(), torch.full((50,), 0.5, dtype=torch.float64))
    assert half_lives(torch.zeros(1)).item() == math.inf


def test_spectrum_is_the_quantiles_of_the_half_lives():
    log_decay = -torch.rand(1, 101, 3, 1, dtype=torch.float64)
    lives = (math.log(2) / -log_decay[0, :, :, 0]).sort(0).values
    # At 101 tokens the quantiles 0, 0.25, 0.5 and 1 are the sorted values 0, 25, 50 and 100.
    actual = spectrum(log_decay, (0.0, 0.25, 0.5, 1.0))
    torch.testing.assert_close(actual, lives[[0, 25, 50, 100]].T)
    assert spectrum(torch.zeros(1, 4, 1, 1)).tolist() == [[math.inf] * 5]
