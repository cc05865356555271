"""Job `conv1d`: the short convolution with SiLU on a GPU, on the columns of a fused projection, against PyTorch's.

`dualscan bench conv1d --save`. The floor is x read and y written at copy bandwidth; with gradients, also x and dy read
and dx written.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import block
from dualscan.ops.conv1d import causal_conv1d

# batch, seqlen, channels, columns of the projection, the first of x
SHAPES = {
    "d2560 8x2048": (8, 2048, 5376, 10576, 5120),
    "d768 16x1024": (16, 1024, 1792, 3352, 1536),
    "d2560 8x1": (8, 1, 5376, 10576, 5120),
}


def inputs(batch: int, seqlen: int, channels: int, columns: int, first: int) -> block.Inputs:
    """As a bfloat16 model has them."""
    projection = torch.randn(batch, seqlen, columns, device="cuda").bfloat16()
    leaves = {
        "x": projection[..., first : first + channels],
        "weight": torch.rand(channels, 4, device="cuda").bfloat16() - 0.5,
        "bias": torch.rand(channels, device="cuda").bfloat16() - 0.5,
    }
    dy = torch.randn(batch, seqlen, channels, device="cuda").bfloat16()
    return {name: v.requires_grad_() for name, v in leaves.items()} | {"dy": dy}


def ours(t: block.Inputs) -> Tensor:
    """This library's."""
    return causal_conv1d(t["x"], t["weight"], t["bias"], activation="silu").y


def exact(t: block.Inputs) -> Tensor:
    """The definition."""
    return causal_conv1d(t["x"], t["weight"], t["bias"], activation="silu", impl="reference").y


def pytorch(t: block.Inputs) -> Tensor:
    """PyTorch's depthwise convolution, channels first as it wants them."""
    x, weight = t["x"].transpose(1, 2), t["weight"].unsqueeze(1)
    y = F.conv1d(x, weight, t["bias"], padding=3, groups=weight.shape[0])
    return F.silu(y[..., : x.shape[2]]).transpose(1, 2)


def measure(shape: str, repeats: int, ceiling: tuple[float, float]) -> list[dict[str, Any]]:
    """Every pass of one shape."""
    sizes = SHAPES[shape]
    runs = {"dualscan": ours, "torch": pytorch}
    error = block.errors(runs, exact, inputs(1, min(sizes[1], 512), *sizes[2:]))
    once = 1e3 * 2 * sizes[0] * sizes[1] * sizes[2] / ceiling[0]
    floors = {"fwd": 2 * once} | ({"fwdbwd": 5 * once} if sizes[1] > 1 else {})
    return block.passes("conv1d", shape, runs, inputs(*sizes), floors, error=error, repeats=repeats)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job."""
    return block.main("conv1d", measure, list(SHAPES), argv)
