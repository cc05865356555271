"""Structured masked attention: Y = (L ∘ Q Kᵀ) V with any structured matrix L (section 4 of arXiv 2405.21060)."""

import torch
from torch import Tensor

from dualscan.ops._autograd import without_autocast
from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.sma import masks
from dualscan.ops.sma.heads import HeadCounts, expand_heads, head_counts, pattern_name
from dualscan.ops.ssd import linear_attention
from dualscan.ops.ssd.validate import FLOATING, dimensions, same_kind
from dualscan.semiseparable import Dense, OneSemiseparable, StructuredMatrix

__all__ = ["sma"]

IMPLS = ("auto", "ssd", "linear", "quadratic")
# Elements of contract(V, K) that the linear order holds at a time: on a CPU they and their Fourier transforms stay in
# the second-level cache, which makes it 2 to 4 times faster; elsewhere this bounds the memory.
CPU_SLICE = 2**17
DEVICE_SLICE = 2**24


def sma(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: StructuredMatrix | Tensor,
    *,
    head_pattern: str | None = None,
    normalize: bool = False,
    causal: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Structured masked attention, y_t = Σ_s L_ts (q_t · k_s) v_s (section 4.3 of arXiv 2405.21060).

    The quadratic order computes (L ∘ Q Kᵀ) V; the linear one multiplies L with the outer products of keys and values,
    and then contracts with the queries: the same contraction of four tensors in another order. Kernel feature maps are
    functions of q and k, from `dualscan.ops.sma.features`.

    Args:
        q: `(batch, T, heads, d_state)` queries (C of `ssd`); float32, bfloat16, float16 or float64.
        k: `(batch, S, heads, d_state)` keys (B).
        v: `(batch, S, heads, headdim)` values (X). Each of q, k and v may have one head for all, or one a group.
        mask: L, `(T, S)`, `(nheads, T, S)` or `(batch or 1, nheads or 1, T, S)`: a `StructuredMatrix`, such as those of
            `dualscan.ops.sma.masks` (linear attention, RetNet, SSD), `Toeplitz`, `Fourier`, `Cosine`, `LowRank` or one
            of your own; or the entries as a tensor.
        head_pattern: the pattern that q, k and v must have, as in `head_counts`; None takes what they have.
        normalize: divides by the sum of the weights, which should be positive.
        causal: refuses a mask with entries above the diagonal.
        impl: "ssd" (the fast operator, for 1-semiseparable masks with factors of at most 1), "linear", "quadratic", or
            "auto": the fast operator where the mask allows it, else the order that is estimated to take less time.

    Returns:
        `(batch, T, nheads, headdim)` in v's dtype; complex for a complex mask.

    Raises:
        ValueError: a shape, the mask, the head pattern or the implementation does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> from dualscan.semiseparable import Toeplitz
        >>> q, k, v = torch.randn(3, 1, 50, 2, 8).unbind(0)
        >>> mask = Toeplitz(1 / torch.arange(1.0, 51.0))
        >>> torch.allclose(sma(q, k, v, mask, impl="linear"), sma(q, k, v, mask, impl="quadratic"), atol=1e-4)
        True

    Note:
        A head and batch row costs 2 T S (d_state + headdim) FLOPs and T S elements in the quadratic order, and in the
        linear one a multiplication of L with d_state · headdim columns, some of them at a time. "auto" compares these
        by `masks.column_flops`.
    """
    if isinstance(mask, Tensor):
        mask = Dense(mask)
    nheads = _validate(q, k, v, mask, head_pattern)
    if causal and not mask.is_causal:
        raise ValueError(f"sma: causal=True, but the mask {mask!r} has entries above the diagonal; use a causal one.")
    form = _choose(impl, q, v, mask)
    with without_autocast(v.device):
        if form != "ssd" or normalize:
            # Sums of weights leave the range of float16, and their quotient would round three times.
            dtype = accumulation_dtype(v.dtype)
            if form != "ssd":
                dtype = torch.promote_types(dtype, mask.dtype)
            q, k, values = (t.to(dtype) for t in (q, k, v))
        else:
            values = v
        if normalize:
            values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        y = FORMS[form](q, k, values, mask, nheads)
        if normalize:
            y = y[..., :-1] / y[..., -1:]
    return y if y.is_complex() else y.to(v.dtype)


def _operator(q: Tensor, k: Tensor, v: Tensor, mask: StructuredMatrix, nheads: int) -> Tensor:
    """A 1-semiseparable mask: the operator of `ssd`. The signs of its factors go to the values and the output."""
    assert isinstance(mask, OneSemiseparable)
    log_decay, sign = masks.signed_log_decay(mask)
    batch, length = v.shape[:2]
    log_decay = log_decay.expand(batch, nheads, length).transpose(1, 2)
    groups = max(q.shape[2], k.shape[2])
    q, k, v = expand_heads(q, groups), expand_heads(k, groups), expand_heads(v, nheads)
    if sign is None:
        return linear_attention(q, k, v, log_decay=log_decay).y
    sign = sign.expand(batch, nheads, length).transpose(1, 2).unsqueeze(-1).to(v.dtype)
    return linear_attention(q, k, v * sign, log_decay=log_decay).y * sign


def _quadratic(q: Tensor, k: Tensor, v: Tensor, mask: StructuredMatrix, nheads: int) -> Tensor:
    """(L ∘ Q Kᵀ) V."""
    groups = max(q.shape[2], k.shape[2])
    q, k, v = (_heads_first(t, n) for t, n in ((q, groups), (k, groups), (v, nheads)))
    scores = q @ k.mT
    if 1 < groups < nheads:
        scores = scores.repeat_interleave(nheads // groups, dim=1)
    return (scores * mask.to_dense() @ v).transpose(1, 2)


def _linear(q: Tensor, k: Tensor, v: Tensor, mask: StructuredMatrix, nheads: int) -> Tensor:
    """Σ_n q_n ∘ (L (k_n ∘ V)), some of the d_state terms at a time."""
    q, k, v = (_heads_first(t, 1 if t.shape[2] == 1 else nheads) for t in (q, k, v))
    headdim = v.shape[-1]
    elements = CPU_SLICE if v.device.type == "cpu" else DEVICE_SLICE
    width = max(1, elements // max(1, v.shape[0] * nheads * v.shape[2] * headdim))
    y = None
    for q_n, k_n in zip(q.split(width, -1), k.split(width, -1), strict=True):
        outer = (k_n.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)
        read = (mask @ outer).unflatten(-1, (-1, headdim))
        term = (q_n.unsqueeze(-2) @ read).squeeze(-2)
        y = term if y is None else y + term
    assert y is not None
    return y.expand(v.shape[0], nheads, *y.shape[2:]).transpose(1, 2)


FORMS = {"ssd": _operator, "linear": _linear, "quadratic": _quadratic}


def _heads_first(t: Tensor, heads: int) -> Tensor:
    return expand_heads(t, heads).transpose(1, 2)


def _choose(impl: str, q: Tensor, v: Tensor, mask: StructuredMatrix) -> str:
    if impl not in IMPLS:
        raise ValueError(f"sma: impl={impl!r} does not exist; use one of {', '.join(map(repr, IMPLS))}.")
    if impl in ("linear", "quadratic"):
        return impl
    obstacle = masks.obstacle(mask)
    if obstacle is None:
        return "ssd"
    if impl == "ssd":
        raise ValueError(f"sma: impl='ssd' cannot multiply by this mask: {obstacle}; use impl='auto'.")
    rows, columns = mask.shape[-2:]
    d_state, headdim = q.shape[-1], v.shape[-1]
    quadratic = rows * columns * (2 * (d_state + headdim) + masks.ENTRY_COST)
    return "linear" if d_state * headdim * masks.column_flops(mask) < quadratic else "quadratic"


def _validate(q: Tensor, k: Tensor, v: Tensor, mask: StructuredMatrix, pattern: str | None) -> int:
    """Checks shapes, dtypes and head pattern; returns the number of heads."""
    names = ("batch", "T", "heads", "d_state")
    batch, rows, _, d_state = dimensions("sma", "q", q, dict.fromkeys(names))
    _, columns, _, _ = dimensions("sma", "k", k, {"batch": batch, "S": None, "heads": None, "d_state": d_state})
    dimensions("sma", "v", v, {"batch": batch, "S": columns, "heads": None, "headdim": None})
    if v.dtype not in FLOATING:
        raise TypeError(f"sma: v has dtype {v.dtype}; use float32, bfloat16, float16 or float64.")
    same_kind("sma", "v", v, {"q": q, "k": k}, dtype=True)
    if not isinstance(mask, StructuredMatrix):
        raise TypeError(f"sma: mask is a {type(mask).__name__}; use a StructuredMatrix or a tensor of entries.")
    shape = mask.shape
    if shape[-2:] != (rows, columns) or len(shape) > 4 or (len(shape) == 4 and shape[0] not in (1, batch)):
        raise ValueError(
            f"sma: the mask has shape {tuple(shape)}; expected (T={rows}, S={columns}), with (nheads,) or "
            f"(batch={batch} or 1, nheads or 1) before."
        )
    if mask.device != v.device and getattr(mask, "tensors", None):
        raise ValueError(f"sma: the mask is on {mask.device}, v on {v.device}; make it of tensors on v's device.")
    counts = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2], "mask": shape[-3] if len(shape) > 2 else 1}
    nheads = max(counts.values())
    for name, count in counts.items():
        if count == 0 or nheads % count or (name == "mask" and count not in (1, nheads)):
            raise ValueError(
                f"sma: {name} has {count} heads of {nheads}; use all of them, one"
                + (", " if name == "mask" else " for all, or one a group, ")
                + f"where the heads are {counts}."
            )
    if pattern is not None:
        given = HeadCounts(counts["q"], counts["k"], counts["v"])
        wanted = head_counts(pattern, nheads, given.q if pattern_name(pattern) == "grouped-value" else 1)
        if given != wanted:
            raise ValueError(
                f"sma: q, k and v have {tuple(given)} heads; the head pattern {pattern!r} has {tuple(wanted)}."
            )
    return nheads
