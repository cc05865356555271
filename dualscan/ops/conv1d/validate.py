"""The shape, dtype and device contract of `causal_conv1d`, by named dimension."""

from torch import Tensor

from dualscan.ops.varlen import validate_cu_seqlens

MAX_WIDTH = 8
ACTIVATIONS = (None, "silu", "swish")


def validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises `ValueError` or `TypeError` with the value given, what is allowed and the fix."""
    if x.ndim != 3:
        raise ValueError(f"causal_conv1d: x has shape {tuple(x.shape)}; expected (batch, seqlen, channels).")
    batch, seqlen, channels = x.shape
    if not x.dtype.is_floating_point:
        raise TypeError(f"causal_conv1d: x has dtype {x.dtype}; use a floating-point dtype (x.float()).")
    if weight.ndim != 2 or weight.shape[0] != channels:
        raise ValueError(
            f"causal_conv1d: weight has shape {tuple(weight.shape)}; expected (channels={channels}, width)"
            " (a Conv1d weight (channels, 1, width): weight.squeeze(1))."
        )
    width = weight.shape[1]
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"causal_conv1d: width={width} (weight.shape[1]) is not in 1 to {MAX_WIDTH}.")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"causal_conv1d: bias has shape {tuple(bias.shape)}; expected (channels={channels},).")
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d: activation={activation!r} does not exist; use None, 'silu' or 'swish'.")
    for name, tensor in (("weight", weight), ("bias", bias), ("initial_states", initial_states)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"causal_conv1d: {name} is on {tensor.device}, x on {x.device}; move it there.")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"causal_conv1d: {name} has dtype {tensor.dtype}; use a floating-point dtype.")
    nseq, count = batch, "batch"
    if cu_seqlens is not None:
        validate_cu_seqlens(cu_seqlens, batch=batch, seqlen=seqlen, device=x.device, name="causal_conv1d")
        nseq, count = cu_seqlens.shape[0] - 1, "nseq"
    if initial_states is None:
        return
    if initial_states.shape != (nseq, channels, width - 1):
        raise ValueError(
            f"causal_conv1d: initial_states has shape {tuple(initial_states.shape)};"
            f" expected ({count}={nseq}, channels={channels}, width-1={width - 1})."
        )
    if initial_states.dtype != x.dtype:
        raise TypeError(
            f"causal_conv1d: initial_states has dtype {initial_states.dtype}, x has {x.dtype};"
            " the state holds inputs, use initial_states.to(x.dtype)."
        )
