"""Zamba2's blocks (arXiv 2411.15242, figure 2): a transformer that Mamba-2 blocks share, with adapters of each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualscan.nn.attention import Attention, AttentionState
from dualscan.nn.block import Block
from dualscan.nn.mlp import MLP, activate
from dualscan.nn.norm import RMSNorm
from dualscan.nn.precision import apply_linear


class Adapter(nn.Module):
    """A linear map of low rank, which one use of a shared matrix adds to its result."""

    def __init__(self, d_in: int, d_out: int, rank: int):
        super().__init__()
        self.down_proj = nn.Linear(d_in, rank, bias=False)
        self.up_proj = nn.Linear(rank, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d_in)` to `(..., d_out)`."""
        return apply_linear(self.up_proj, apply_linear(self.down_proj, x))


class SharedTransformer(nn.Module):
    """Attention over the residual stream and the embedding side by side, then an MLP; no residuals inside.

    y = MLP(RMSNorm(Attention(RMSNorm([h, embedding])))), with (batch, seqlen, d_model) in and out.

    Args:
        d_model: width of the residual stream.
        attention: from 2 d_model to d_model channels.
        mlp: a gated MLP of width d_model.
        norm_eps: epsilon of the norms.
    """

    def __init__(self, d_model: int, attention: Attention, mlp: MLP, *, norm_eps: float = 1e-5):
        super().__init__()
        self.norm, self.norm2 = RMSNorm(2 * d_model, eps=norm_eps), RMSNorm(d_model, eps=norm_eps)
        self.attention, self.mlp = attention, mlp

    def forward(
        self,
        h: Tensor,
        embedding: Tensor,
        state: AttentionState | None,
        cu_seqlens: Tensor | None,
        attention_adapters: Sequence[nn.Module] | None,
        mlp_adapter: nn.Module,
    ) -> tuple[Tensor, AttentionState]:
        """One use, with the adapters of q, k and v (or None) and of the MLP's gate and first map together."""
        dtype = self.mlp.out_proj.weight.dtype
        u = self.norm(torch.cat((h, embedding), dim=-1)).to(dtype)
        y, state = self.attention(u, state, cu_seqlens, adapters=attention_adapters)
        u = self.norm2(y)
        gate_proj, up_proj = self.mlp.gate_proj, self.mlp.up_proj
        assert gate_proj is not None
        gate, up = mlp_adapter(u).chunk(2, dim=-1)
        hidden = activate(self.mlp.activation, apply_linear(up_proj, u) + up, apply_linear(gate_proj, u) + gate)
        return apply_linear(self.mlp.out_proj, hidden), state


class SharedBlock(Block):
    """h + mixer(RMSNorm(h + linear(transformer(h, embedding)))): the transformer's result steers the mixer alone.

    Args:
        d_model: width of the residual stream.
        mixer: Mamba-2.
        transformer: shared with other blocks; exactly one of them owns it, so that it is saved and counted once.
        owns: whether this one does.
        rank: of the adapters.
        attention_adapters: whether q, k and v have adapters, too.
        norm_eps: epsilon of the norm.
    """

    def __init__(
        self,
        d_model: int,
        mixer: nn.Module,
        transformer: SharedTransformer,
        *,
        owns: bool,
        rank: int,
        attention_adapters: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__(d_model, mixer, norm_eps=norm_eps)
        self.transformer = transformer if owns else None
        # A tuple hides it from PyTorch's register of modules; copies of the model keep it shared.
        self._shared = (transformer,)
        self.linear = nn.Linear(d_model, d_model, bias=False)
        self.mlp_adapter = Adapter(d_model, 2 * transformer.mlp.up_proj.out_features, rank)
        self.attention_adapters = None
        if attention_adapters:
            attention = transformer.attention
            widths = (p.out_features for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            self.attention_adapters = nn.ModuleList(Adapter(2 * d_model, width, rank) for width in widths)

    def forward(
        self, h: Tensor, state: Any = None, cu_seqlens: Tensor | None = None, embedding: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Adds the mixer's output to `(batch, seqlen, d_model)`; the state is that of the mixer and of attention.

        Raises:
            ValueError: no embedding: the first block's input, of the same shape.
        """
        if embedding is None:
            raise ValueError("SharedBlock: the embedding is missing; pass the residual stream before the first block.")
        own, attended = (None, None) if state is None else state
        y, attended = self._shared[0](h, embedding, attended, cu_seqlens, self.attention_adapters, self.mlp_adapter)
        y, own = self.branch(h + apply_linear(self.linear, y), own, cu_seqlens)
        return h + y, (own, attended)
