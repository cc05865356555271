"""What every layer has as a matrix over tokens, and how a convolution, a gate and a norm become part of it."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

ALL = slice(None)


class LayerView(ABC):
    """One layer at one text; made by `look`.

    Matrices are computed on request, for some heads at a time, in float32 (float64 for a float64 model). Entry (i, j)
    says how much token j counts in the output of token i; it is exactly 0 for j > i.

    Attributes:
        nheads: heads of the layer.
        inputs: `(batch, seqlen, channels)`, what the channels' matrices multiply: the values before the convolution.
    """

    nheads: int
    inputs: Tensor

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

    def log_decay(self, heads: slice = ALL) -> Tensor | None:
        """`(batch, seqlen, heads, rates)`: the logarithm of what each step multiplies the state by.

        None for a layer without a state.
        """
        return None


class Surroundings:
    """What stands around an operator, once the text is fixed: y = gate · (operator + D) slope · (convolution + bias).

    SiLU(v) = σ(v) v makes the activation after the convolution a factor, and so are the gate and the norm.

    Args:
        gate: `(batch, seqlen, heads, headdim)`.
        slope: as `gate`.
        taps: `(heads, headdim, width)`, the convolution's weights, the present token's last.
        bias: `(heads, headdim)` or None.
    """

    def __init__(self, gate: Tensor, slope: Tensor, taps: Tensor, bias: Tensor | None):
        self.gate, self.slope = gate, slope
        # The present token's tap first: its place is the delay.
        self.taps = taps.detach().flip(-1)
        self.bias = torch.zeros_like(self.taps[..., 0]) if bias is None else bias.detach()


class SurroundedView(LayerView):
    """A layer whose unified matrix follows from `weighted` and from what stands around the operator."""

    around: Surroundings

    @abstractmethod
    def weighted(self, heads: slice, channels: slice, left: Tensor, right: Tensor) -> Tensor:
        """Σ_p left[k, i, p] (operator_p + D_p)[i, j] right[j, p], over some channels p of some heads.

        Args:
            heads: which heads.
            channels: which channels of each.
            left: `(k, batch, seqlen, heads, channels)`, k sums at once.
            right: `(batch, seqlen, heads, channels)`.

        Returns:
            `(k, batch, heads, seqlen, seqlen)`.
        """

    def unified(self, heads: slice = ALL) -> Tensor:
        """Gate, norm, skip, operator and convolution as one matrix, the mean over a head's channels."""
        return self._unified(heads, ALL) / self.around.gate.shape[-1]

    def channel(self, index: int) -> tuple[Tensor, Tensor]:
        """The map of one channel, exactly."""
        head, p = divmod(index, self.around.gate.shape[-1])
        heads, channels = slice(head, head + 1), slice(p, p + 1)
        gate, slope = (t[:, :, heads, channels] for t in (self.around.gate, self.around.slope))
        through = self.weighted(heads, channels, gate.unsqueeze(0), slope)[0, :, 0]
        return self._unified(heads, channels)[:, 0], through.sum(-1) * self.around.bias[head, p]

    def _unified(self, heads: slice, channels: slice) -> Tensor:
        around = self.around
        taps = around.taps[heads, channels].movedim(-1, 0)
        left = around.gate[:, :, heads, channels] * taps[:, None, None]
        parts = self.weighted(heads, channels, left, around.slope[:, :, heads, channels])
        total, seqlen = parts[0], parts.shape[-1]
        # A tap reads an earlier token: its columns move to the left.
        for delay in range(1, min(len(parts), seqlen)):
            total[..., : seqlen - delay] += parts[delay, ..., delay:]
        return total
