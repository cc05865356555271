"""States that the tests of a decoding step begin with, and the blocks themselves as what they compare with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualscan.nn.mamba2 import Mamba2State
from dualscan.nn.mlp import MLP


def start(
    blocks: nn.ModuleList, dtype: torch.dtype, batch: int, state_dtype: torch.dtype = torch.float32
) -> list[Any]:  # fmt: skip
    """Of every block, on its device, as the decoding steps keep them; None of an MLP."""
    device, states = next(blocks.parameters()).device, []
    for block in blocks:
        mixer: Any = block.mixer
        if isinstance(mixer, MLP):
            states.append(None)
            continue
        conv = torch.randn(batch, mixer.d_conv - 1, mixer.conv1d.in_channels, device=device).to(dtype).transpose(1, 2)
        ssm = torch.randn(batch, mixer.nheads, mixer.headdim, mixer.d_state, device=device)
        states.append(Mamba2State(conv, ssm.to(state_dtype)))
    return states


def double(states: Sequence[Any]) -> list[Any]:
    """The same in float64."""
    return [None if state is None else Mamba2State(*(t.double() for t in state)) for state in states]


def called(blocks: nn.ModuleList, rows: Tensor, states: list[Any]) -> list[Tensor]:
    """The residual stream after each row `(batch, d_model)` by calls of the blocks, of which `states` are updated."""
    results = []
    for row in rows:
        h = row.unsqueeze(1)
        for i, block in enumerate(blocks):
            h, states[i] = block(h, states[i])
        results.append(h[:, 0])
    return results
