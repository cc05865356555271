"""A layer as a matrix over tokens: the hidden attention of Mamba (arXiv 2403.01590), SMA itself (arXiv 2405.21060).

Two matrices a head. The *operator* matrix is what the sequence operator multiplies its values by: (L ∘ C Bᵀ) Δ for
Mamba-2, the softmax for attention. The *unified* one takes the convolution, the gate and the norm into it (arXiv
2405.16504), from the channels that leave the input projection to those that enter the output projection. With the text
fixed, both are exact, per channel; a head shows the mean over its channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualscan.inspect.layer import ALL, LayerView, SurroundedView, Surroundings
from dualscan.inspect.selective import MambaView
from dualscan.nn.attention import Attention, rotate
from dualscan.nn.hybrid.moe import MoE
from dualscan.nn.hybrid.parallel import Parallel
from dualscan.nn.mamba import Mamba
from dualscan.nn.mamba2 import Mamba2
from dualscan.nn.mlp import MLP
from dualscan.nn.precision import apply_linear
from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.conv1d import causal_conv1d
from dualscan.ops.sma.heads import expand_heads
from dualscan.ops.ssd import ssd
from dualscan.ops.ssd.reference import segment_sum


@torch.no_grad()
def look(mixer: nn.Module, u: Tensor) -> LayerView | None:
    """A mixer as matrices at the input `u`.

    Args:
        mixer: `Mamba2`, `Mamba`, `Attention`, or several in `Parallel`; an `MLP` or `MoE` mixes no tokens.
        u: `(batch, seqlen, d_model)`, what the mixer reads, in the dtype of its matrices.

    Returns:
        The view, or None for a mixer without memory.

    Raises:
        TypeError: a mixer of another kind.

    Example:
        >>> from dualscan.nn.mamba2 import Mamba2
        >>> layer = Mamba2(32, d_state=8, headdim=16)
        >>> view = look(layer, torch.randn(1, 5, 32))
        >>> view.operator().shape
        torch.Size([1, 4, 5, 5])
    """
    if isinstance(mixer, (MLP, MoE)):
        return None
    kind = next((kind for kind in VIEWS if isinstance(mixer, kind)), None)
    if kind is None:
        known = ", ".join(sorted(kind.__name__ for kind in VIEWS))
        raise TypeError(f"a {type(mixer).__name__} cannot be written as a matrix here; the known layers are {known}.")
    return VIEWS[kind](mixer, u)


class HeadView(SurroundedView):
    """A layer whose channels share one matrix a head.

    Attributes:
        values: `(batch, seqlen, nheads, headdim)`, what the operator matrices multiply.
        skip: D, `(nheads,)`, what is added to the operator's diagonal; None for no skip.
    """

    values: Tensor
    skip: Tensor | None = None

    def weighted(self, heads: slice, channels: slice, left: Tensor, right: Tensor) -> Tensor:
        """The operator's matrix with the skip, times the sum over the channels of what surrounds it."""
        inner = self.operator(heads)
        if self.skip is not None:
            inner.diagonal(dim1=-2, dim2=-1).add_(self.skip[heads].unsqueeze(-1))
        return torch.einsum("kblhp,bshp->kbhls", left, right).mul_(inner)


class Mamba2View(HeadView):
    """Mamba-2: head h's matrix is (C_i · B_j) exp(Σ_{j<k<=i} Δ_k A) Δ_j, shared by the head's channels."""

    def __init__(self, mixer: Mamba2, u: Tensor):
        dtype, nheads = accumulation_dtype(u.dtype), mixer.nheads
        weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
        projected = apply_linear(mixer.in_proj, u)
        if mixer.projection_scales is not None:
            projected = projected * mixer._scales(projected)
        z, xBC, dt = projected.split([mixer.d_inner, mixer.conv1d.in_channels, nheads], dim=-1)
        before = causal_conv1d(xBC, weight, bias).y
        x, B, C = mixer._inputs(before if mixer.feature_map is not None else F.silu(before), None)
        A = -torch.exp(mixer.A_log)
        y = ssd(x, dt, A, B, C, D=mixer.D, dt_bias=mixer.dt_bias, dt_softplus=True, dt_limit=mixer.dt_limit).y
        self.nheads, self.values, self.skip = nheads, x.to(dtype), mixer.D.detach().to(dtype)
        self._dt = F.softplus(dt.to(dtype) + mixer.dt_bias).clamp(*mixer.dt_limit).to(dtype)
        self._dA, self._B, self._C = (self._dt * A).to(dtype), B.to(dtype), C.to(dtype)

        def of_x(t: Tensor, dim: int = -1) -> Tensor:
            """The part of the convolution's channels that is x, by head."""
            part = t.narrow(dim, 0, mixer.heads.v * mixer.headdim).to(dtype).movedim(dim, -1)
            return expand_heads(part.unflatten(-1, (mixer.heads.v, mixer.headdim)), nheads)

        self.inputs = of_x(xBC).flatten(-2)
        self.around = Surroundings(
            gate=_gate_and_norm(mixer, y.flatten(-2).to(dtype), z.to(dtype)).unflatten(-1, (nheads, mixer.headdim)),
            slope=torch.sigmoid(of_x(before)),
            taps=of_x(weight, 0).movedim(0, -1),
            bias=None if bias is None else of_x(bias),
        )

    def operator(self, heads: slice = ALL) -> Tensor:
        """(C_i · B_j) exp(Σ_{j<k<=i} Δ_k A) Δ_j (equation 16 of arXiv 2405.21060), `(batch, heads, seqlen, seqlen)`."""
        group = torch.arange(self.nheads)[heads] // (self.nheads // self._B.shape[2])
        first, last = int(group[0]), int(group[-1]) + 1
        scores = torch.einsum("blgn,bsgn->bgls", self._C[:, :, first:last], self._B[:, :, first:last])
        decay = segment_sum(self._dA[:, :, heads].transpose(1, 2)).exp_()
        return decay.mul_(scores[:, group - first]).mul_(self._dt[:, :, heads].transpose(1, 2).unsqueeze(-2))

    def log_decay(self, heads: slice = ALL) -> Tensor:
        """Δ_t A, one rate a head."""
        return self._dA[:, :, heads].unsqueeze(-1)


class AttentionView(HeadView):
    """Softmax attention: its matrix is there already; only a convolution may stand before it."""

    def __init__(self, mixer: Attention, u: Tensor):
        dtype = accumulation_dtype(u.dtype)
        qkv = [apply_linear(p, u) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
        widths, before = [t.shape[-1] for t in qkv], qkv[2]
        taps, bias = u.new_ones(widths[2], 1), None
        if (conv := mixer.conv1d) is not None:
            weight = conv.weight.squeeze(1)
            qkv = causal_conv1d(torch.cat(qkv, dim=-1), weight, conv.bias).y.split(widths, dim=-1)
            taps, bias = weight[-widths[2] :], None if conv.bias is None else conv.bias[-widths[2] :]
        q, k, v = (t.to(dtype).unflatten(-1, (-1, mixer.head_dim)) for t in qkv)
        if mixer.rope_theta is not None:
            positions = torch.arange(u.shape[1], device=u.device).expand(u.shape[:2])
            q, k = (
                rotate(t.transpose(1, 2), positions, mixer.rope_theta, mixer.rotary_dim).transpose(1, 2) for t in (q, k)
            )
        self.nheads = q.shape[2]
        self._q, self._k = q, expand_heads(k, self.nheads)
        self._scale = mixer.head_dim**-0.5 if mixer.scale is None else mixer.scale

        def by_head(t: Tensor) -> Tensor:
            return expand_heads(t.to(dtype).unflatten(-1, (-1, mixer.head_dim)), self.nheads)

        self.values, self.inputs = expand_heads(v, self.nheads), by_head(before).flatten(-2)
        ones = torch.ones_like(self.values)
        taps = by_head(taps.T).movedim(0, -1)
        self.around = Surroundings(gate=ones, slope=ones, taps=taps, bias=None if bias is None else by_head(bias))

    def operator(self, heads: slice = ALL) -> Tensor:
        """softmax(q kᵀ scale) over the tokens so far, `(batch, heads, seqlen, seqlen)`."""
        scores = torch.einsum("blhd,bshd->bhls", self._q[:, :, heads], self._k[:, :, heads]) * self._scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill_(hidden, float("-inf")).softmax(-1)


class ParallelView(LayerView):
    """Mixers side by side: their heads and channels one after the other, times the factors of their outputs."""

    def __init__(self, mixer: Parallel, u: Tensor):
        views = [look(branch, u * scale) for branch, scale in zip(mixer.mixers, mixer.in_scales, strict=True)]
        self.branches = [view for view in views if view is not None]
        assert len(self.branches) == len(mixer.mixers)
        self._scales = mixer.out_scales
        self.nheads = sum(view.nheads for view in self.branches)
        self.inputs = torch.cat([view.inputs for view in self.branches], -1)

    def operator(self, heads: slice = ALL) -> Tensor:
        """The branches' operator matrices."""
        return torch.cat([view.operator(own) * scale for view, own, scale in self._parts(heads)], 1)

    def unified(self, heads: slice = ALL) -> Tensor:
        """The branches' unified matrices."""
        return torch.cat([view.unified(own) * scale for view, own, scale in self._parts(heads)], 1)

    def channel(self, index: int) -> tuple[Tensor, Tensor]:
        """The map of a branch's channel."""
        for view, scale in zip(self.branches, self._scales, strict=True):
            if index < view.inputs.shape[-1]:
                matrix, offset = view.channel(index)
                return matrix * scale, offset * scale
            index -= view.inputs.shape[-1]
        raise IndexError(f"the layer has {self.inputs.shape[-1]} channels.")

    def log_decay(self, heads: slice = ALL) -> Tensor:
        """The branches' decays; 0 for attention, which keeps what it has read."""
        decays = []
        for view, own, _ in self._parts(heads):
            decay = view.log_decay(own)
            decays.append(
                self.inputs.new_zeros(*self.inputs.shape[:2], own.stop - own.start, 1) if decay is None else decay
            )
        rates = max(decay.shape[-1] for decay in decays)
        return torch.cat([decay.expand(-1, -1, -1, rates) for decay in decays], 2)

    def _parts(self, heads: slice) -> list[tuple[LayerView, slice, float]]:
        """The branches that some heads belong to, and which of their own heads these are."""
        start, stop, _ = heads.indices(self.nheads)
        parts, first = [], 0
        for view, scale in zip(self.branches, self._scales, strict=True):
            own = slice(max(start - first, 0), min(stop - first, view.nheads))
            if own.start < own.stop:
                parts.append((view, own, scale))
            first += view.nheads
        return parts


def _gate_and_norm(mixer: Mamba2, y: Tensor, z: Tensor) -> Tensor:
    """What gate and norm multiply y by, `(batch, seqlen, d_inner)`: SiLU(z) times weight over root mean square."""
    norm, gate = mixer.norm, F.silu(z)
    if norm is None:
        return gate
    normalised = y if norm.norm_before_gate else y * gate
    group = norm.group_size or y.shape[-1]
    mean = normalised.unflatten(-1, (-1, group)).square().mean(-1, keepdim=True)
    scale = torch.rsqrt(mean + norm.eps).expand(*mean.shape[:-1], group).flatten(-2)
    return gate * scale * norm.weight


VIEWS: dict[type[nn.Module], type] = {
    Mamba2: Mamba2View,
    Mamba: MambaView,
    Attention: AttentionView,
    Parallel: ParallelView,
}
