"""Kernel feature maps by name, with the parameters that some of them have (section 9.4.3 of arXiv 2405.21060)."""

from torch import Tensor, nn

from dualscan.nn.features.stages import MAX_LENGTH, Cosformer, Stage, build
from dualscan.ops.sma import features


class FeatureMap(nn.Module):
    """ψ for queries and keys (C and B of a state space), one map or several in a row.

    Args:
        name: "identity", "silu", "exp", "relu", "elu_plus_one", "layer_norm", "rms_norm", "l2_norm", "square",
            "taylor", "cosformer", "rfa", "performer", or several joined by "+": "silu+taylor" is taylor(silu(x)),
            "layer_norm+square" is ReBased. Norms have a weight for queries and one for keys.
        d: width of queries and keys.
        max_length: M of cosFormer, the distance at which its weights reach 0; longer ones are negative.

    Raises:
        ValueError: an unknown map, or one that must come last and does not.

    Example:
        >>> import torch
        >>> psi = FeatureMap("silu+taylor", 16)
        >>> q, k = psi(torch.randn(2, 10, 4, 16), torch.randn(2, 10, 4, 16))
        >>> q.shape[-1] == psi.size
        True
    """

    def __init__(self, name: str, d: int, *, max_length: int = MAX_LENGTH):
        super().__init__()
        self.name, self.d, self.size = name, d, features.feature_size(name, d)
        self.stages = nn.ModuleList()
        for stage in features.stages(name):
            self.stages.append(build(stage, d, max_length))
            d = features.SIZES[stage](d)

    def forward(self, q: Tensor, k: Tensor, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ψ(q) and ψ(k).

        Args:
            q: `(batch, seqlen, heads, d)`; positions count from the start of the call, or of each packed sequence.
            k: the same, of any number of heads.
            cu_seqlens: `(nseq + 1,)` int32 boundaries of packed sequences; only cosFormer looks at them.

        Returns:
            `(batch, seqlen, heads, size)` each.
        """
        for stage in self.stages:
            assert isinstance(stage, Stage)
            q, k = stage(q, "q", cu_seqlens), stage(k, "k", cu_seqlens)
        return q, k

    def advance(self, state: Tensor, seqlen: int, cu_seqlens: Tensor | None = None) -> Tensor:
        """A state after `seqlen` tokens `(batch or nseq, nheads, headdim, size)`, as the next call wants it."""
        last = self.stages[-1]
        return last.advance(state, seqlen, cu_seqlens) if isinstance(last, Cosformer) else state

    def extra_repr(self) -> str:
        return f"{self.name}, {self.d} -> {self.size}"
