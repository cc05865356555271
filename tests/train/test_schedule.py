"""Schedules: their ends, their shape and the arithmetic of time budgets."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualscan.train.schedule import PLAN_TOLERANCE, WSD_DECAY_FRACTION, StepBudget, lr_factor

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


def run_at(seconds_per_step, *, max_steps=None, max_minutes=None):
    """The steps of a run whose steps take the given time each, and the plans it made."""
    budget, step, plans = StepBudget(max_steps=max_steps, max_minutes=max_minutes), 0, []
    while not budget.done(step):
        step += 1
        budget.record(step, seconds_per_step(step))
        if plans[-1:] != [budget.total_steps]:
            plans.append(budget.total_steps)
    return step, plans, budget


def test_a_step_count_is_the_plan():
    assert run_at(lambda step: 100.0, max_steps=7)[:2] == (7, [7])


def test_a_steady_run_is_planned_once():
    """Two slow first steps of 3 s, then 0.5 s each: 6 + 0.5 * 108 s fill a minute; nothing is planned before step 5."""
    step, plans, budget = run_at(lambda step: 3.0 if step <= 2 else 0.5, max_minutes=1.0)
    assert (step, plans) == (110, [None, 110])
    assert budget.seconds == 60.0


def test_the_shorter_limit_ends_the_run():
    assert run_at(lambda step: 0.5, max_steps=20, max_minutes=1.0)[0] == 20
    assert run_at(lambda step: 0.5, max_steps=500, max_minutes=1.0)[0] == 120


@pytest.mark.parametrize(("before", "after"), [(0.5, 1.0), (1.0, 0.5)])
def test_a_change_of_speed_is_planned_for(before, after):
    """The run ends within the tolerance of its budget, at the end of its schedule."""
    step, plans, budget = run_at(lambda step: before if step <= 40 else after, max_minutes=2.0)
    assert len(plans) > 2
    assert 120 * (1 - PLAN_TOLERANCE) <= budget.seconds <= 120 + after
    assert step >= plans[-1] - PLAN_TOLERANCE * 120 / after


def test_very_slow_steps_still_end():
    step, plans, _ = run_at(lambda step: 50.0, max_minutes=1.0)
    assert (step, plans) == (2, [None])


def test_a_resumed_budget_keeps_its_plan_unless_the_limits_changed():
    _, _, budget = run_at(lambda step: 0.5, max_minutes=1.0)
    same = StepBudget(max_steps=None, max_minutes=1.0)
    same.load_state_dict(budget.state_dict())
    assert (same.total_steps, same.seconds) == (120, 60.0)
    longer = StepBudget(max_steps=None, max_minutes=2.0)
    longer.load_state_dict(budget.state_dict())
    assert (longer.total_steps, longer.seconds) == (None, 60.0)
