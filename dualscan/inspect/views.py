"""A layer as a matrix over tokens: the hidden attention of Mamba (arXiv 2403.01590), SMA itself (arXiv 2405.21060).

Two matrices a head. The *operator* matrix is what the sequence operator multiplies its values by: (L ∘ C Bᵀ) Δ for
Mamba-2, the softmax for attention. The *unified* one takes the convolution, the gate and the norm into it (arXiv
2405.16504), from the channels that leave the input projection to those that enter the output projection. With the text
fixed, SiLU(v) = σ(v) v, the gate and the norm are factors, so that both are exact, per channel; a head shows the mean
over its channels.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualscan.nn.attention import Attention, rotate
from dualscan.nn.mamba2 import Mamba2
from dualscan.nn.mlp import MLP
from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.conv1d import causal_conv1d
from dualscan.ops.ssd import ssd
from dualscan.ops.ssd.reference import segment_sum

ALL = slice(None)


class LayerView(ABC):
    """One layer at one text; made by `look`.

    Matrices are computed on request, for some heads at a time, in float32 (float64 for a float64 model). Entry (i, j)
    says how much token j counts in the output of token i; it is exactly 0 for j > i.

    Attributes:
        nheads: heads of the layer.
        values: `(batch, seqlen, nheads, headdim)`, what the operator matrices multiply.
        inputs: `(batch, seqlen, channels)`, what the channels' matrices multiply.
        log_decay: `(batch, seqlen, nheads, rates)`, what each step multiplies the state by, as a logarithm; None for a
            layer without a state.
    """

    nheads: int
    values: Tensor
    inputs: Tensor
    log_decay: Tensor | None = None

    @abstractmethod
    def operator(self, heads: slice = ALL) -> Tensor:
        """`(batch, heads, seqlen, seqlen)`, the operator's matrix of some heads, without the skip D."""

    @abstractmethod
    def unified(self, heads: slice = ALL) -> Tensor:
        """`(batch, heads, seqlen, seqlen)`, the mean of `channel` over the channels of some heads."""

    @abstractmethod
    def channel(self, index: int) -> tuple[Tensor, Tensor]:
        """The exact map of one channel: `matrix @ inputs[:, :, index] + offset` is what enters the output projection.

        Returns:
            `(batch, seqlen, seqlen)`, and the part `(batch, seqlen)` that depends on no token (a convolution's bias).
        """


def look(mixer: nn.Module, u: Tensor) -> LayerView | None:
    """A mixer as matrices at the input `u`.

    Args:
        mixer: `Mamba2` or `Attention`; an `MLP` mixes no tokens.
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
    if isinstance(mixer, MLP):
        return None
    kind = next((kind for kind in VIEWS if isinstance(mixer, kind)), None)
    if kind is None:
        known = ", ".join(sorted(kind.__name__ for kind in VIEWS))
        raise TypeError(f"a {type(mixer).__name__} cannot be written as a matrix here; the known layers are {known}.")
    with torch.no_grad():
        return VIEWS[kind](mixer, u)


class Mamba2View(LayerView):
    """Mamba-2: head h's matrix is (C_i · B_j) exp(Σ_{j<k<=i} Δ_k A) Δ_j, shared by the head's channels."""

    def __init__(self, mixer: Mamba2, u: Tensor):
        dtype = accumulation_dtype(u.dtype)
        heads, groups = (mixer.nheads, mixer.headdim), (mixer.ngroups, mixer.d_state)
        weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
        z, xBC, dt = F.linear(u, mixer.in_proj.weight, mixer.in_proj.bias).split(
            [mixer.d_inner, mixer.conv1d.in_channels, mixer.nheads], dim=-1
        )
        before = causal_conv1d(xBC, weight, bias).y
        x, B, C = F.silu(before).split([mixer.d_inner, groups[0] * groups[1], groups[0] * groups[1]], dim=-1)
        x, B, C = x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups)
        A = -torch.exp(mixer.A_log)
        y = ssd(x, dt, A, B, C, D=mixer.D, dt_bias=mixer.dt_bias, dt_softplus=True, dt_limit=mixer.dt_limit).y
        self.nheads, self.values, self.inputs = mixer.nheads, x.to(dtype), xBC[..., : mixer.d_inner].to(dtype)
        self._dt = F.softplus(dt.to(dtype) + mixer.dt_bias).clamp(*mixer.dt_limit)
        self._dA, self._B, self._C, self._D = self._dt * A, B.to(dtype), C.to(dtype), mixer.D.detach().to(dtype)
        self.log_decay = self._dA.unsqueeze(-1)
        # The three factors of the unified view: SiLU's, by (token, head, channel); the taps; gate and norm.
        self._slope = torch.sigmoid(before[..., : mixer.d_inner].to(dtype)).unflatten(-1, heads)
        self._taps = weight[: mixer.d_inner].to(dtype).unflatten(0, heads)
        self._bias = None if bias is None else bias[: mixer.d_inner].to(dtype).unflatten(0, heads)
        self._gate = _gate_and_norm(mixer, y.flatten(-2).to(dtype), z.to(dtype)).unflatten(-1, heads)

    def operator(self, heads: slice = ALL) -> Tensor:
        """(C_i · B_j) exp(Σ_{j<k<=i} Δ_k A) Δ_j (equation 16 of arXiv 2405.21060), `(batch, heads, seqlen, seqlen)`."""
        group = torch.arange(self.nheads)[heads] // (self.nheads // self._B.shape[2])
        first, last = int(group[0]), int(group[-1]) + 1
        scores = torch.einsum("blgn,bsgn->bgls", self._C[:, :, first:last], self._B[:, :, first:last])
        decay = segment_sum(self._dA[:, :, heads].transpose(1, 2)).exp_()
        return decay.mul_(scores[:, group - first]).mul_(self._dt[:, :, heads].transpose(1, 2).unsqueeze(-2))

    def unified(self, heads: slice = ALL) -> Tensor:
        """Gate, norm, skip, SSD and convolution as one matrix, the mean over a head's channels."""
        inner = self._with_skip(heads)
        gate, slope = self._gate[:, :, heads], self._slope[:, :, heads]
        total = torch.zeros_like(inner)
        for delay, tap in enumerate(self._taps[heads].flip(-1).unbind(-1)):
            # The channels of a head share `inner`; only what surrounds it is averaged, as a product over channels.
            part = torch.einsum("blhp,bshp->bhls", gate * (tap / gate.shape[-1]), slope).mul_(inner)
            total[..., : max(total.shape[-1] - delay, 0)] += part[..., delay:]
        return total

    def channel(self, index: int) -> tuple[Tensor, Tensor]:
        """The map of channel `index` of x, exactly."""
        head, p = divmod(index, self.values.shape[-1])
        after = self._with_skip(slice(head, head + 1))[:, 0] * self._slope[:, None, :, head, p]
        after = after * self._gate[:, :, head, p].unsqueeze(-1)
        bias = 0.0 if self._bias is None else self._bias[head, p]
        matrix = torch.zeros_like(after)
        for delay, tap in enumerate(self._taps[head, p].flip(-1)):
            matrix[..., : max(matrix.shape[-1] - delay, 0)] += tap * after[..., delay:]
        return matrix, after.sum(-1) * bias

    def _with_skip(self, heads: slice) -> Tensor:
        matrix = self.operator(heads)
        matrix.diagonal(dim1=-2, dim2=-1).add_(self._D[heads].unsqueeze(-1))
        return matrix


class AttentionView(LayerView):
    """Softmax attention: its matrix is there already; nothing surrounds it, so that both views agree."""

    def __init__(self, mixer: Attention, u: Tensor):
        dtype = accumulation_dtype(u.dtype)
        q, k, v = (
            F.linear(u, p.weight, p.bias).to(dtype).unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2)
            for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        )
        if mixer.rope_theta is not None:
            positions = torch.arange(u.shape[1], device=u.device).expand(u.shape[:2])
            q, k = rotate(q, positions, mixer.rope_theta), rotate(k, positions, mixer.rope_theta)
        self.nheads, self._shared = q.shape[1], q.shape[1] // k.shape[1]
        self._q, self._k = q * mixer.head_dim**-0.5, k
        self.values = v.repeat_interleave(self._shared, dim=1).transpose(1, 2)
        self.inputs = self.values.flatten(-2)

    def operator(self, heads: slice = ALL) -> Tensor:
        """softmax(q kᵀ / √head_dim) over the tokens so far, `(batch, heads, seqlen, seqlen)`."""
        k = self._k.repeat_interleave(self._shared, dim=1)[:, heads]
        scores = self._q[:, heads] @ k.transpose(-1, -2)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill_(hidden, float("-inf")).softmax(-1)

    def unified(self, heads: slice = ALL) -> Tensor:
        """The operator's matrix."""
        return self.operator(heads)

    def channel(self, index: int) -> tuple[Tensor, Tensor]:
        """The matrix of the channel's head, and no offset."""
        head = index // self.values.shape[-1]
        return self.operator(slice(head, head + 1))[:, 0], self.values.new_zeros(self.values.shape[:2])


def _gate_and_norm(mixer: Mamba2, y: Tensor, z: Tensor) -> Tensor:
    """What the gated norm multiplies y by, `(batch, seqlen, d_inner)`: SiLU(z) times weight over root mean square."""
    norm, gate = mixer.norm, F.silu(z)
    normalised = y if norm.norm_before_gate else y * gate
    group = norm.group_size or y.shape[-1]
    mean = normalised.unflatten(-1, (-1, group)).square().mean(-1, keepdim=True)
    scale = torch.rsqrt(mean + norm.eps).expand(*mean.shape[:-1], group).flatten(-2)
    return gate * scale * norm.weight


VIEWS: dict[type[nn.Module], type] = {Mamba2: Mamba2View, Attention: AttentionView}
