"""RMSNorm as a module."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualscan.nn.precision import Float32Parameters
from dualscan.ops import _triton, decode
from dualscan.ops.norm import add_rms_norm, rms_norm


class RMSNorm(Float32Parameters):
    """Divides each row by its root mean square and scales it by a learned weight (arXiv 1910.07467).

    The weight stays in float32 when the model is cast to a lower precision; the output has the dtype of the input.

    Args:
        d: size of the last dimension.
        eps: added to the mean square.

    Example:
        >>> norm = RMSNorm(4).bfloat16()
        >>> norm.weight.dtype, norm(torch.ones(2, 4, dtype=torch.bfloat16)).dtype
        (torch.float32, torch.bfloat16)
    """

    float32_parameters = ("weight",)

    def __init__(self, d: int, *, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `(..., d)`."""
        if x.numel() == x.shape[-1] and x.dtype == self.weight.dtype and not torch.is_grad_enabled():
            # A decoding step of one row: PyTorch's own operator has the smallest overhead.
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        """The arguments, for `print(model)`."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def adds_in_norms(h: Tensor) -> bool:
    """Whether a layer's output should wait for the next norm, which adds it to the residual stream h on its way."""
    return h.dtype == torch.float32 and _triton.obstacle(h.device) is None


def add_and_norm(norm: RMSNorm, h: Tensor, y: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`h + y` and `norm(h + y)`, as one operation unless the norm has hooks or is not what it was made as.

    Args:
        norm: before the next matrix.
        h: the residual stream, `(..., d)`.
        y: what is added to it, of any dtype; None: nothing.
        dtype: of the norm's output.
    """
    hooks = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    if type(norm) is RMSNorm and not hooks and "forward" not in norm.__dict__:
        return add_rms_norm(h, y, norm.weight, eps=norm.eps, dtype=dtype)
    h = h if y is None else h + y
    return h, norm(h).to(dtype)


def project_normed(h: Tensor, norm: RMSNorm, weight: Tensor) -> Tensor | None:
    """`norm(h) weight^T` as one kernel: the end of a decoding step, which runs from cold caches.

    Args:
        h: `(..., in)` float32.
        norm: before the projection.
        weight: `(out, in)`.

    Returns:
        `(..., out)` like weight, or None where there is no such kernel: it takes few rows on a CPU, without gradients.
    """
    if h.numel() > decode.MOST_ROWS * h.shape[-1] or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if norm._forward_hooks or norm._forward_pre_hooks or torch.is_autocast_enabled(h.device.type):
        return None
    rows = h.reshape(-1, h.shape[-1])
    if not len(rows) or not decode.runs(rows, norm.weight) or not decode.takes(weight):
        return None
    return decode.project(rows, weight, norm=norm.weight, eps=norm.eps).view(*h.shape[:-1], -1)
