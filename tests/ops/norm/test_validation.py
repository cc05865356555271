"""Each wrong input is refused with the value given, what is allowed and the fix."""

from typing import Any

import pytest
import torch

from dualscan.ops.norm import gated_rms_norm, rms_norm

REFUSED: dict[str, tuple[type[Exception], dict[str, Any], list[str]]] = {
    "rank of x": (ValueError, {"x": torch.tensor(1.0)}, ["no dimension", "(..., d)"]),
    "dtype of x": (TypeError, {"x": torch.ones(2, 6, dtype=torch.int64)}, ["x", "int64", "floating-point"]),
    "weight": (ValueError, {"weight": torch.ones(5)}, ["(5,)", "d=6"]),
    "device of weight": (ValueError, {"weight": torch.ones(6, device="meta")}, ["weight", "meta", "cpu"]),
    "eps": (ValueError, {"eps": -1.0}, ["eps=-1.0", "1e-5"]),
    "gate": (ValueError, {"z": torch.ones(2, 5)}, ["z", "(2, 5)", "(2, 6)"]),
    "dtype of the gate": (TypeError, {"z": torch.ones(2, 6, dtype=torch.bool)}, ["z", "bool"]),
    "group": (ValueError, {"z": torch.ones(2, 6), "group_size": 4}, ["group_size=4", "d=6", "divisor"]),
    "no group": (ValueError, {"z": torch.ones(2, 6), "group_size": 0}, ["group_size=0"]),
}


@pytest.mark.parametrize(("error", "wrong", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses(error: type[Exception], wrong: dict[str, Any], words: list[str]):
    norm = gated_rms_norm if "z" in wrong else rms_norm
    with pytest.raises(error) as raised:
        norm(**{"x": torch.randn(2, 6), "weight": torch.ones(6), **wrong})
    assert norm.__name__ in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [word for word in words if word not in str(raised.value)] == []
