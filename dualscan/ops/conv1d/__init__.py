"""Causal depthwise convolution with an activation: the short convolution before the SSD (arXiv 2405.21060, section 7).

Over packed sequences and with states in and out, so that training, prefill, chunked prefill and one-token steps are one
call.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dualscan.ops import _numba, _triton
from dualscan.ops._dispatch import Impl, Operator, announce_slow_path, anywhere, choose, register
from dualscan.ops._launch import unsupported
from dualscan.ops.conv1d.library import causal_conv1d_fwd, causal_conv1d_kernel_fwd, causal_conv1d_numba_fwd
from dualscan.ops.conv1d.reference import causal_conv1d_reference
from dualscan.ops.conv1d.validate import validate

_OPERATOR = register(
    Operator(
        name="causal_conv1d",
        impls={
            "triton": _triton.obstacle,
            "numba": _numba.obstacle,
            "chunked": anywhere,
            "reference": anywhere,
        },
        preference=("triton", "numba", "chunked", "reference"),
    )
)
_RUN = {
    "triton": causal_conv1d_kernel_fwd,
    "numba": causal_conv1d_numba_fwd,
    "chunked": causal_conv1d_fwd,
    "reference": causal_conv1d_reference,
}


class Conv1dOutput(NamedTuple):
    """What `causal_conv1d` returns.

    Attributes:
        y: `(batch, seqlen, channels)` in the dtype of `x`.
        final_states: `(batch or nseq, channels, width - 1)` in the dtype of `x`: each sequence's last `width - 1`
            inputs, oldest first, continued into its initial state where it is shorter. It goes in as `initial_states`
            of what follows.
    """

    y: Tensor
    final_states: Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu", "swish"] | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> Conv1dOutput:
    """Convolves every channel with its own short causal filter, then applies the activation.

    `y[t] = act(bias + sum_j weight[:, j] * x[t - (width - 1) + j])`, where positions before the start of a sequence are
    read from its initial state (zeros by default). This is the depthwise `conv` of the Mamba-2 block, arXiv 2405.21060,
    figure 6.

    Args:
        x: `(batch, seqlen, channels)` float; any strides: a column slice of a wider projection is read in place.
        weight: `(channels, width)` float, width 1 to 8, the newest tap last.
        bias: `(channels,)` float.
        activation: "silu" (also called "swish") or None.
        initial_states: `(batch or nseq, channels, width - 1)` in the dtype of `x`, oldest input first.
        cu_seqlens: `(nseq + 1,)` int32 boundaries of packed sequences; batch must be 1.
        impl: "auto", "triton" (kernels for NVIDIA GPUs), "numba" (kernels for CPUs; float32 and bfloat16), "chunked"
            (blocks of time), or "reference" (each sequence alone, plain differentiable PyTorch).

    Returns:
        `Conv1dOutput(y, final_states)`. Differentiable once in `x`, `weight`, `bias` and `initial_states`.

    Raises:
        ValueError: a shape, a device, the activation, `impl` or the boundaries do not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> import torch
        >>> x, weight = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[10.0, 1.0]])
        >>> y, states = causal_conv1d(x, weight)
        >>> y.flatten().tolist(), states.flatten().tolist()
        ([1.0, 12.0, 23.0], [3.0])
        >>> causal_conv1d(torch.tensor([[[4.0]]]), weight, initial_states=states).y.item()  # one more token
        34.0

    Note:
        `2 * batch * seqlen * channels * width` FLOPs; reads `x` and writes `y` once, which is what takes the time. Sums
        are in float32 (float64 for float64). The final state's memory is time-major, which the one-token step reads
        fastest.
    """
    validate(x, weight, bias, activation, initial_states, cu_seqlens)
    run = _RUN[_form(impl, x)]
    return Conv1dOutput(*run(x, weight, bias, initial_states, cu_seqlens, activation is not None))


def _form(impl: str, x: Tensor) -> str:
    """The implementation that runs; `auto` says once why it leaves the kernels on a GPU."""
    form = impl if impl == "triton" and _triton.interpreted() else choose(_OPERATOR, impl, x.device)
    reason = None
    if form in ("triton", "numba"):
        reason = unsupported(x.dtype) if form == "triton" else _numba.unsupported(x.dtype)
    if reason is not None and impl == form:
        raise ValueError(f"causal_conv1d: impl={impl!r} cannot run on these inputs: {reason}; use impl='auto'.")
    if impl == "auto" and x.is_cuda and not torch.compiler.is_compiling():
        slow = reason or _triton.obstacle(x.device)
        if slow is not None:
            announce_slow_path("causal_conv1d", "cuda", slow)
    return form if reason is None else "chunked"
