"""The plain forms of the operators, which exported programs are made of, against the operators' references."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dualscan.interop import plain
from dualscan.ops.conv1d.reference import causal_conv1d_reference
from dualscan.ops.selective_scan.reference import recurrent
from dualscan.ops.ssd import reference
from tests.oracle import assert_close

LENGTHS = (1, 2, 8, 21)


def same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    for name, a, e in zip(("y", "final states"), actual, expected, strict=True):
        assert_close(name, a, e, dtype=dtype)


def cast(values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: t.to(dtype) if isinstance(t, Tensor) else t for name, t in values.items()}


@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("width", [1, 4])
def test_convolution(seqlen: int, states: bool, width: int) -> None:
    inputs = {
        "x": torch.randn(2, seqlen, 6),
        "weight": torch.randn(6, width),
        "bias": torch.randn(6) if states else None,
        "initial_states": torch.randn(2, 6, width - 1) if states else None,
        "cu_seqlens": None,
        "silu": states,
    }
    expected = causal_conv1d_reference(**cast(inputs, torch.float64))
    same(plain.causal_conv1d(**inputs), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("full", [True, False])
def test_ssd(seqlen: int, full: bool, dtype: torch.dtype) -> None:
    """`full`: with a scale, a skip connection per channel, groups and states; a decay that forgets everything."""
    x, log_decay = torch.randn(2, seqlen, 4, 6).to(dtype), -2 * torch.rand(2, seqlen, 4)
    if full:
        log_decay[:, seqlen // 2, 1] = float("-inf")
    B, C = torch.randn(2, 2, seqlen, 2 if full else 4, 5).to(dtype)
    scale = torch.rand(2, seqlen, 4) if full else None
    D, initial = (torch.randn(4, 6), torch.randn(2, 4, 6, 5)) if full else (None, None)
    tensors = {"x": x, "scale": scale, "log_decay": log_decay, "B": B, "C": C}
    exact = cast({**tensors, "D": D, "initial": initial}, torch.float64)
    core = reference.Core(*(exact[name] for name in tensors))
    expected = reference.run("recurrent", core, exact["D"], exact["initial"], None)
    y, final = plain.ssd(**tensors, D=D, initial_states=initial, cu_seqlens=None, chunk_size=8)
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    same((y, final), expected, dtype)


@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("full", [True, False])
def test_selective_scan(seqlen: int, full: bool) -> None:
    inputs = {
        "x": torch.randn(2, seqlen, 6),
        "dt": torch.rand(2, seqlen, 6),
        "A": -2 * torch.rand(6, 5),
        "B": torch.randn(2, seqlen, 2, 5),
        "C": torch.randn(2, seqlen, 2, 5),
        "D": torch.randn(6) if full else None,
        "z": torch.randn(2, seqlen, 6) if full else None,
        "dt_bias": torch.randn(6) if full else None,
        "initial_states": torch.randn(2, 6, 5) if full else None,
        "cu_seqlens": None,
        "dt_softplus": full,
    }
    same(plain.selective_scan(**inputs), recurrent(**cast(inputs, torch.float64)), torch.float32)


def test_packed_sequences_have_no_fixed_program() -> None:
    x, cu_seqlens = torch.randn(1, 4, 6), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens.*batch of one length"):
        plain.causal_conv1d(x, torch.randn(6, 2), None, None, cu_seqlens, False)
