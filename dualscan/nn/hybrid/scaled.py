"""A residual block whose contribution has a constant factor, as in Granite and Falcon-H1."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dualscan.nn.block import Block


class ScaledBlock(Block):
    """h + scale · mixer(RMSNorm(h)), with the residual stream h in float32.

    Args:
        d_model: width of the residual stream.
        mixer: as in `Block`.
        norm_eps: epsilon of the norm.
        scale: the factor.
    """

    def __init__(self, d_model: int, mixer: nn.Module, *, norm_eps: float = 1e-5, scale: float):
        super().__init__(d_model, mixer, norm_eps=norm_eps)
        self.scale = scale

    def _mix(
        self, u: Tensor, again: Callable[[], Tensor] | None, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Any]:
        y, state = super()._mix(u, again, state, cu_seqlens)
        return self.scale * y, state
