"""Which implementation runs, why, and what an impossible wish is told."""

import pytest
import torch

from dualscan.ops import _dispatch
from dualscan.ops._dispatch import Operator, announce_slow_path, anywhere, choose, explain

CPU, META = torch.device("cpu"), torch.device("meta")


def not_on_cpu(device: torch.device) -> str | None:
    return "it needs another machine" if device.type == "cpu" else None


LAST = Operator(name="toy", impls={"fast": not_on_cpu, "plain": anywhere}, preference=("fast", "plain"))
STUCK = Operator(name="toy", impls={"fast": not_on_cpu}, preference=("fast",))


def test_auto_takes_the_first_that_can_run() -> None:
    assert choose(LAST, "auto", CPU) == "plain"
    assert choose(LAST, "auto", META) == "fast"
    assert explain(LAST, CPU) == ("plain", "not fast: it needs another machine")
    name, why = explain(LAST, META)
    assert name == "fast"
    assert why.startswith("first choice")


def test_a_wish_is_honoured_or_raises() -> None:
    assert choose(LAST, "plain", META) == "plain"
    with pytest.raises(ValueError, match=r"toy: impl='fast' cannot run on cpu: it needs another machine; .*'auto'"):
        choose(LAST, "fast", CPU)
    with pytest.raises(ValueError, match=r"toy: impl='quick' does not exist; use one of 'auto', 'fast', 'plain'"):
        choose(LAST, "quick", CPU)
    with pytest.raises(ValueError, match=r"toy: nothing can run on cpu \(fast: it needs another machine\); move"):
        choose(STUCK, "auto", CPU)


def test_a_slow_path_is_announced_once() -> None:
    announce_slow_path.cache_clear()
    with pytest.warns(UserWarning, match=r"toy runs its portable PyTorch form on cuda: no kernel"):
        announce_slow_path("toy", "cuda", "no kernel")
    # Warnings are errors here: a second one would raise.
    announce_slow_path("toy", "cuda", "no kernel")


def test_every_operator_can_run_on_a_cpu() -> None:
    import dualscan.ops.conv1d
    import dualscan.ops.norm
    import dualscan.ops.ssd

    assert dualscan.ops.ssd.OPERATOR in _dispatch.OPERATORS.values()
    assert {"ssd", "ssd_step", "causal_conv1d", "rms_norm", "gated_rms_norm"} <= _dispatch.OPERATORS.keys()
    for name, operator in _dispatch.OPERATORS.items():
        assert operator.name == name
        assert set(operator.preference) <= set(operator.impls)
        assert choose(operator, "auto", CPU) in operator.impls
