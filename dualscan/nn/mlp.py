"""The position-wise MLP: SwiGLU or GeGLU (arXiv 2002.05202), GELU, or squared ReLU (arXiv 2109.08668)."""

import torch.nn.functional as F
from torch import Tensor, nn

from dualscan.nn.precision import apply_linear

ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu2")
_GATED = {"swiglu": F.silu, "geglu": F.gelu}


class MLP(nn.Module):
    """A mixer without memory: `(batch, seqlen, d_model)` in and out, each token on its own.

    swiglu: out_proj(SiLU(gate_proj(u)) · up_proj(u)), geglu with GELU;  gelu, relu2: out_proj(act(up_proj(u))),
    relu2(x) = max(x, 0)².

    Args:
        d_model: width of the residual stream.
        d_hidden: hidden width; None takes `default_hidden`.
        activation: "swiglu", "geglu", "gelu" or "relu2".
        bias: bias on the projections.
        gate_scale: constant factor of the gate before its activation.

    Raises:
        ValueError: an unknown activation or a width below 1.

    Example:
        >>> import torch
        >>> y, state = MLP(64)(torch.randn(2, 10, 64))
        >>> y.shape, state
        (torch.Size([2, 10, 64]), None)
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int | None = None,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        gate_scale: float = 1.0,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"MLP: activation={activation!r} does not exist; use one of {known}.")
        if d_hidden is None:
            d_hidden = self.default_hidden(d_model, activation)
        if d_hidden < 1:
            raise ValueError(f"MLP: d_hidden={d_hidden} must be at least 1; None takes the default for d_model.")
        self.activation, self.gate_scale = activation, gate_scale
        self.gate_proj = nn.Linear(d_model, d_hidden, bias=bias) if activation in _GATED else None
        self.up_proj = nn.Linear(d_model, d_hidden, bias=bias)
        self.out_proj = nn.Linear(d_hidden, d_model, bias=bias)

    @staticmethod
    def gated(activation: str) -> bool:
        """Whether an activation takes a gate, a projection of its own."""
        return activation in _GATED

    @staticmethod
    def default_hidden(d_model: int, activation: str = "swiglu") -> int:
        """8/3 d_model for the three matrices of a gated MLP, 4 d_model for two, rounded up to a multiple of 64."""
        hidden = -(-8 * d_model // 3) if activation in _GATED else 4 * d_model
        return -(-hidden // 64) * 64

    def forward(self, u: Tensor, state: None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, None]:
        """Maps every token by itself.

        Args:
            u: `(batch, seqlen, d_model)`.
            state: None: an MLP remembers nothing.
            cu_seqlens: has no effect, as tokens do not meet.

        Returns:
            y like `u`, and None for the state.
        """
        hidden, gate = apply_linear(self.up_proj, u), None
        if self.gate_proj is not None:
            gate = apply_linear(self.gate_proj, u)
            gate = gate if self.gate_scale == 1.0 else gate * self.gate_scale
        hidden = activate(self.activation, hidden, gate)
        return apply_linear(self.out_proj, hidden), None


def activate(activation: str, hidden: Tensor, gate: Tensor | None) -> Tensor:
    """The hidden layer's activation; `gate` for those of `ACTIVATIONS` that are gated, else None."""
    if gate is not None:
        return _GATED[activation](gate) * hidden
    return F.gelu(hidden) if activation == "gelu" else F.relu(hidden).square()
