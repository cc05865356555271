"""One token through a Mamba-2 mixer, without gradients: what decoding spends its time on.

The same mathematics as `Mamba2.forward`, written with as few tensor operations as it takes. A step does almost no
arithmetic: beside reading the weights and the state, it is calls, checks and small operations that cost time, all the
more since every matrix product empties the caches that they run from.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.nn.precision import project
from dualscan.ops import decode

if TYPE_CHECKING:
    from dualscan.nn.mamba2 import Mamba2
    from dualscan.nn.norm import RMSNorm


def mamba2_step(mixer: "Mamba2", u: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixes one token (arXiv 2405.21060, equation 1 and figure 6); decays, state and norm in float32.

    Args:
        mixer: the layer.
        u: `(batch, 1, d_model)`.
        conv: `(batch, channels, d_conv - 1)`, fastest when time-major in memory.
        ssm: `(batch, nheads, headdim, d_state)` float32 (float64 in a float64 model).

    Returns:
        y `(batch, 1, d_model)` and the next conv and ssm states; the given ones are not modified.
    """
    arguments = _kernel_arguments(mixer, u, conv, ssm)
    if arguments is None:
        return _portable_step(mixer, u, conv, ssm)
    y, conv, ssm = decode.mamba2_step(u[:, 0].float().contiguous(), conv, ssm, *arguments)
    return y.to(u.dtype).unsqueeze(1), conv, ssm


def mamba2_block_step(
    mixer: "Mamba2", norm: "RMSNorm", h: Tensor, conv: Tensor, ssm: Tensor, *, reuse_state: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`h + mixer(norm(h))` for one token of the residual stream, or None where the kernel does not run.

    Args:
        mixer: the layer.
        norm: before it.
        h: `(batch, 1, d_model)` float32.
        conv: as in `mamba2_step`.
        ssm: as in `mamba2_step`.
        reuse_state: the next ssm state may take the place of the given one.

    Returns:
        The residual stream after the layer, and the next states.
    """
    arguments = None
    if h.dtype == norm.weight.dtype == torch.float32:
        arguments = _kernel_arguments(mixer, h, conv, ssm)
    if arguments is None:
        return None
    y, conv, ssm = decode.mamba2_step(
        h[:, 0].contiguous(), conv, ssm, *arguments, (norm.weight, norm.eps), reuse_state=reuse_state
    )
    return y.unsqueeze(1), conv, ssm


def _kernel_arguments(
    mixer: "Mamba2", u: Tensor, conv: Tensor, ssm: Tensor
) -> tuple[decode.Parameters, decode.Sizes] | None:
    """What the kernel wants to know of the mixer; None where it does not run."""
    in_proj, conv1d, norm, out_proj = mixer.in_proj, mixer.conv1d, mixer.norm, mixer.out_proj
    parameters = decode.Parameters(
        *(in_proj.weight, in_proj.bias, conv1d.weight, conv1d.bias),
        *(mixer.A_log, mixer.dt_bias, mixer.D, norm.weight, out_proj.weight, out_proj.bias),
    )
    if torch.compiler.is_compiling() or not decode.supports(u.shape[0], conv, ssm, parameters):
        return None
    norm_groups = mixer.d_inner // (norm.group_size or mixer.d_inner)
    return parameters, decode.Sizes(mixer.ngroups, norm_groups, norm.norm_before_gate, norm.eps, mixer.dt_limit)


def _portable_step(mixer: "Mamba2", u: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in PyTorch operations: the specification of the kernel."""
    batch, groups = u.shape[0], u.shape[0] * mixer.ngroups
    zxbcdt = project(u[:, 0], mixer.in_proj.weight, mixer.in_proj.bias)
    z, xBC, dt = zxbcdt.split([mixer.d_inner, mixer.conv1d.in_channels, mixer.nheads], dim=-1)

    window = torch.cat((conv.transpose(1, 2), xBC.unsqueeze(1)), dim=1)
    conv1d = mixer.conv1d
    pre = (window.to(ssm.dtype) * conv1d.weight[:, 0].t()).sum(1)
    if conv1d.bias is not None:
        pre += conv1d.bias
    x, B, C = F.silu(pre).split([mixer.d_inner, *[mixer.ngroups * mixer.d_state] * 2], dim=-1)
    x = x.view(batch, mixer.nheads, mixer.headdim)

    step = F.softplus(dt + mixer.dt_bias)  # float32: the bias is
    if mixer.dt_limit != (0.0, float("inf")):
        step = step.clamp(*mixer.dt_limit)
    decay = (step * mixer.A_log.exp()).neg_().exp_()
    ssm = ssm * decay[:, :, None, None]
    rows = ssm.view(groups, -1, mixer.d_state)
    scaled = (x * step.unsqueeze(-1)).view(groups, -1, 1)
    rows.baddbmm_(scaled, B.reshape(groups, 1, mixer.d_state))
    y = torch.bmm(rows, C.reshape(groups, mixer.d_state, 1)).view(x.shape)
    y = torch.addcmul(y, x, mixer.D.unsqueeze(-1)).view(batch, mixer.d_inner)

    y = _gated_norm(mixer, y, F.silu(z.to(ssm.dtype)))
    y = project(y.to(u.dtype), mixer.out_proj.weight, mixer.out_proj.bias)
    return y.unsqueeze(1), window[:, 1:].transpose(1, 2), ssm


def _gated_norm(mixer: "Mamba2", y: Tensor, gate: Tensor) -> Tensor:
    norm = mixer.norm
    size = norm.group_size or y.shape[-1]
    if size == y.shape[-1] and not norm.norm_before_gate:
        return F.rms_norm(y * gate, (size,), norm.weight, norm.eps)
    if not norm.norm_before_gate:
        y = y * gate
    y = F.rms_norm(y.view(y.shape[0], -1, size), (size,), eps=norm.eps).view(y.shape) * norm.weight
    return y * gate if norm.norm_before_gate else y
