"""The contract of `ssd`, `linear_attention` and `ssd_step`: ranks, named dimensions, dtypes and devices."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dualscan.ops.varlen import validate_cu_seqlens

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dimensions(op: str, name: str, t: Tensor, expected: Mapping[str, int | None]) -> tuple[int, ...]:
    """Checks a tensor's rank and sizes by the names of its dimensions; None accepts any size.

    Raises:
        TypeError: not a tensor.
        ValueError: another rank or size, with the whole expected shape in words.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}.")
    shape = tuple(t.shape)
    fits = len(shape) == len(expected)
    if fits:
        for got, want in zip(shape, expected.values(), strict=True):  # a loop, since a generator takes as long again
            if want is not None and got != want:
                fits = False
    if not fits:
        words = ", ".join(dim if size is None else f"{dim}={size}" for dim, size in expected.items())
        raise ValueError(f"{op}: {name} has shape {shape}; expected ({words}).")
    return shape


def same_kind(op: str, leader: str, reference: Tensor, others: dict[str, Tensor | None], *, dtype: bool) -> None:
    """Checks that tensors share the leader's device and, if asked, its dtype; None is skipped."""
    device = reference.device
    for name, t in others.items():
        if t is None:
            continue
        if t.device != device:
            raise ValueError(f"{op}: {name} is on {t.device}, {leader} on {device}; move it with .to({leader}.device).")
        own = t.dtype
        if dtype and own != reference.dtype:
            raise TypeError(
                f"{op}: {name} has dtype {own}, {leader} {reference.dtype}; cast one of them, they must agree."
            )
        if not own.is_floating_point:
            raise TypeError(f"{op}: {name} has dtype {own}; it must be floating point.")


def heads(op: str, nheads: int, ngroups: int) -> None:
    """Checks that the groups divide the heads."""
    if ngroups == 0 or nheads % ngroups:
        raise ValueError(
            f"{op}: ngroups={ngroups} does not divide nheads={nheads}; use a divisor, or 1 to share B and C."
        )


def parameters(
    op: str,
    x: Tensor,
    A: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
) -> None:
    """Checks the per-head parameters A, D and dt_bias, the gate z, and the range of dt_limit."""
    nheads, headdim = x.shape[-2:]
    dimensions(op, "A", A, {"nheads": nheads})
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: A has dtype {A.dtype}; keep it float32 (A = -exp(A_log) loses the decay rate in low precision)."
        )
    if D is not None:
        if D.ndim == 2:
            dimensions(op, "D", D, {"nheads": nheads, "headdim": headdim})
        else:
            dimensions(op, "D", D, {"nheads": nheads})
    if dt_bias is not None:
        dimensions(op, "dt_bias", dt_bias, {"nheads": nheads})
    same_kind(op, "x", x, {"A": A, "D": D, "dt_bias": dt_bias}, dtype=False)
    if z is not None:
        names = ("batch", "seqlen", "nheads", "headdim") if x.ndim == 4 else ("batch", "nheads", "headdim")
        dimensions(op, "z", z, dict(zip(names, x.shape, strict=True)))
        same_kind(op, "x", x, {"z": z}, dtype=True)
    if not isinstance(dt_limit, (tuple, list)) or len(dt_limit) != 2 or not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(
            f"{op}: dt_limit={dt_limit} must be (low, high) with 0 <= low <= high; (0.0, inf) does not clamp."
        )


def sequence(
    op: str,
    x: Tensor,
    per_head: dict[str, Tensor | None],
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    names: tuple[str, str, str] = ("x", "B", "C"),
) -> None:
    """Checks the tensors with a time dimension, in the names of the face that the caller used."""
    x_name, b_name, c_name = names
    batch, seqlen, nheads, headdim = dimensions(
        op, x_name, x, {"batch": None, "seqlen": None, "nheads": None, "headdim": None}
    )
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: {x_name} has dtype {x.dtype}; use float32, bfloat16, float16 or float64.")
    for name, t in per_head.items():
        if t is not None:
            dimensions(op, name, t, {"batch": batch, "seqlen": seqlen, "nheads": nheads})
    _, _, ngroups, d_state = dimensions(
        op, b_name, B, {"batch": batch, "seqlen": seqlen, "ngroups": None, "d_state": None}
    )
    dimensions(op, c_name, C, {"batch": batch, "seqlen": seqlen, "ngroups": ngroups, "d_state": d_state})
    heads(op, nheads, ngroups)
    same_kind(op, x_name, x, {b_name: B, c_name: C}, dtype=True)
    same_kind(op, x_name, x, per_head, dtype=False)
    if cu_seqlens is not None:
        validate_cu_seqlens(cu_seqlens, batch=batch, seqlen=seqlen, device=x.device, name=op)
    if initial_states is not None:
        rows = {"batch": batch} if cu_seqlens is None else {"nseq": cu_seqlens.shape[0] - 1}
        dimensions(
            op, "initial_states", initial_states, {**rows, "nheads": nheads, "headdim": headdim, "d_state": d_state}
        )
        state_dtype(op, "initial_states", initial_states, x)
    if chunk_size is not None and not isinstance(chunk_size, (int, torch.SymInt)):
        raise TypeError(f"{op}: chunk_size={chunk_size!r} must be an integer number of tokens, or None.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: chunk_size={chunk_size}; use a positive number of tokens, or None for the default.")


def state_dtype(op: str, name: str, state: Tensor, x: Tensor) -> None:
    """States are float32 always (float64 beside float64 inputs) and live where the inputs are."""
    same_kind(op, "x", x, {name: state}, dtype=False)
    allowed = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
    if state.dtype not in allowed:
        raise TypeError(f"{op}: {name} has dtype {state.dtype}; states are float32 (float64 beside float64 inputs).")
