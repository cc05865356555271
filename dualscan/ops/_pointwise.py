"""Elementwise pieces that operators share: the accumulation dtype, SiLU, softplus, and the size of a cache-sized block.

SiLU is written from `exp`, not with `torch.nn.functional.silu`: on a CPU that function's vectorised body and its scalar
tail round differently, so a value would depend on where in the tensor it stands, and a packed sequence would differ
from the same sequence alone. `exp`, `add`, `mul`, `div` and `addcmul` give each element the same bits at any position.
In blocks that stay in cache the cost is the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one block of a long tensor. On a CPU 1 MiB in float32: a block and its scratch stay in a 2 MiB L2 cache
# while several elementwise passes go over it. Elsewhere a launch per pass is what counts, and the block only bounds the
# scratch memory.
CPU_BLOCK = 2**18
DEVICE_BLOCK = 2**26


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what sums and statistics are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_length(device: torch.device, elements_per_row: int) -> int:
    """Rows of one block, at least 16."""
    return max((CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK) // max(elements_per_row, 1), 16)


def silu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`x / (1 + exp(-x))`, into `out` (not `x` itself) if given: fresh memory for every block costs page faults."""
    out = torch.neg(x, out=out).exp_().add_(1)
    return torch.div(x, out, out=out)


def silu_slope_(x: Tensor, scratch: Tensor) -> Tensor:
    """SiLU's derivative in place: `s + x s (1 - s)`, `s = sigmoid(x)`, which is left in `scratch` (like `x`)."""
    sigmoid = torch.neg(x, out=scratch).exp_().add_(1).reciprocal_()
    return x.mul_(sigmoid).addcmul_(x, sigmoid, value=-1).add_(sigmoid)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); unlike `F.softplus` it rounds an element the same wherever it stands in memory."""
    return torch.log1p(torch.exp(x.clamp(max=40.0))) + F.relu(x - 40.0)
