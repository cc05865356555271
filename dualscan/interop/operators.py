"""Our operators in the shape of the functions that transformers' Mamba-2 mixers call.

The mixers of `transformers` hold no kernels: their modules call five functions by name, which take channels before
time, per-head values expanded to every channel, and caches that are written in place. Here are these signatures over
`causal_conv1d`, `ssd` and `ssd_step`. A function answers `NotImplemented` for what our operators do not cover.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualscan.ops.conv1d import causal_conv1d
from dualscan.ops.conv1d.validate import ACTIVATIONS, MAX_WIDTH
from dualscan.ops.ssd import ssd, ssd_step


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Any = None,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The short convolution over `(batch, channels, seqlen)`."""
    if not _convolves(weight, activation):
        return NotImplemented
    x = hidden_states.transpose(1, 2)
    if seq_idx is None:
        return causal_conv1d(x, weight, bias, activation=activation).y.transpose(1, 2)
    (packed,), cu_seqlens = _pack(seq_idx, x)
    y = causal_conv1d(packed, weight, bias, activation=activation, cu_seqlens=cu_seqlens).y
    return y.view(x.shape).transpose(1, 2)


def causal_conv1d_update(
    hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None
) -> Tensor:
    """The short convolution of new tokens after the cache `(batch, channels, width)`, which is written in place."""
    if not _convolves(weight, activation):
        return NotImplemented
    width = conv_state.shape[-1]
    before = conv_state[..., width - weight.shape[-1] + 1 :].to(hidden_states.dtype)
    x = hidden_states.transpose(1, 2)
    y = causal_conv1d(x, weight, bias, activation=activation, initial_states=before).y
    conv_state.copy_(torch.cat((conv_state, hidden_states.to(conv_state.dtype)), dim=-1)[..., -width:])
    return y.transpose(1, 2)


def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """SSD over sequences. `chunk_size` changes rounding only, so the operator keeps its own."""
    shared: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": tuple(dt_limit)}
    if seq_idx is None:
        before = None if initial_states is None else _state(initial_states, hidden_states)
        y, after = ssd(hidden_states, dt, A, B, C, z=z, initial_states=before, **shared)
        return (y, after) if return_final_states else y
    if initial_states is not None or return_final_states:
        raise ValueError(
            "mamba2_chunk_scan: seq_idx packs sequences that a cache cannot hold; train with use_cache=False."
        )
    (x, dt, B, C), cu_seqlens = _pack(seq_idx, hidden_states, dt, B, C)
    z = None if z is None else z.reshape(x.shape)
    return ssd(x, dt, A, B, C, z=z, cu_seqlens=cu_seqlens, **shared).y.view(hidden_states.shape)


def mamba2_selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **_: Any,
) -> Tensor:
    """One token of SSD; the cache `state` is written in place. The channels of a head must share decay and step."""
    if not all(_repeats(t, *dims) for t, *dims in ((dt, 2), (A, 1, 2), (D, 1), (dt_bias, 1))):
        return NotImplemented
    D, dt_bias = (None if t is None else t[:, 0] for t in (D, dt_bias))
    before = _state(state, hidden_states)
    y, after = ssd_step(
        before, hidden_states, dt[..., 0], A[:, 0, 0], B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus
    )
    state.copy_(after)
    return y


def mamba2_split_conv1d_scan_combined(*_: Any, **__: Any) -> None:
    """Declines the fused training path, so that a mixer takes its own steps through the functions above.

    A function from projection to projection sees neither the padding mask, which belongs between convolution and scan,
    nor how the family's norm is grouped: a padded batch or a grouped model would train on other values than it is
    evaluated with.
    """
    return


OFFERED: tuple[Callable[..., Any], ...] = (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
    mamba2_split_conv1d_scan_combined,
)


def _convolves(weight: Tensor, activation: Any) -> bool:
    return activation in ACTIVATIONS and weight.shape[-1] <= MAX_WIDTH


def _state(state: Tensor, x: Tensor) -> Tensor:
    """A cached state in the dtype that the operators keep states in."""
    return state.to(torch.promote_types(x.dtype, torch.float32))


def _repeats(t: Tensor | None, *dims: int) -> bool:
    """Whether `t` is one value expanded along `dims`, so that its first entry stands for all."""
    return t is None or all(t.stride(dim) == 0 or t.shape[dim] == 1 for dim in dims)


def _pack(seq_idx: Tensor, *tensors: Tensor) -> tuple[list[Tensor], Tensor]:
    """Rows `(batch, seqlen, ...)` laid end to end, and the boundaries where `seq_idx` `(batch, seqlen)` or the row
    changes."""
    changes = torch.ones_like(seq_idx, dtype=torch.bool)
    changes[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = changes.flatten().nonzero().flatten()
    cu_seqlens = torch.cat((starts, starts.new_tensor([seq_idx.numel()]))).to(torch.int32)
    return [t.reshape(1, -1, *t.shape[2:]) for t in tensors], cu_seqlens
