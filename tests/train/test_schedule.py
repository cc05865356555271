"""Schedules: their ends, their shape and the arithmetic of time budgets."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualscan.train.schedule import WSD_DECAY_FRACTION, affordable_steps, lr_factor

RUN = {"total_steps": 101, "warmup_steps": 10}


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_is_linear_and_reaches_the_peak(schedule):
    factors = [lr_factor(step, min_ratio=0.1, schedule=schedule, **RUN) for step in range(10)]
    assert factors == pytest.approx([(step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.1), ("wsd", 0.1), ("constant", 1.0)])
def test_the_last_step_has_the_final_factor(schedule, end):
    assert lr_factor(100, min_ratio=0.1, schedule=schedule, **RUN) == pytest.approx(end)
    assert lr_factor(1000, min_ratio=0.1, schedule=schedule, **RUN) == pytest.approx(end)


def test_cosine_is_half_way_in_the_middle():
    assert lr_factor(55, min_ratio=0.0, **RUN) == pytest.approx(0.5)
    assert lr_factor(10 + 30, min_ratio=0.0, **RUN) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))


def test_wsd_is_flat_then_linear():
    start = 10 + round(90 * (1 - WSD_DECAY_FRACTION))
    assert {lr_factor(step, min_ratio=0.0, schedule="wsd", **RUN) for step in range(10, start)} == {1.0}
    assert lr_factor((start + 100) // 2, min_ratio=0.0, schedule="wsd", **RUN) == pytest.approx(0.5)


@settings(deadline=None)
@given(
    st.integers(1, 500),
    st.integers(0, 50),
    st.floats(0, 1),
    st.sampled_from(["cosine", "wsd", "constant"]),
)
def test_factors_stay_in_range_and_never_rise_after_warmup(total, warmup_steps, min_ratio, schedule):
    factors = [
        lr_factor(step, total_steps=total, warmup_steps=warmup_steps, min_ratio=min_ratio, schedule=schedule)
        for step in range(total)
    ]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    after = factors[max(0, warmup_steps - 1) :]
    assert all(later <= earlier for earlier, later in pairwise(after))


def test_an_unplanned_run_stays_at_the_peak():
    assert lr_factor(1000, total_steps=None, warmup_steps=10, min_ratio=0.0) == 1.0


def test_affordable_steps():
    assert affordable_steps(7, seconds_left=10.0, seconds_per_step=3.0) == 10
    assert affordable_steps(7, seconds_left=-1.0, seconds_per_step=3.0) == 7
