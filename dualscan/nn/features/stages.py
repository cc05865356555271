"""The single maps that a `FeatureMap` is a row of: functions, norms with weights, random features, cosFormer."""

import math

import torch
from torch import Tensor, nn

from dualscan.nn.precision import Float32Parameters
from dualscan.ops.sma import features, rotation

MAX_LENGTH = 8192
ROLES = ("q", "k")


class Stage(nn.Module):
    """A map of the last dimension without parameters.

    Args:
        name: a function of `dualscan.ops.sma.features`.
    """

    def __init__(self, name: str):
        super().__init__()
        self.function = getattr(features, name)

    def forward(self, x: Tensor, role: str, cu_seqlens: Tensor | None) -> Tensor:
        """Maps `(batch, seqlen, heads, n)`; role is "q" or "k"."""
        return self.function(x)


class Norm(Float32Parameters, Stage):
    """A norm with a weight, and a layer norm's bias, of queries and of keys."""

    float32_parameters = ("q_weight", "q_bias", "k_weight", "k_bias")

    def __init__(self, name: str, n: int):
        super().__init__(name)
        for role in ROLES:
            self.register_parameter(f"{role}_weight", nn.Parameter(torch.ones(n)))
            bias = nn.Parameter(torch.zeros(n)) if name == "layer_norm" else None
            self.register_parameter(f"{role}_bias", bias)

    def forward(self, x: Tensor, role: str, cu_seqlens: Tensor | None) -> Tensor:
        """Normalises in float32."""
        weight, bias = getattr(self, f"{role}_weight"), getattr(self, f"{role}_bias")
        y = self.function(x.to(weight.dtype)) * weight
        return (y if bias is None else y + bias).to(x.dtype)


class RandomFeatures(Stage):
    """Random directions, the same for queries and keys, drawn once and saved with the weights."""

    projection: Tensor

    def __init__(self, name: str, n: int):
        super().__init__(name)
        self.register_buffer("projection", features.random_projection(n, n))

    def forward(self, x: Tensor, role: str, cu_seqlens: Tensor | None) -> Tensor:
        """Projects on the directions."""
        return self.function(x, self.projection)


class Cosformer(Stage):
    """cosFormer, with positions that count from the start of every call."""

    def __init__(self, max_length: int):
        super().__init__("cosformer")
        self.rate = math.pi / 2 / max_length

    def forward(self, x: Tensor, role: str, cu_seqlens: Tensor | None) -> Tensor:
        """Turns by the position."""
        places = rotation.positions(x.shape[1], cu_seqlens, x.device)
        return self.function(x, self.rate * places[:, None, None])

    def advance(self, state: Tensor, seqlen: int, cu_seqlens: Tensor | None) -> Tensor:
        """Turns the state to the origin of the next call."""
        rates = torch.tensor([self.rate], dtype=torch.float64, device=state.device)
        return rotation.advance(state, rates, seqlen, cu_seqlens)


def build(name: str, n: int, max_length: int) -> Stage:
    """The stage of a name, for inputs of width n."""
    if name == "cosformer":
        return Cosformer(max_length)
    if name in ("layer_norm", "rms_norm"):
        return Norm(name, n)
    return RandomFeatures(name, n) if name in ("rfa", "performer") else Stage(name)
