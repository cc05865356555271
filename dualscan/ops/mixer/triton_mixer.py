"""The mixer's kernels one after the other: those of its three operators, over views of the joint projection.

Forward: the convolution reads its columns of the projection; SSD reads views of what comes out, and dt from the
projection; the norm reads the gate from there. Backward, in reverse: the norm writes the gate's gradient, SSD that of
dt, and the convolution that of its input into their columns of one tensor; SSD's gradients of x, B and C are columns of
one tensor as well, which is what the convolution takes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher
from dualscan.ops.conv1d import triton_conv1d
from dualscan.ops.mixer.library import empty_rows
from dualscan.ops.norm import triton_norm
from dualscan.ops.ssd import triton_gradients, triton_scan
from dualscan.ops.triton_common import LOG2E


@triton.jit(do_not_specialize=["count"])
def rates_kernel(A_log, A, count: tl.int32, BLOCK: tl.constexpr):
    """Grid `(blocks,)`."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exponent = tl.load(A_log + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(A + i, -tl.exp2(exponent * LOG2E), mask=i < count)


_rates = Launcher(rates_kernel)
RATES_BLOCK = 128


def rates(A_log: Tensor) -> Tensor:
    """`A = -exp(A_log)`, float32, as one launch: a layer has few heads, so that launches are all it costs."""
    A_log, A = A_log.contiguous(), torch.empty(A_log.shape, dtype=torch.float32, device=A_log.device)
    with _triton.on_device(A):
        _rates((-(-A.numel() // RATES_BLOCK), 1, 1), (A_log, A), (A.numel(),), (RATES_BLOCK,), 1)
    return A


class Columns(NamedTuple):
    """Views of a joint projection, or of its gradient: `(batch, seqlen, width)`."""

    z: Tensor
    xBC: Tensor
    dt: Tensor


class Channels(NamedTuple):
    """Views of the convolved channels, or of their gradient, with heads and groups."""

    x: Tensor
    B: Tensor
    C: Tensor


def columns(projected: Tensor, d_inner: int, channels: int, nheads: int) -> Columns:
    return Columns(*torch.split_with_sizes(projected, (d_inner, channels, nheads), -1))


def channels(convolved: Tensor, d_inner: int, nheads: int, ngroups: int) -> Channels:
    batch, seqlen, total = convolved.shape
    width = (total - d_inner) // 2
    x, B, C = torch.split_with_sizes(convolved, (d_inner, width, width), -1)
    heads, groups = (batch, seqlen, nheads, d_inner // nheads), (batch, seqlen, ngroups, width // ngroups)
    return Channels(x.view(heads), B.view(groups), C.view(groups))


def forward(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, A_log: Tensor, dt_bias: Tensor, D: Tensor,
    norm_weight: Tensor, conv_states: Tensor | None, ssm_states: Tensor | None, cu_seqlens: Tensor | None,
    ngroups: int, norm_group: int, norm_before_gate: bool, eps: float, dt_min: float, dt_max: float, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`y`, the final states of the convolution and of SSD, what came out of SSD, and A.

    And, to `keep` for the backward, what came out of the convolution, and SSD's states on the way."""
    A = rates(A_log)
    nheads, d_inner = A_log.shape[0], norm_weight.shape[0]
    z, xBC, dt = columns(projected, d_inner, conv_weight.shape[0], nheads)
    convolved, conv = triton_conv1d.forward(xBC, conv_weight.squeeze(1), conv_bias, conv_states, cu_seqlens, True)
    x, B, C = channels(convolved, d_inner, nheads, ngroups)
    scanned, ssm, states = triton_scan.forward(
        x, dt, A, B, C, D, dt_bias, ssm_states, cu_seqlens, True, dt_min, dt_max, keep
    )
    y = triton_norm.forward(scanned.flatten(2), z, norm_weight, norm_group, norm_before_gate, eps)
    return y, conv, ssm, scanned, A, convolved if keep else projected.new_empty(0), states


def backward(
    dy: Tensor | None, dconv: Tensor | None, dssm: Tensor | None, scanned: Tensor, A: Tensor, convolved: Tensor,
    states: Tensor, projected: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, A_log: Tensor, dt_bias: Tensor,
    D: Tensor, norm_weight: Tensor, conv_states: Tensor | None, ssm_states: Tensor | None, cu_seqlens: Tensor | None,
    ngroups: int, norm_group: int, norm_before_gate: bool, eps: float, dt_min: float, dt_max: float, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the forward's first nine arguments; an empty tensor for one that was None."""
    nheads, d_inner = A_log.shape[0], norm_weight.shape[0]
    widths = d_inner, conv_weight.shape[0], nheads
    absent = projected.new_empty(0)
    z, xBC, dt = columns(projected, *widths)
    taps = conv_weight.squeeze(1)
    if not keep:
        convolved, _ = triton_conv1d.forward(xBC, taps, conv_bias, conv_states, cu_seqlens, True)
    x, B, C = channels(convolved, d_inner, nheads, ngroups)
    dprojected, dconvolved = empty_rows(projected), torch.empty_like(convolved)
    grads = columns(dprojected, *widths)
    dy = projected.new_zeros(z.shape) if dy is None else dy
    dscanned, _, dnorm_weight = triton_norm.backward(
        dy, scanned.flatten(2), z, norm_weight, norm_group, norm_before_gate, eps, dz=grads.z
    )
    into = {"dt": grads.dt, **channels(dconvolved, d_inner, nheads, ngroups)._asdict()}
    _, _, dA, _, _, dD, ddt_bias, dssm_states = triton_gradients.backward(
        dscanned.view(scanned.shape), dssm, states, x, dt, A, B, C, D, dt_bias, ssm_states,
        cu_seqlens, True, dt_min, dt_max, into=into,
    )  # fmt: skip
    _, dtaps, dconv_bias, dconv_states = triton_conv1d.backward(
        dconvolved, absent if dconv is None else dconv, xBC, taps, conv_bias, conv_states, cu_seqlens, True,
        dx=grads.xBC,
    )  # fmt: skip
    return dprojected, dtaps.unsqueeze(1), dconv_bias, dA.mul_(A), ddt_bias, dD, dnorm_weight, dconv_states, dssm_states
