"""Sampling rules against brute force over all tokens, and their properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualscan.generate.sampling import (
    Sampling,
    _race,
    choose,
    distribution,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_seen,
)
from tests.oracle import CAPS

ROWS = st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True).map(
    lambda row: torch.tensor([row], dtype=torch.float64) / 8
)


def kept(logits: torch.Tensor) -> set[int]:
    return set(torch.isfinite(logits[0]).nonzero().flatten().tolist())


@settings(deadline=None)
@given(ROWS, st.integers(1, 14))
def test_top_k_keeps_the_k_largest(logits, k):
    ranked = sorted(range(logits.shape[1]), key=lambda i: -logits[0, i])
    assert kept(keep_top_k(logits, k)) == set(ranked[:k])


def test_top_k_keeps_equals_of_the_last():
    assert kept(keep_top_k(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), 2)) == {0, 1, 2}


@settings(deadline=None)
@given(ROWS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_sufficient_set(logits, p):
    probabilities = [math.exp(x) for x in logits[0].tolist()]
    total = sum(probabilities)
    expected, mass = set(), 0.0
    for i in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if expected and abs(mass - p) < CAPS[torch.float32][0]:
            return  # on the boundary, rounding decides
        if expected and mass >= p:
            break
        expected.add(i)
        mass += probabilities[i] / total
    assert kept(keep_top_p(logits, p)) == expected


@settings(deadline=None)
@given(ROWS, st.floats(0.0, 1.0))
def test_min_p_compares_with_the_most_likely(logits, p):
    ratios = (logits[0] - logits[0].max()).exp()
    if ((ratios - p).abs() < CAPS[torch.float32][0]).any() and p < 1:
        return
    result = kept(keep_min_p(logits, p))
    assert result == {i for i, ratio in enumerate(ratios.tolist()) if ratio >= p}
    assert logits[0].argmax().item() in result


def test_penalty_moves_both_signs_down():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise_seen(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


@settings(deadline=None)
@given(ROWS)
def test_plain_sampling_is_the_softmax(logits):
    torch.testing.assert_close(distribution(logits, Sampling()), logits.float().softmax(-1))


def test_temperature_zero_is_greedy_and_the_limit_of_small_ones():
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [3e4, 1.0, 0.0, -3e4]])
    assert distribution(logits, Sampling(temperature=0)).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    nearly = distribution(logits, Sampling(temperature=1e-30))
    assert nearly.tolist() == [[0, 0.5, 0.5, 0], [1, 0, 0, 0]]


def test_rules_compose_in_order():
    """top-p sees the probabilities that top-k left: 4 of 7 reaches a half alone, 4 of 10 needs the second."""
    weights = torch.tensor([[4.0, 3.0, 1.0, 1.0, 1.0]])
    out = distribution(weights.log(), Sampling(top_k=2, top_p=0.5))
    torch.testing.assert_close(out, torch.tensor([[1.0, 0, 0, 0, 0]]))
    out = distribution(weights.log(), Sampling(top_p=0.5))
    torch.testing.assert_close(out, torch.tensor([[4 / 7, 3 / 7, 0, 0, 0]]))


def test_seen_has_no_effect_without_a_penalty():
    logits, seen = torch.randn(2, 5), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(distribution(logits, Sampling(), seen), distribution(logits, Sampling()))


def test_draw_follows_the_probabilities_and_the_seed():
    probabilities = torch.tensor([[0.5, 0.0, 0.5]]).expand(4000, 3)
    draws = [draw(probabilities, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    counts = draws[0].bincount(minlength=3)
    assert counts[1] == 0
    # Six standard deviations of a fair coin thrown 4000 times.
    assert abs(counts[0].item() - 2000) < 6 * math.sqrt(4000 * 0.25)


def test_the_race_of_a_gpu_draws_what_multinomial_draws():
    probabilities = torch.rand(50, 301).softmax(-1)
    probabilities[:, ::3] = 0
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(_race(probabilities, seeds[0]), torch.multinomial(probabilities, 1, generator=seeds[1])[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_choosing_is_drawing_from_the_distribution(dtype, penalty):
    logits = torch.randn(40, 30).to(dtype)  # in bfloat16 some rows have equals at the top
    seen = torch.rand(40, 30) < 0.3
    for temperature in (0.0, 0.7):
        sampling = Sampling(temperature=temperature, repetition_penalty=penalty)
        expected = draw(distribution(logits, sampling, seen), torch.Generator().manual_seed(5))
        assert torch.equal(choose(logits, sampling, seen, torch.Generator().manual_seed(5)), expected)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 1.5}, "top_p=1.5 must lie in"),
        ({"min_p": -0.1}, "min_p=-0.1 must lie in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive"),
    ],
)
def test_bad_values_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**wrong)
