"""The RMSNorm module against PyTorch's, and its weight in low-precision models."""

import pytest
import torch

from dualscan.nn.norm import RMSNorm
from tests.oracle import assert_close


def test_matches_pytorch():
    ours, theirs, x = RMSNorm(12, eps=1e-3), torch.nn.RMSNorm(12, eps=1e-3), torch.randn(2, 5, 12)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(12))
    theirs.load_state_dict(ours.state_dict())
    assert_close("y", ours(x), theirs(x), dtype=torch.float32)
    grads = (torch.autograd.grad(norm(x).square().sum(), norm.weight)[0] for norm in (ours, theirs))
    assert_close("dweight", *grads, dtype=torch.float32, gradient=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weight_stays_in_float32(dtype: torch.dtype):
    norm, x = RMSNorm(12).to(dtype), torch.randn(2, 5, 12, dtype=dtype)
    assert norm.weight.dtype == torch.float32
    y = norm(x)
    assert y.dtype == dtype
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert_close("y", y, exact, dtype=dtype)
    assert RMSNorm(12).double().weight.dtype == torch.float64
