"""The specification of the causal depthwise convolution: each sequence on its own, in plain differentiable PyTorch."""

import torch
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.varlen import sequence_spans


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """`y[t] = act(bias + sum_j weight[:, j] * x[t - (width - 1) + j])`, where `x[-k]` is read from the initial state.

    Args:
        x: `(batch, seqlen, channels)`.
        weight: `(channels, width)`, the newest tap last.
        bias: `(channels,)` or None.
        initial_states: `(batch or nseq, channels, width - 1)`, oldest first, or None for zeros.
        cu_seqlens: `(nseq + 1,)` int32 boundaries, or None.
        silu: whether the activation is SiLU.

    Returns:
        `y` like `x`, and the final states like the initial ones: the last `width - 1` inputs, the initial state
        included.
    """
    dtype = accumulation_dtype(x.dtype)
    halo = weight.shape[1] - 1
    if cu_seqlens is None:
        sequences = list(x.unbind(0))
    else:
        sequences = [x[0, start:end] for start, end in sequence_spans(cu_seqlens, x.shape[1])]
    outputs, finals = [x.new_empty(0, x.shape[2])], [x.new_empty(0, x.shape[2], halo)]
    for i, sequence in enumerate(sequences):
        past = sequence.new_zeros(halo, x.shape[2]) if initial_states is None else initial_states[i].t()
        extended = torch.cat((past, sequence))
        taps = [extended[j : j + len(sequence)].to(dtype) * weight[:, j].to(dtype) for j in range(halo + 1)]
        y = torch.stack(taps).sum(0)
        if bias is not None:
            y = y + bias.to(dtype)
        if silu:
            y = y * torch.sigmoid(y)
        outputs.append(y.to(x.dtype))
        finals.append(extended[len(sequence) :].t()[None])
    return torch.cat(outputs).view(x.shape), torch.cat(finals)
