"""The residual block around any mixer, and the table of mixers that a layer pattern names."""

from typing import Any

import torch
from torch import Tensor, nn

from dualscan.nn.mamba2 import Mamba2
from dualscan.nn.norm import RMSNorm


class Block(nn.Module):
    """Pre-norm residual: h + mixer(RMSNorm(h)), with the residual stream h in float32.

    Args:
        d_model: width of the residual stream.
        mixer: `forward(u, state, cu_seqlens) -> (y, state)`; its last matrix is called `out_proj`.
        norm_eps: epsilon of the norm.
    """

    def __init__(self, d_model: int, mixer: nn.Module, *, norm_eps: float = 1e-5):
        super().__init__()
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.mixer = mixer

    def forward(
        self, h: Tensor, state: Any = None, cu_seqlens: Tensor | None = None, *, reuse_state: bool = False
    ) -> tuple[Tensor, Any]:
        """Adds the mixer's output to `(batch, seqlen, d_model)` and passes its state on.

        With `reuse_state` the given state is not needed any more, and the next one may take its place in memory.
        """
        if cu_seqlens is None and state is not None and h.shape[1] == 1 and isinstance(self.mixer, Mamba2):
            stepped = self.mixer.block_step(self.norm, h, state, reuse_state=reuse_state)
            if stepped is not None:
                return stepped
        y, state = self.mixer(self.norm(h).to(self.compute_dtype), state, cu_seqlens)
        return h + y, state

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the mixer's matrices; the residual stream itself stays in float32."""
        return self.mixer.get_parameter("out_proj.weight").dtype
