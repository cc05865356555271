"""Each wrong input is refused with the value given, what is allowed and the fix."""

from typing import Any

import pytest
import torch

from dualscan.ops.conv1d import causal_conv1d
from tests.strategies import packed

REFUSED: dict[str, tuple[type[Exception], dict[str, Any], list[str]]] = {
    "rank of x": (ValueError, {"x": torch.randn(4, 6)}, ["(4, 6)", "(batch, seqlen, channels)"]),
    "dtype of x": (TypeError, {"x": torch.ones(1, 4, 6, dtype=torch.int64)}, ["int64", "floating-point"]),
    "channels of weight": (ValueError, {"weight": torch.randn(5, 4)}, ["(5, 4)", "channels=6"]),
    "weight of a Conv1d": (ValueError, {"weight": torch.randn(6, 1, 4)}, ["(6, 1, 4)", "squeeze(1)"]),
    "width": (ValueError, {"weight": torch.randn(6, 9)}, ["width=9", "1 to 8"]),
    "no width": (ValueError, {"weight": torch.randn(6, 0)}, ["width=0", "1 to 8"]),
    "bias": (ValueError, {"bias": torch.randn(5)}, ["bias", "(5,)", "channels=6"]),
    "dtype of bias": (TypeError, {"bias": torch.ones(6, dtype=torch.int32)}, ["bias", "int32"]),
    "device of bias": (ValueError, {"bias": torch.ones(6, device="meta")}, ["bias", "meta", "cpu"]),
    "activation": (ValueError, {"activation": "gelu"}, ["'gelu'", "'silu'", "'swish'"]),
    "states": (ValueError, {"initial_states": torch.randn(1, 6, 4)}, ["(1, 6, 4)", "batch=1", "width-1=3"]),
    "dtype of states": (TypeError, {"initial_states": torch.zeros(1, 6, 3).bfloat16()}, ["bfloat16", ".to(x.dtype)"]),
    "packed states": (
        ValueError,
        {"initial_states": torch.randn(1, 6, 3), "cu_seqlens": packed([2, 2])},
        ["(1, 6, 3)", "nseq=2"],
    ),
    "packed batch": (ValueError, {"x": torch.randn(2, 4, 6), "cu_seqlens": packed([2, 2])}, ["batch=2", "batch 1"]),
    "packed length": (ValueError, {"cu_seqlens": packed([2, 3])}, ["to 5", "seqlen=4"]),
    "unsorted": (ValueError, {"cu_seqlens": torch.tensor([0, 3, 1, 4], dtype=torch.int32)}, ["must not decrease"]),
    "dtype of cu_seqlens": (TypeError, {"cu_seqlens": torch.tensor([0, 4])}, ["int64", "torch.int32"]),
    "impl": (ValueError, {"impl": "quadratic"}, ["'quadratic'", "'chunked'", "'reference'"]),
}


@pytest.mark.parametrize(("error", "wrong", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses(error: type[Exception], wrong: dict[str, Any], words: list[str]):
    arguments = {"x": torch.randn(1, 4, 6), "weight": torch.randn(6, 4), **wrong}
    with pytest.raises(error) as raised:
        causal_conv1d(**arguments)
    assert "causal_conv1d" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [word for word in words if word not in str(raised.value)] == []
