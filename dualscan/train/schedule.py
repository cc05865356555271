"""Learning-rate schedules as pure functions of the step, and the step count that a time budget allows.

Every schedule is a factor in [0, 1] on the peak learning rate: a linear warmup, then cosine decay (Loshchilov and
Hutter, arXiv 1608.03983), warmup-stable-decay (Hu et al., arXiv 2404.06395, section 4) or a constant.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

Schedule = Literal["cosine", "wsd", "constant"]

# WSD spends this last part of the run on its linear decay; arXiv 2404.06395 finds 10 % to be enough, 20 % safer for
# short runs.
WSD_DECAY_FRACTION = 0.2

# A time budget becomes a step count after this many measured steps, the first of a process not being typical.
PLAN_AFTER_STEPS = 3
UNTYPICAL_STEPS = 2
# The speed is the mean over this many steps, and the plan follows it when it would miss the budget by this part of it.
RECENT_STEPS = 50
PLAN_TOLERANCE = 0.05


def warmup(step: int, warmup_steps: int) -> float:
    """Linear warmup `(step + 1) / warmup_steps`, then 1: the first step already learns."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def cosine(progress: float) -> float:
    """Half a cosine from 1 at `progress` 0 to 0 at `progress` 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd(progress: float) -> float:
    """1 until the last `WSD_DECAY_FRACTION` of the run, then linear to 0."""
    return min(1.0, (1.0 - progress) / WSD_DECAY_FRACTION)


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


_SHAPES: dict[str, Callable[[float], float]] = {"cosine": cosine, "wsd": wsd, "constant": constant}


def lr_factor(
    step: int, *, total_steps: int | None, warmup_steps: int, min_ratio: float, schedule: Schedule = "cosine"
) -> float:
    """The factor on the peak learning rate at a step.

    `factor = warmup(step) * (min_ratio + (1 - min_ratio) * shape(progress))`, with `progress` the part of the steps
    after
    warmup that is done: 0 at `warmup_steps`, 1 at the last step.

    Args:
        step: optimizer steps done so far; the first step has 0.
        total_steps: steps of the whole run; None while a time budget is not yet translated into steps (`progress` is
            0).
        warmup_steps: steps of the linear warmup.
        min_ratio: where the schedule ends, as a part of the peak, in [0, 1].
        schedule: "cosine", "wsd" or "constant" (which ignores `min_ratio`).

    Returns:
        A factor in [0, 1].

    Example:
        >>> [round(lr_factor(s, total_steps=5, warmup_steps=2, min_ratio=0.1), 3) for s in range(5)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if total_steps is None:
        progress = 0.0
    else:
        progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
        progress = min(1.0, max(0.0, progress))
    return warmup(step, warmup_steps) * (min_ratio + (1.0 - min_ratio) * _SHAPES[schedule](progress))


class StepBudget:
    """How many steps a run takes, from a step count, a time budget, or both (whichever ends first).

    A time budget becomes a step count as soon as a few steps are measured. That count stays, so that the schedule is a
    function of the step alone, until the measured speed would miss the budget by more than `PLAN_TOLERANCE` of it.

    Args:
        max_steps: steps of the run, or None.
        max_minutes: training time of the run in minutes, or None.

    Attributes:
        total_steps: the planned steps; None until a time budget is translated.
        seconds: training time so far.
    """

    def __init__(self, *, max_steps: int | None, max_minutes: float | None) -> None:
        self._max_steps, self._max_minutes = max_steps, max_minutes
        self.total_steps = max_steps if max_minutes is None else None
        self.seconds = 0.0
        self._untypical = UNTYPICAL_STEPS
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)

    def done(self, step: int) -> bool:
        """Whether the steps are done or the time is spent."""
        spent = self._max_minutes is not None and self.seconds >= 60.0 * self._max_minutes
        return spent or any(limit is not None and step >= limit for limit in (self.total_steps, self._max_steps))

    def record(self, step: int, seconds: float) -> None:
        """Accounts for a step that took `seconds`; `step` counts it."""
        self.seconds += seconds
        if self._untypical:
            self._untypical -= 1
            return
        self._recent.append(seconds)
        if self._max_minutes is None or len(self._recent) < PLAN_AFTER_STEPS:
            return
        left = 60.0 * self._max_minutes - self.seconds
        if self.total_steps is not None:
            missed = (self.total_steps - step) * self.seconds_per_step - left
            if abs(missed) <= PLAN_TOLERANCE * 60.0 * self._max_minutes:
                return
        self.total_steps = step + max(0, math.floor(left / self.seconds_per_step))
        if self._max_steps is not None:
            self.total_steps = min(self.total_steps, self._max_steps)

    @property
    def seconds_per_step(self) -> float:
        """Mean over the last steps; 0 while none is measured."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0

    def state_dict(self) -> dict[str, float | int | None]:
        """What a checkpoint stores."""
        return {
            "max_steps": self._max_steps,
            "max_minutes": self._max_minutes,
            "total_steps": self.total_steps,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`; the plan is kept if it was made for the same limits."""
        self.seconds = state["seconds"]
        if (state["max_steps"], state["max_minutes"]) == (self._max_steps, self._max_minutes):
            self.total_steps = state["total_steps"]
