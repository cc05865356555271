"""Learning-rate schedules as pure functions of the step, and the step count that a time budget allows.

Every schedule is a factor in [0, 1] on the peak learning rate: a linear warmup, then cosine decay (Loshchilov and
Hutter, arXiv 1608.03983), warmup-stable-decay (Hu et al., arXiv 2404.06395, section 4) or a constant.
"""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["cosine", "wsd", "constant"]

# WSD spends this last part of the run on its linear decay; arXiv 2404.06395 finds 10 % to be enough, 20 % safer for
# short runs.
WSD_DECAY_FRACTION = 0.2


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


def affordable_steps(step: int, *, seconds_left: float, seconds_per_step: float) -> int:
    """The total step count that a time budget allows: the steps done and those that still fit.

    Args:
        step: steps done.
        seconds_left: training time left, in seconds; negative counts as none.
        seconds_per_step: measured cost of one step, in seconds.

    Returns:
        `step + floor(seconds_left / seconds_per_step)`.

    Example:
        >>> affordable_steps(10, seconds_left=9.9, seconds_per_step=0.5)
        29
    """
    return step + max(0, math.floor(seconds_left / seconds_per_step))
