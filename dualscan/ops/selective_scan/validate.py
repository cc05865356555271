"""The contract of `selective_scan` and `selective_scan_step`: ranks, named dimensions, dtypes and devices."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dualscan.ops.ssd.validate import FLOATING, dimensions, same_kind, state_dtype
from dualscan.ops.varlen import validate_cu_seqlens


def sequence(
    op: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    optional: Mapping[str, Tensor | None],
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Checks every tensor of a call over sequences; B and C have their dimension of groups."""
    batch, seqlen, channels = dimensions(op, "x", x, {"batch": None, "seqlen": None, "channels": None})
    _common(op, x, dt, A, B, C, optional, {"batch": batch, "seqlen": seqlen})
    if cu_seqlens is not None:
        validate_cu_seqlens(cu_seqlens, batch=batch, seqlen=seqlen, device=x.device, name=op)
    if initial_states is not None:
        rows = {"batch": batch} if cu_seqlens is None else {"nseq": cu_seqlens.shape[0] - 1}
        dimensions(op, "initial_states", initial_states, {**rows, "channels": channels, "d_state": A.shape[1]})
        state_dtype(op, "initial_states", initial_states, x)


def token(
    op: str,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    optional: Mapping[str, Tensor | None],
) -> None:
    """Checks every tensor of a call over one token; B and C have their dimension of groups."""
    batch, channels = dimensions(op, "x", x, {"batch": None, "channels": None})
    _common(op, x, dt, A, B, C, optional, {"batch": batch})
    dimensions(op, "state", state, {"batch": batch, "channels": channels, "d_state": A.shape[1]})
    state_dtype(op, "state", state, x)


def with_groups(op: str, name: str, t: Tensor, leading: int) -> Tensor:
    """B or C with a dimension of groups before the last; one group where it was left out."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}.")
    return t.unsqueeze(leading) if t.ndim == leading + 1 else t


def _common(
    op: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    optional: Mapping[str, Tensor | None],
    rows: Mapping[str, int],
) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: x has dtype {x.dtype}; use float32, bfloat16, float16 or float64.")
    channels = x.shape[-1]
    per_token = {**rows, "channels": channels}
    dimensions(op, "dt", dt, per_token)
    _, d_state = dimensions(op, "A", A, {"channels": channels, "d_state": None})
    *_, ngroups, _ = dimensions(op, "B", B, {**rows, "ngroups": None, "d_state": d_state})
    dimensions(op, "C", C, {**rows, "ngroups": ngroups, "d_state": d_state})
    if ngroups == 0 or channels % ngroups:
        raise ValueError(
            f"{op}: ngroups={ngroups} does not divide channels={channels}; use a divisor, or 1 to share B and C."
        )
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: A has dtype {A.dtype}; keep it float32 (A = -exp(A_log) loses the decay rate in low precision)."
        )
    z, D, dt_bias = (optional[name] for name in ("z", "D", "dt_bias"))
    if z is not None:
        dimensions(op, "z", z, per_token)
    for name, t in (("D", D), ("dt_bias", dt_bias)):
        if t is not None:
            dimensions(op, name, t, {"channels": channels})
    same_kind(op, "x", x, {"B": B, "C": C, "z": z}, dtype=True)
    same_kind(op, "x", x, {"dt": dt, "A": A, "D": D, "dt_bias": dt_bias}, dtype=False)
