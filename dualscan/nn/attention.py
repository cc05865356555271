"""Causal softmax attention with grouped key-value heads (arXiv 2305.13245) and rotary positions (arXiv 2104.09864)."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualscan.nn.precision import apply_linear
from dualscan.ops.conv1d import causal_conv1d
from dualscan.ops.conv1d.validate import MAX_WIDTH
from dualscan.ops.varlen import sequence_index, sequence_spans, validate_cu_seqlens


class AttentionState(NamedTuple):
    """Keys and values of all tokens so far, rotated if the layer rotates; grows by each token, unlike an SSM state.

    Sequences of different lengths end at the same index: entry `i` holds its `lengths[i]` tokens last and zeros before
    them, so that the next token of each is appended at the same place.

    Attributes:
        k: `(batch or nseq, n_kv_heads, maxlen, head_dim)`.
        v: as `k`.
        lengths: `(batch or nseq,)` int64.
        conv: `(batch or nseq, (n_heads + 2 n_kv_heads) head_dim, d_conv - 1)`, the last inputs of the convolution;
            without channels where the layer has none.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor
    conv: Tensor


class _Cache(NamedTuple):
    """The part of the state that attention itself reads."""

    k: Tensor
    v: Tensor
    lengths: Tensor


class Attention(nn.Module):
    """Causal self-attention mixer: `(batch, seqlen, d_model)` in and out.

    y[t] = out_proj(sum_s softmax_s(q[t] · k[s] / √head_dim) v[s]) over s <= t of the same sequence. Head h of q uses
    key-value head h // (n_heads // n_kv_heads).

    The number of heads is read from the projections' outputs, so that they can be sharded by heads.

    Args:
        d_model: width of the residual stream.
        n_heads: query heads.
        n_kv_heads: key and value heads, a divisor of `n_heads`; None takes `n_heads`.
        head_dim: width of a head; None takes `d_model / n_heads`.
        rope_theta: base of the rotary position's wavelengths; None leaves positions out.
        rotary_dim: the first so many channels of a head are rotated; None takes all.
        bias: bias on the four projections.
        scale: of the scores; None takes 1 / √head_dim.
        d_conv: width of a causal convolution over q, k and v before the positions; None has none.
        d_out: width of the result; None takes `d_model`.

    Raises:
        ValueError: sizes that do not divide, or an odd number of channels to rotate.

    Example:
        >>> layer = Attention(64, 4, n_kv_heads=2, rope_theta=1e4)
        >>> u = torch.randn(2, 10, 64)
        >>> y, state = layer(u[:, :7])
        >>> y2, state = layer(u[:, 7:], state)
        >>> torch.allclose(torch.cat([y, y2], 1), layer(u)[0], atol=1e-5)
        True

    Note:
        4 seqlen² n_heads head_dim / 2 FLOPs a sequence besides the projections. The state is a value: each call copies
        the keys and values that it extends, about as many bytes as attention reads.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = None,
        rotary_dim: int | None = None,
        bias: bool = False,
        scale: float | None = None,
        d_conv: int | None = None,
        d_out: int | None = None,
    ):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads={n_kv_heads} does not divide n_heads={n_heads}; use 1 or another divisor.")
        self.head_dim = self.default_head_dim(d_model, n_heads) if head_dim is None else head_dim
        if rope_theta is not None and rotary_dim is None and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd, but rotary positions turn pairs of channels; "
                "use an even head_dim or rope_theta=None."
            )
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        if rope_theta is not None and (self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim):
            raise ValueError(
                f"rotary_dim={rotary_dim} must be an even number from 2 to head_dim={self.head_dim}: "
                "rotary positions turn pairs of channels."
            )
        if d_conv is not None and not 1 <= d_conv <= MAX_WIDTH:
            raise ValueError(f"d_conv={d_conv}: attention's convolution is 1 to {MAX_WIDTH} tokens wide, or None.")
        self.d_model, self.rope_theta, self.scale = d_model, rope_theta, scale
        self.q_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(n_heads * self.head_dim, d_model if d_out is None else d_out, bias=bias)
        self.conv1d = None
        if d_conv is not None:
            # Holds the weights (channels of q, k and v, 1, d_conv); the operator computes.
            channels = (n_heads + 2 * n_kv_heads) * self.head_dim
            self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels)

    @staticmethod
    def default_head_dim(d_model: int, n_heads: int) -> int:
        """`d_model / n_heads`.

        Raises:
            ValueError: it is not a whole number.
        """
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads={n_heads} does not divide d_model={d_model}; use a divisor, or give head_dim.")
        return d_model // n_heads

    def forward(
        self,
        u: Tensor,
        state: AttentionState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        adapters: Iterable[nn.Module] | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """Training, prefill, chunked prefill and one-token steps alike.

        Args:
            u: `(batch, seqlen, d_model)`.
            state: what a previous call returned, or None for the start of a sequence; not modified.
            cu_seqlens: `(nseq + 1,)` int32 boundaries of sequences packed along time; batch must be 1. Reads them on
                the host.
            adapters: maps whose results are added to those of the projections of q, k and v.

        Returns:
            y like `u`, and the state after the last token (of every packed sequence).

        Raises:
            ValueError: `u`, `cu_seqlens` or the number of sequences in the state does not fit.
        """
        if u.ndim != 3 or u.shape[-1] != self.d_model:
            raise ValueError(
                f"Attention: u has shape {tuple(u.shape)}; expected (batch, seqlen, d_model={self.d_model})."
            )
        batch, seqlen, _ = u.shape
        nseq = batch
        if cu_seqlens is not None:
            validate_cu_seqlens(cu_seqlens, batch=batch, seqlen=seqlen, device=u.device, name="Attention")
            nseq = cu_seqlens.shape[0] - 1
        if state is not None and state.k.shape[0] != nseq:
            raise ValueError(
                f"Attention: the state holds {state.k.shape[0]} sequences, the input {nseq}; give its own state."
            )
        qkv = [apply_linear(p, u) for p in (self.q_proj, self.k_proj, self.v_proj)]
        if adapters is not None:
            qkv = [t + adapter(u) for t, adapter in zip(qkv, adapters, strict=True)]
        conv = u.new_zeros(nseq, 0, 0)
        if self.conv1d is not None:
            joined, conv = causal_conv1d(
                torch.cat(qkv, dim=-1),
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                initial_states=None if state is None else state.conv.to(u.dtype),
                cu_seqlens=cu_seqlens,
            )
            qkv = joined.split([t.shape[-1] for t in qkv], dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in qkv)
        past = torch.zeros(nseq, dtype=torch.int64, device=u.device) if state is None else state.lengths
        if self.rope_theta is not None:
            positions = _positions(past, seqlen, cu_seqlens)
            q, k = (rotate(t, positions, self.rope_theta, self.rotary_dim) for t in (q, k))
        if cu_seqlens is None:
            y, cache = _attend(q, k, v, state, self.scale)
        else:
            y, cache = _attend_packed(q, k, v, state, sequence_spans(cu_seqlens, seqlen), self.scale)
        y = y.transpose(1, 2).flatten(-2)
        return apply_linear(self.out_proj, y), AttentionState(*cache, conv)


def rotate(x: Tensor, positions: Tensor, theta: float, width: int | None = None) -> Tensor:
    """Rotary positions: turns channels (i, i + width / 2) by the angle `position * theta^(-2 i / width)`.

    Args:
        x: `(batch, heads, seqlen, head_dim)`.
        positions: `(batch, seqlen)`.
        theta: base of the wavelengths.
        width: the first so many channels are turned, the others left as they are; None is head_dim.

    Returns:
        Like `x`; angles are computed in float32 (float64 for float64).
    """
    half = (x.shape[-1] if width is None else width) // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** (torch.arange(half, device=x.device, dtype=dtype) / -half)
    angle = positions[:, None, :, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x.dtype)


def _positions(past: Tensor, seqlen: int, cu_seqlens: Tensor | None) -> Tensor:
    """`(batch, seqlen)`: each token's position in its own sequence, `past` `(nseq,)` tokens included."""
    steps = torch.arange(seqlen, device=past.device)
    if cu_seqlens is None:
        return past[:, None] + steps
    return (steps + (past - cu_seqlens[:-1])[sequence_index(cu_seqlens, seqlen)])[None]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState | _Cache | None, scale: float | None
) -> tuple[Tensor, _Cache]:
    """Attention of new tokens to themselves and to the state, whose sequences may have different lengths."""
    batch, _, seqlen, _ = q.shape
    if state is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale)
        return y, _Cache(k, v, torch.full((batch,), seqlen, dtype=torch.int64, device=q.device))
    maxlen = state.k.shape[2]
    k, v = torch.cat((state.k.to(k.dtype), k), dim=2), torch.cat((state.v.to(v.dtype), v), dim=2)
    key = torch.arange(maxlen + seqlen, device=q.device)
    visible = key <= maxlen + torch.arange(seqlen, device=q.device)[:, None]
    visible = visible & (key >= maxlen - state.lengths[:, None, None, None])
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True, scale=scale)
    return y, _Cache(k, v, state.lengths + seqlen)


def _attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: AttentionState | _Cache | None,
    spans: list[tuple[int, int]],
    scale: float | None,
) -> tuple[Tensor, _Cache]:
    """Each packed sequence by itself: no work across boundaries, and the result of the sequence alone."""
    pasts = [0] * len(spans) if state is None else state.lengths.tolist()
    outputs, states = [q[:, :, :0]], []
    for i, ((start, end), past) in enumerate(zip(spans, pasts, strict=True)):
        own = None
        if state is not None:
            first = state.k.shape[2] - past
            own = _Cache(state.k[i : i + 1, :, first:], state.v[i : i + 1, :, first:], state.lengths[i : i + 1])
        y, own = _attend(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], own, scale)
        outputs.append(y)
        states.append(own)
    return torch.cat(outputs, dim=2), _stack(states, k)


def _stack(states: list[_Cache], like: Tensor) -> _Cache:
    """One state of sequences that end at the same index; `like` gives the heads and the dtype where there is none."""
    maxlen = max((state.k.shape[2] for state in states), default=0)

    def align(tensors: list[Tensor]) -> Tensor:
        padded = [F.pad(t, (0, 0, maxlen - t.shape[2], 0)) for t in tensors]
        return torch.cat([like.new_zeros(0, like.shape[1], maxlen, like.shape[3]), *padded])

    lengths = [torch.zeros(0, dtype=torch.int64, device=like.device), *(state.lengths for state in states)]
    return _Cache(align([s.k for s in states]), align([s.v for s in states]), torch.cat(lengths))
