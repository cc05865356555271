"""Mamba as matrices over tokens (arXiv 2403.01590): one a channel, shown as means over groups of channels.

Channel c multiplies by W_c[i, j] = Σ_n C_i[n] exp(A_c[n] Σ_{j<k<=i} Δ_k[c]) B_j[n] Δ_j[c]. There are as many of these
as channels, about a hundred times the heads of attention. A weighted sum of them needs no single one: across any token
r between j and i the exponential is a product of a part of i and a part of j, so that the entries on one side of r are
one matrix product over channels and states. Halving the text again and again reaches every entry once, and no exponent
is positive.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.inspect.layer import ALL, SurroundedView, Surroundings
from dualscan.nn.mamba import Mamba
from dualscan.nn.precision import apply_linear
from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.conv1d import causal_conv1d

# Channels that make a head of the view, where they divide the layer's: as many as a Mamba-2 head has.
GROUP = 64


class MambaView(SurroundedView):
    """Mamba: a head is the mean of a group of channels, 64 or the largest divisor of 64 that divides them."""

    def __init__(self, mixer: Mamba, u: Tensor):
        dtype, size = accumulation_dtype(u.dtype), math.gcd(mixer.d_inner, GROUP)
        self.nheads = mixer.d_inner // size
        groups = (self.nheads, size)
        weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
        x, z = apply_linear(mixer.in_proj, u).chunk(2, dim=-1)
        before = causal_conv1d(x, weight, bias).y
        dt, B, C = mixer.select(F.silu(before))
        self.inputs = x.to(dtype)
        self._B, self._C = B.to(dtype), C.to(dtype)
        self._dt = F.softplus(mixer.dt_proj(dt).to(dtype) + mixer.dt_proj.bias).to(dtype).unflatten(-1, groups)
        self._A = -torch.exp(mixer.A_log.detach()).to(dtype).unflatten(0, groups)
        self._D = mixer.D.detach().to(dtype).unflatten(0, groups)
        self.around = Surroundings(
            gate=F.silu(z).to(dtype).unflatten(-1, groups),
            slope=torch.sigmoid(before.to(dtype)).unflatten(-1, groups),
            taps=weight.to(dtype).unflatten(0, groups),
            bias=None if bias is None else bias.to(dtype).unflatten(0, groups),
        )

    def operator(self, heads: slice = ALL) -> Tensor:
        """The mean of W_c over the channels of some groups, `(batch, heads, seqlen, seqlen)`."""
        dt, A = self._dt[:, :, heads], self._A[heads]
        ones = torch.ones_like(dt)
        return mean_of_scans(dt, A, self._B, self._C, ones.unsqueeze(0) / dt.shape[-1], ones)[0]

    def weighted(self, heads: slice, channels: slice, left: Tensor, right: Tensor) -> Tensor:
        """The weighted sum of W_c + D_c over some channels."""
        sums = mean_of_scans(self._dt[:, :, heads, channels], self._A[heads, channels], self._B, self._C, left, right)
        skip = torch.einsum("kbthp,bthp,hp->kbht", left, right, self._D[heads, channels])
        sums.diagonal(dim1=-2, dim2=-1).add_(skip)
        return sums

    def log_decay(self, heads: slice = ALL) -> Tensor:
        """Δ_t[c] A_c[n], the rates of all channels and states of a group."""
        return (self._dt[:, :, heads].unsqueeze(-1) * self._A[heads]).flatten(-2)


def mean_of_scans(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ_p left[k, i, p] W_p[i, j] right[j, p] for every group of channels p, W the matrix of Mamba's scan.

    Args:
        dt: `(batch, seqlen, groups, p)`, Δ.
        A: `(groups, p, n)`, negative.
        B: `(batch, seqlen, n)`.
        C: `(batch, seqlen, n)`.
        left: `(k, batch, seqlen, groups, p)`.
        right: `(batch, seqlen, groups, p)`.

    Returns:
        `(k, batch, groups, seqlen, seqlen)`, exactly 0 above the diagonal.

    Note:
        k seqlen² p n FLOPs a group, and (k + 1) seqlen p n / 2 numbers of memory a group beside the result.
    """
    seqlen = dt.shape[1]
    length = 1 << max(seqlen - 1, 0).bit_length()
    # Up to a power of two with tokens that neither read nor write.
    dt, B, C, left, right = (
        F.pad(t, (*(0, 0) * (t.ndim - 1 - axis), 0, length - seqlen))
        for t, axis in ((dt, 1), (B, 1), (C, 1), (left, 2), (right, 1))
    )
    # Groups before tokens: then tokens and the pairs (channel, state) that are summed lie as matrix products want them.
    dt, right, left = dt.transpose(1, 2), (right * dt).transpose(1, 2), left.permute(1, 3, 2, 0, 4)
    B, C = B.unsqueeze(1), C.unsqueeze(1)
    out = left.new_zeros(left.shape[3], *left.shape[:2], length, length)
    present = (left * right.unsqueeze(3)).sum(-1) * (B * C).sum(-1, keepdim=True)
    out.diagonal(dim1=-2, dim2=-1).copy_(present.movedim(-1, 0))
    half = 1
    while half < length:
        # Blocks of 2 `half` tokens: rows of the second half read columns of the first across the token between.
        split = (-1, 2, half)
        early, late = dt.unflatten(2, split).unbind(3)
        since = late.cumsum(3)
        # Summed from the end: a difference of sums would cancel where little is between.
        until = F.pad(early.flip(3).cumsum(3).flip(3)[:, :, :, 1:], (0, 0, 0, 1))
        rows = _decayed(since, A, C.unflatten(2, split)[:, :, :, 1]).unsqueeze(4)
        rows = rows * left.unflatten(2, split)[:, :, :, 1].unsqueeze(-1)
        columns = _decayed(until, A, B.unflatten(2, split)[:, :, :, 0])
        columns *= right.unflatten(2, split)[:, :, :, 0].unsqueeze(-1)
        product = rows.flatten(-2).flatten(3, 4) @ columns.flatten(-2).transpose(-1, -2)
        blocks = out.unflatten(-1, split).unflatten(-4, split)[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2)
        # (batch, groups, blocks, row, k, column) into (k, batch, groups, row, column, blocks)
        blocks.copy_(product.unflatten(3, (half, -1)).permute(4, 0, 1, 3, 5, 2))
        half *= 2
    return out[..., :seqlen, :seqlen]


def _decayed(steps: Tensor, A: Tensor, through: Tensor) -> Tensor:
    """exp(A · steps) · through, `(batch, groups, blocks, tokens, p, n)`; `steps` has no n and `through` no p."""
    factors = (steps.unsqueeze(-1) * A[:, None, None]).exp_()
    return factors.mul_(through.unsqueeze(-2))
