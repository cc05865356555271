"""Our operators in plain ATen operations, a fixed number of them for any length: what an exported program computes.

Each function has the schema of the operator that it takes the place of. Unlike the portable forms it writes nothing in
place and loops over neither time nor batch, so that a program stays small; like them it computes low precision in
float32. Packed sequences, whose boundaries are data, have no fixed program.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype
from dualscan.ops.norm.reference import add_rms_norm_reference, rms_norm_reference
from dualscan.ops.selective_scan.reference import step_size
from dualscan.ops.ssd.reference import Core, per_head, quadratic, segment_sum, skip


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """A sum over the taps of shifted inputs (`causal_conv1d_fwd`)."""
    _check_unpacked(cu_seqlens)
    dtype, seqlen = accumulation_dtype(x.dtype), x.shape[1]
    if initial_states is None:
        window = F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    else:
        window = torch.cat((initial_states.transpose(1, 2), x), dim=1)
    y = torch.zeros_like(x, dtype=dtype) if bias is None else bias.to(dtype)
    for j in range(weight.shape[1]):
        y = y + window[:, j : j + seqlen].to(dtype) * weight[:, j].to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype), window[:, seqlen:].transpose(1, 2).clone()


def ssd(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The block decomposition with all chunks at once (`ssd_fwd`; section 6 of arXiv 2405.21060).

    Every chunk is a sequence of its own for the quadratic form, from a zero state. The states at the chunks' ends are
    carried on by the same decays, summed over chunks, and read by each chunk's C.
    """
    _check_unpacked(cu_seqlens)
    batch, seqlen, nheads, _ = x.shape
    dtype, chunk = accumulation_dtype(x.dtype), min(chunk_size, seqlen)
    tail = -seqlen % chunk

    def fold(t: Tensor) -> Tensor:  # (b, l, ...) -> (b * c, q, ...); padding tokens have log-decay 0 and input 0
        padding = [0, 0] * (t.ndim - 2) + [0, tail]
        return F.pad(t.to(dtype), padding).reshape(-1, chunk, *t.shape[2:])

    inputs = Core(x, scale, log_decay, B, C).map(fold)
    fresh = torch.zeros(inputs.x.shape[0], *x.shape[2:], B.shape[3], dtype=dtype, device=x.device)
    inside, ends = quadratic(*inputs, None, fresh)
    ends = ends.view(batch, -1, *ends.shape[1:])
    before = torch.zeros_like(ends[:, 0]) if initial_states is None else initial_states.to(dtype)
    totals = inputs.log_decay.sum(1).view(batch, -1, nheads).transpose(1, 2)
    carry = segment_sum(F.pad(totals, (1, 0))).exp()
    states = torch.einsum("bhcz,bzhpn->bchpn", carry, torch.cat((before.unsqueeze(1), ends), dim=1))
    starts, final = states[:, :-1].flatten(0, 1), states[:, -1]
    read = torch.einsum("blhn,bhpn->blhp", per_head(inputs.C, nheads), starts)
    y = inside + read * inputs.log_decay.cumsum(1).exp().unsqueeze(-1)
    y = y.reshape(batch, -1, *x.shape[2:])[:, :seqlen] + skip(None if D is None else D.to(dtype), x.to(dtype))
    return y.to(x.dtype), final


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Mamba's scan by doubling (`selective_scan_fwd`): after round k every token has summed the 2^k tokens up to it.

    log2(seqlen) rounds over `(b, l, d, n)`, all of which is in memory at once.
    """
    _check_unpacked(cu_seqlens)
    dtype, seqlen, channels = accumulation_dtype(x.dtype), x.shape[1], x.shape[2]
    inputs, (B, C) = x.to(dtype), (per_head(t.to(dtype), channels) for t in (B, C))
    delta = step_size(dt, dt_bias, dt_softplus, dtype)
    decay = torch.exp(delta.unsqueeze(-1) * A.to(dtype))
    states = (delta * inputs).unsqueeze(-1) * B
    if initial_states is not None:
        first = states[:, :1] + decay[:, :1] * initial_states.to(dtype).unsqueeze(1)
        states = torch.cat((first, states[:, 1:]), dim=1)
    reach = 1
    while reach < seqlen:
        states = states + decay * F.pad(states[:, :-reach], (0, 0, 0, 0, reach, 0))
        decay = decay * F.pad(decay[:, :-reach], (0, 0, 0, 0, reach, 0))
        reach *= 2
    y = (states * C).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * inputs
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), states[:, -1].clone()


def add_rms_norm(
    residual: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition, and without y no sum (`add_rms_norm_fwd`)."""
    out, normed = add_rms_norm_reference(residual, y, weight, eps, dtype)
    return residual.new_empty(0) if y is None else out, normed


def decompositions() -> dict[torch._ops.OpOverload, object]:
    """Operator -> its plain form, for `ExportedProgram.run_decompositions`."""
    ops = torch.ops.dualscan
    plain = {"causal_conv1d": causal_conv1d, "ssd": ssd, "selective_scan": selective_scan}
    table: dict[torch._ops.OpOverload, object] = {
        ops.rms_norm_fwd.default: rms_norm_reference,
        ops.add_rms_norm_fwd.default: add_rms_norm,
    }
    for name, function in plain.items():
        for variant in (name, f"{name}_numba"):
            table[getattr(ops, f"{variant}_fwd").default] = function
    return table


def _check_unpacked(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise ValueError("packed sequences (cu_seqlens) cannot be exported; export a batch of one length.")
