"""One token through Mamba-2 mixers, without gradients: what decoding spends its time on.

The same mathematics as `Mamba2.forward`, written with as few tensor operations as it takes. A step does almost no
arithmetic: beside reading the weights and the state, it is calls, checks and small operations that cost time, all the
more since every matrix product empties the caches that they run from. On a CPU a kernel takes whole runs of layers.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualscan.nn.precision import project
from dualscan.ops import decode

if TYPE_CHECKING:
    from dualscan.nn.mamba2 import Mamba2
    from dualscan.nn.norm import RMSNorm
    from dualscan.ops.decode.numba_step import Plan

_PLANS: "WeakKeyDictionary[nn.Module, tuple[Watch, Plan | None]]" = WeakKeyDictionary()
# What a plan takes from the modules beside their parameters.
_SETTINGS = {"d_inner", "dt_limit", "eps", "group_size", "ngroups", "norm_before_gate"}


def mamba2_step(mixer: "Mamba2", u: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixes one token (arXiv 2405.21060, equation 1 and figure 6); decays, state and norm in float32.

    Args:
        mixer: the layer.
        u: `(batch, 1, d_model)`.
        conv: `(batch, channels, d_conv - 1)`, fastest when time-major in memory.
        ssm: `(batch, nheads, headdim, d_state)` float32 (float64 in a float64 model), or bfloat16: kept in that alone.

    Returns:
        y `(batch, 1, d_model)` and the next conv and ssm states; the given ones are not modified.
    """
    stepped = None
    if u.device.type == "cpu" and u.shape[0] <= decode.MOST_ROWS and not torch.compiler.is_compiling():
        known = _PLANS.get(mixer)
        if known is None or not known[0].unchanged():
            known = _PLANS[mixer] = Watch([mixer]), make_plan([(mixer, None)])
        if known[1] is not None:
            stepped = known[1].step(u[:, 0], [(conv, ssm)])
    if stepped is None:
        return _portable_step(mixer, u, conv, ssm)
    y, ((conv, ssm),) = stepped
    return y.to(u.dtype).unsqueeze(1), conv, ssm


class Watch:
    """Notices whether modules are still as they were: their submodules, settings and parameters, and where these are.

    Asked before every decoding step, with cold caches: it goes around `Module.__getattr__` and leaves loops to `map`.
    It refers to what the modules hold, not to the modules, so that it can be kept in a weak dictionary under them.

    Args:
        modules: watched with their submodules.
        unhooked: have no hooks now, and must not get any.
    """

    def __init__(self, modules: Iterable[nn.Module], unhooked: Iterable[nn.Module] = ()):
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._hooks = [hooks for m in unhooked for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        for root in modules:
            for module in root.modules():
                self._add(vars(module), [name for name in vars(module) if name in _SETTINGS])
                self._add(module._parameters, module._parameters)
                self._add(module._modules, module._modules)
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._places = self._find()

    def _add(self, owner: dict[str, Any], names: Iterable[str]) -> None:
        for name in names:
            self._owners.append(owner)
            self._names.append(name)
            self._values.append(owner[name])

    def _find(self) -> list[Any]:
        return [*map(Tensor.data_ptr, self._tensors), *(tensor.dtype for tensor in self._tensors)]

    def unchanged(self) -> bool:
        """Whether nothing was replaced, set or moved. Values that changed in place do not count."""
        return (
            not any(self._hooks)
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._values))
            and self._find() == self._places
        )


def make_plan(layers: "Sequence[tuple[Mamba2, RMSNorm | None]]") -> "Plan | None":
    """The kernel's plan of mixers that step directly, each with the norm before it; None where it does not run.

    With a norm a layer is `h + mixer(norm(h))`, without one it is the mixer alone.
    """
    parameters, sizes = zip(*(describe(mixer, before) for mixer, before in layers), strict=True)
    return decode.plan(parameters, sizes[0]) if sizes.count(sizes[0]) == len(sizes) else None


def describe(mixer: "Mamba2", before: "RMSNorm | None") -> tuple[decode.Parameters, decode.Sizes]:
    """What the kernels take of a mixer that steps directly, and of the norm before it."""
    in_proj, conv1d, norm, out_proj = mixer.in_proj, mixer.conv1d, mixer.norm, mixer.out_proj
    assert norm is not None
    parameters = decode.Parameters(
        *(in_proj.weight, in_proj.bias, conv1d.weight, conv1d.bias),
        *(mixer.A_log, mixer.dt_bias, mixer.D, norm.weight, out_proj.weight, out_proj.bias),
        None if before is None else before.weight,
    )
    norm_groups = mixer.d_inner // (norm.group_size or mixer.d_inner)
    before_eps = 0.0 if before is None else before.eps
    sizes = decode.Sizes(mixer.ngroups, norm_groups, norm.norm_before_gate, norm.eps, mixer.dt_limit, before_eps)
    return parameters, sizes


def _portable_step(mixer: "Mamba2", u: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in PyTorch operations: the specification of the kernel."""
    batch, groups = u.shape[0], u.shape[0] * mixer.ngroups
    kept, ssm = ssm.dtype, ssm.to(torch.promote_types(ssm.dtype, torch.float32))
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
    ssm = (ssm * decay[:, :, None, None]).contiguous()
    rows = ssm.view(groups, -1, mixer.d_state)
    scaled = (x * step.unsqueeze(-1)).view(groups, -1, 1)
    rows.baddbmm_(scaled, B.reshape(groups, 1, mixer.d_state))
    y = torch.bmm(rows, C.reshape(groups, mixer.d_state, 1)).view(x.shape)
    y = torch.addcmul(y, x, mixer.D.unsqueeze(-1)).view(batch, mixer.d_inner)

    y = _gated_norm(mixer, y, F.silu(z.to(ssm.dtype)))
    y = project(y.to(u.dtype), mixer.out_proj.weight, mixer.out_proj.bias)
    return y.unsqueeze(1), window[:, 1:].transpose(1, 2), ssm.to(kept)


def _gated_norm(mixer: "Mamba2", y: Tensor, gate: Tensor) -> Tensor:
    norm = mixer.norm
    assert norm is not None
    size = norm.group_size or y.shape[-1]
    if size == y.shape[-1] and not norm.norm_before_gate:
        return F.rms_norm(y * gate, (size,), norm.weight, norm.eps)
    if not norm.norm_before_gate:
        y = y * gate
    y = F.rms_norm(y.view(y.shape[0], -1, size), (size,), eps=norm.eps).view(y.shape) * norm.weight
    return y * gate if norm.norm_before_gate else y
