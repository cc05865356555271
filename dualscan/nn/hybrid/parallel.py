"""Mamba-2 and attention side by side in one layer, as in Falcon-H1 (arXiv 2507.22448)."""

from typing import Any

from torch import Tensor, nn


class Parallel(nn.Module):
    """Mixers side by side: `(batch, seqlen, d_model)` in and out, y = Σ out_i · mixer_i(in_i · u).

    Args:
        mixers: the branches, each `forward(u, state, cu_seqlens) -> (y, state)`.
        in_scales: factor of the input of every branch.
        out_scales: factor of the output of every branch.

    Example:
        >>> import torch
        >>> from dualscan.nn.attention import Attention
        >>> from dualscan.nn.mamba2 import Mamba2
        >>> layer = Parallel([Mamba2(32, d_state=8, headdim=16), Attention(32, 2)], in_scales=(1, 1), out_scales=(1, 1))
        >>> y, (mamba2_state, attention_state) = layer(torch.randn(1, 5, 32))
    """

    def __init__(self, mixers: list[nn.Module], *, in_scales: tuple[float, ...], out_scales: tuple[float, ...]):
        super().__init__()
        self.mixers = nn.ModuleList(mixers)
        self.in_scales, self.out_scales = in_scales, out_scales

    @property
    def out_proj(self) -> nn.Module:
        """The last linear map of the first branch; gives the layer its dtype."""
        return self.mixers[0].get_submodule("out_proj")

    def forward(
        self, u: Tensor, state: tuple[Any, ...] | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Training, prefill, chunked prefill and one-token steps alike.

        Args:
            u: `(batch, seqlen, d_model)`.
            state: what a previous call returned, or None for the start of a sequence; not modified.
            cu_seqlens: `(nseq + 1,)` int32 boundaries of sequences packed along time; batch must be 1.

        Returns:
            y like `u`, and the states of the branches.
        """
        y, after = None, []
        before = (None,) * len(self.mixers) if state is None else state
        for mixer, own, scale_in, scale_out in zip(self.mixers, before, self.in_scales, self.out_scales, strict=True):
            out, own = mixer(u if scale_in == 1.0 else u * scale_in, own, cu_seqlens)
            out = out if scale_out == 1.0 else out * scale_out
            y = out if y is None else y + out
            after.append(own)
        assert y is not None
        return y, tuple(after)
