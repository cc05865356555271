"""Random problems for `selective_scan`, and the corners of its contract."""

from typing import Any

import torch

from dualscan.ops.selective_scan import selective_scan
from tests.strategies import Problem, packed


def scan_problem(
    *,
    batch: int = 2,
    seqlen: int = 21,
    channels: int = 6,
    ngroups: int | None = None,
    d_state: int = 4,
    dtype: torch.dtype = torch.float32,
    lengths: list[int] | None = None,
    D: bool = False,
    z: bool = False,
    dt_bias: bool = False,
    states: bool = False,
    decay: float = 1.0,
    **options: Any,
) -> Problem:
    """A problem; `ngroups` None leaves the dimension of groups out, `decay` multiplies A, `lengths` packs sequences."""
    if lengths is not None:
        batch, seqlen = 1, sum(lengths)
        options["cu_seqlens"] = packed(lengths)
    nseq = batch if lengths is None else len(lengths)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    groups = () if ngroups is None else (ngroups,)
    tensors = {
        "x": torch.randn(batch, seqlen, channels).to(dtype),
        "dt": (torch.rand(batch, seqlen, channels) if not dt_bias else torch.randn(batch, seqlen, channels)).to(dtype),
        "A": -(torch.rand(channels, d_state) + 0.1).to(wide) * decay,
        "B": torch.randn(batch, seqlen, *groups, d_state).to(dtype),
        "C": torch.randn(batch, seqlen, *groups, d_state).to(dtype),
    }
    if D:
        tensors["D"] = torch.randn(channels).to(wide)
    if z:
        tensors["z"] = torch.randn(batch, seqlen, channels).to(dtype)
    if dt_bias:
        tensors["dt_bias"] = torch.randn(channels).to(wide)
        options["dt_softplus"] = True
    if states:
        tensors["initial_states"] = torch.randn(nseq, channels, d_state).to(wide)
    dy, dfinal = torch.randn(batch, seqlen, channels).to(dtype), torch.randn(nseq, channels, d_state).to(wide)
    return Problem(selective_scan, tensors, dy, dfinal, options)


CORNERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "skip": {"D": True},
    "gate": {"z": True},
    "bias and softplus": {"dt_bias": True},
    "states": {"states": True},
    "everything": {"D": True, "z": True, "dt_bias": True, "states": True, "seqlen": 37},
    "everything packed": {"D": True, "z": True, "dt_bias": True, "states": True, "lengths": [1, 0, 33, 7, 1, 16, 0]},
    "one group": {"ngroups": 1, "states": True},
    "groups": {"ngroups": 3, "states": True, "D": True},
    "a group a channel": {"ngroups": 6, "z": True},
    "odd sizes": {"channels": 7, "d_state": 5, "seqlen": 19, "states": True, "z": True},
    "size 1": {"channels": 1, "d_state": 1, "D": True, "states": True},
    "one token": {"seqlen": 1, "states": True, "D": True, "z": True},
    "one token, no state": {"seqlen": 1},
    "no tokens": {"seqlen": 0, "states": True, "D": True, "z": True},
    "no batch": {"batch": 0, "states": True, "D": True, "dt_bias": True},
    "equal packs": {"lengths": [12, 12, 12], "states": True},
    "single tokens packed": {"lengths": [1, 1, 1, 1], "states": True},
    "empty packs": {"lengths": [0, 0, 0], "states": True},
    "no packs": {"lengths": [], "states": True},
    "one pack": {"lengths": [23]},
    "fast decay": {"decay": 100.0, "states": True},
    "slow decay": {"decay": 1e-6, "states": True},
}
