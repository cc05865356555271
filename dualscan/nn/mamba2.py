"""The Mamba-2 block (section 7 of arXiv 2405.21060): parallel projections, short convolution, SSD, gated norm."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualscan.nn import init
from dualscan.nn.features import FeatureMap
from dualscan.nn.precision import Float32Parameters, apply_linear, is_plain_linear
from dualscan.nn.step import mamba2_step
from dualscan.ops import mixer
from dualscan.ops._recompute import check_recompute, recomputed, recomputes_activations, recomputes_convolution
from dualscan.ops.conv1d import causal_conv1d
from dualscan.ops.conv1d.validate import MAX_WIDTH
from dualscan.ops.norm import gated_rms_norm
from dualscan.ops.sma.heads import expand_heads, head_counts
from dualscan.ops.ssd import ssd, ssd_step


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer remembers; the same size whatever came before.

    Attributes:
        conv: `(batch or nseq, channels, d_conv - 1)`, the last inputs of the convolution, of x, B and C.
        ssm: `(batch or nseq, nheads, headdim, state_width)`, float32; where it is bfloat16, the next one is too.
    """

    conv: Tensor
    ssm: Tensor


class GatedRMSNorm(Float32Parameters):
    """RMSNorm of x · SiLU(z) over groups of channels (the extra norm of section 7.1)."""

    float32_parameters = ("weight",)

    def __init__(self, d: int, *, group_size: int | None = None, eps: float = 1e-5, norm_before_gate: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.group_size, self.eps, self.norm_before_gate = group_size, eps, norm_before_gate

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalises `(..., d)` under the gate z of the same shape."""
        return gated_rms_norm(
            x, z, self.weight, group_size=self.group_size, norm_before_gate=self.norm_before_gate, eps=self.eps
        )


class Mamba2(Float32Parameters):
    """Mamba-2 mixer: `(batch, seqlen, d_model)` in and out.

    [z, x, B, C, dt] = in_proj(u);  x, B, C = SiLU(conv(x, B, C));  y = SSD(x, softplus(dt + dt_bias), -exp(A_log), B,
    C) + D x; out_proj(RMSNorm(y · SiLU(z))). (arXiv 2405.21060, section 7 and figure 6.) A feature map takes the
    place of SiLU for B and C.

    Args:
        d_model: width of the residual stream.
        d_state: N, size of the state per channel.
        headdim: P, channels per head; must divide d_inner.
        expand: d_inner / d_model.
        d_inner: channels inside the layer; None takes `expand * d_model`.
        ngroups: groups of heads that share B and C; must divide nheads.
        head_pattern: which of x, B and C have a head each and which share one, as in `dualscan.ops.sma.heads`; others
            than "grouped-value" have no groups.
        feature_map: ψ of B and C in place of SiLU, a name of `FeatureMap`; it may make the state wider than d_state.
        d_conv: width of the causal convolution, 1 to 8.
        dt_limit: clamp of Δ after softplus.
        chunk_size: tokens a chunk of SSD; None takes the operator's default.
        norm_eps: epsilon of the gated norm.
        norm_before_gate: normalises before gating instead of after.
        norm_groups: groups of channels that are normalised separately; None takes `ngroups`.
        gated_norm: False gates with SiLU(z) and normalises nothing.
        bias: bias on in_proj and out_proj.
        conv_bias: bias on the convolution.
        projection_scales: factors of what in_proj gives for z, x, B, C and dt; None has none.
        impl: implementation of SSD over sequences, as in `ssd`; an attribute that may be changed later.
        recompute: what the backward computes again instead of keeping it: "none" nothing, "convolution" its output and
            SSD's states on the way, "activations" these and the norm's output, "block" all but the layer's input. An
            attribute that may be changed later; for what it costs see `dualscan.models.accounting.training_memory`.

    Raises:
        ValueError: sizes that do not divide, or an unknown `recompute`.

    Example:
        >>> layer = Mamba2(64, d_state=16, headdim=32)
        >>> u = torch.randn(2, 10, 64)
        >>> y, state = layer(u[:, :7])
        >>> y2, state = layer(u[:, 7:], state)
        >>> torch.allclose(torch.cat([y, y2], 1), layer(u)[0], atol=1e-5)
        True
    """

    float32_parameters = ("A_log", "dt_bias", "D")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        headdim: int = 64,
        expand: int = 2,
        d_inner: int | None = None,
        ngroups: int = 1,
        head_pattern: str = "grouped-value",
        feature_map: str = "silu",
        d_conv: int = 4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        chunk_size: int | None = None,
        norm_eps: float = 1e-5,
        norm_before_gate: bool = False,
        norm_groups: int | None = None,
        gated_norm: bool = True,
        bias: bool = False,
        conv_bias: bool = True,
        projection_scales: Sequence[float] | None = None,
        impl: str = "auto",
        recompute: str = "none",
    ):
        super().__init__()
        check_sizes(
            d_model=d_model,
            expand=expand,
            d_inner=d_inner,
            headdim=headdim,
            ngroups=ngroups,
            d_state=d_state,
            d_conv=d_conv,
        )
        d_inner = expand * d_model if d_inner is None else d_inner
        norm_groups = ngroups if norm_groups is None else norm_groups
        if norm_groups < 1 or d_inner % norm_groups:
            raise ValueError(f"norm_groups={norm_groups} does not divide d_inner={d_inner}; use 1 or another divisor.")
        self.d_model, self.d_inner, self.d_state, self.headdim = d_model, d_inner, d_state, headdim
        self.nheads, self.d_conv = d_inner // headdim, d_conv
        self.dt_limit, self.chunk_size, self.impl = dt_limit, chunk_size, impl
        self.recompute = check_recompute(recompute)
        self.heads = head_counts(head_pattern, self.nheads, ngroups)
        self.ngroups = max(self.heads.q, self.heads.k)
        self.feature_map = None if feature_map == "silu" else FeatureMap(feature_map, d_state)
        self.state_width = d_state if self.feature_map is None else self.feature_map.size
        conv_dim = sum(self._conv_widths)
        self.in_proj = nn.Linear(d_model, d_inner + conv_dim + self.nheads, bias=bias)
        # Holds the weights (channels, 1, d_conv) under the names that published checkpoints use; the operator computes.
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, bias=conv_bias)
        self.A_log = nn.Parameter(init.decay_rates(self.nheads))
        self.dt_bias = nn.Parameter(init.step_size_bias(self.nheads))
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = None
        if gated_norm:
            self.norm = GatedRMSNorm(
                d_inner, group_size=d_inner // norm_groups, eps=norm_eps, norm_before_gate=norm_before_gate
            )
        if projection_scales is not None and len(projection_scales) != 5:
            raise ValueError(f"projection_scales={projection_scales} must be five factors, of z, x, B, C and dt.")
        self.projection_scales = None if projection_scales is None else tuple(projection_scales)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    def forward(
        self, u: Tensor, state: Mamba2State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """Training, prefill, chunked prefill and one-token steps alike.

        Args:
            u: `(batch, seqlen, d_model)`.
            state: what a previous call returned, or None for the start of a sequence; not modified.
            cu_seqlens: `(nseq + 1,)` int32 boundaries of sequences packed along time; batch must be 1.

        Returns:
            y like u, and the state after the last token (of every packed sequence).

        Raises:
            ValueError: `u`, `cu_seqlens` or the number of sequences in the state does not fit.
        """
        if u.ndim != 3 or u.shape[-1] != self.d_model:
            raise ValueError(f"Mamba2: u has shape {tuple(u.shape)}; expected (batch, seqlen, d_model={self.d_model}).")
        one_token = u.shape[1] == 1 and state is not None and cu_seqlens is None
        if one_token and self.steps_directly and not needs_operators(u):
            _check_batch(u, state)
            y, *after = mamba2_step(self, u, *state)
            return y, Mamba2State(*after)
        if state is not None and state.ssm.dtype == torch.bfloat16:  # kept, not computed with
            y, wide = self.forward(u, state._replace(ssm=state.ssm.float()), cu_seqlens)
            return y, wide._replace(ssm=wide.ssm.to(torch.bfloat16))
        if self.recompute == "block" and torch.is_grad_enabled():
            return checkpoint(self._sequence, u, state, cu_seqlens, use_reentrant=False, preserve_rng_state=False)
        return self._sequence(u, state, cu_seqlens)

    def _sequence(self, u: Tensor, state: Mamba2State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Mamba2State]:
        """The layer through the operators, which keep less for the backward where the layer is asked to."""
        zxbcdt = apply_linear(self.in_proj, u, spaced=True)
        if self.projection_scales is not None:
            zxbcdt = zxbcdt * self._scales(zxbcdt)
        sizes = self._fused(zxbcdt)
        if sizes is not None:
            return self._mix_fused(zxbcdt, state, cu_seqlens, sizes)
        z, xBC, dt = zxbcdt.split([self.d_inner, self.conv1d.in_channels, self.nheads], dim=-1)
        convolve = partial(
            causal_conv1d,
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu" if self.feature_map is None else None,
            initial_states=None if state is None else state.conv.to(xBC.dtype),
            cu_seqlens=cu_seqlens,
        )
        convolved, conv_state = convolve()
        with self._kept(convolved, lambda: convolve().y, recomputes_convolution(self.recompute)):
            y, ssm_state = self._mix(convolved, dt, None if state is None else state.ssm, cu_seqlens)
        gate = partial(self._gate, y, z)
        gated = gate()
        with self._kept(gated, gate):
            y = apply_linear(self.out_proj, gated)
        return y, Mamba2State(conv_state, ssm_state)

    def _fused(self, zxbcdt: Tensor) -> mixer.Sizes | None:
        """What one operator in the place of three between the projections is to know, which gives the same on a GPU;
        None where it does not run."""
        if torch.compiler.is_exporting():
            return None  # an exported program runs without this package
        if not (zxbcdt.is_cuda and self.plain and self.impl in ("auto", "triton")):
            return None
        sizes = self._mixer_sizes
        return sizes if mixer.runs(zxbcdt, self.conv1d.weight, self.d_inner, sizes) else None

    @property
    def _mixer_sizes(self) -> mixer.Sizes:
        norm = self.norm
        assert norm is not None
        norm_groups = self.d_inner // (norm.group_size or self.d_inner)
        return mixer.Sizes(self.ngroups, norm_groups, norm.norm_before_gate, norm.eps, self.dt_limit)

    def _mix_fused(
        self, zxbcdt: Tensor, state: Mamba2State | None, cu_seqlens: Tensor | None, sizes: mixer.Sizes
    ) -> tuple[Tensor, Mamba2State]:
        assert self.norm is not None
        gated, conv_state, ssm_state, scanned = mixer.mix(
            *(zxbcdt, self.conv1d.weight, self.conv1d.bias, self.A_log, self.dt_bias, self.D),
            *(self.norm.weight, sizes),
            conv_states=None if state is None else state.conv.to(zxbcdt.dtype),
            ssm_states=None if state is None else state.ssm,
            cu_seqlens=cu_seqlens,
            keep=not recomputes_convolution(self.recompute),
        )
        with self._kept(gated, lambda: self._gate(scanned.flatten(2), zxbcdt[..., : self.d_inner])):
            y = apply_linear(self.out_proj, gated)
        return y, Mamba2State(conv_state, ssm_state)

    def _kept(
        self, value: Tensor, again: Callable[[], Tensor], recompute: bool | None = None
    ) -> AbstractContextManager[None]:
        """Inside, `value` is kept for the backward, or how to compute it again: with "activations", unless said."""
        recompute = recomputes_activations(self.recompute) if recompute is None else recompute
        return recomputed(value, again) if recompute else nullcontext()

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        return y * F.silu(z) if self.norm is None else self.norm(y, z)

    @property
    def steps_directly(self) -> bool:
        """Whether a token may take the short way, which reads the projections' weights."""
        return self.plain and is_plain_linear(self.in_proj) and is_plain_linear(self.out_proj)

    @property
    def plain(self) -> bool:
        """Whether this is the standard layer of section 7, which is what the kernels of a decoding step compute."""
        return self._standard_heads and self.norm is not None and self.projection_scales is None

    @property
    def _standard_heads(self) -> bool:
        """Whether x has all heads, B and C have groups, and SiLU is applied to all."""
        return self.feature_map is None and self.heads == (self.ngroups, self.ngroups, self.nheads)

    def _scales(self, like: Tensor) -> Tensor:
        """The factor of each of in_proj's outputs."""
        assert self.projection_scales is not None
        widths = self.d_inner, *self._conv_widths, self.nheads
        return torch.cat([like.new_full((n,), scale) for n, scale in zip(widths, self.projection_scales, strict=True)])

    @property
    def _conv_widths(self) -> tuple[int, int, int]:
        """Channels of x, B and C."""
        return self.heads.v * self.headdim, self.heads.k * self.d_state, self.heads.q * self.d_state

    def _inputs(self, xBC: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x with all heads, B and C with equal groups, from the convolved channels: `(batch, seqlen, heads, width)`."""
        x, B, C = xBC.split(self._conv_widths, dim=-1)
        x = x.unflatten(-1, (self.heads.v, self.headdim))
        B, C = B.unflatten(-1, (self.heads.k, self.d_state)), C.unflatten(-1, (self.heads.q, self.d_state))
        if self._standard_heads:
            return x, B, C
        if self.feature_map is not None:
            x = F.silu(x)
            C, B = self.feature_map(C, B, cu_seqlens=cu_seqlens)
        return expand_heads(x, self.nheads), expand_heads(B, self.ngroups), expand_heads(C, self.ngroups)

    def _mix(
        self, xBC: Tensor, dt: Tensor, ssm_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """SSD over the convolved channels: `(batch, seqlen, d_inner)` and the next state."""
        batch, seqlen, _ = xBC.shape
        x, B, C = self._inputs(xBC, cu_seqlens)
        shared: dict[str, Any] = {
            "D": self.D,
            "dt_bias": self.dt_bias,
            "dt_softplus": True,
            "dt_limit": self.dt_limit,
        }
        A = -torch.exp(self.A_log)
        if seqlen == 1 and cu_seqlens is None and ssm_state is not None:
            y, ssm_state = ssd_step(ssm_state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], **shared)
        else:
            y, ssm_state = ssd(
                x,
                dt,
                A,
                B,
                C,
                initial_states=ssm_state,
                cu_seqlens=cu_seqlens,
                chunk_size=self.chunk_size,
                impl=self.impl,
                **shared,
            )
        if self.feature_map is not None:
            ssm_state = self.feature_map.advance(ssm_state, seqlen, cu_seqlens)
        return y.reshape(batch, seqlen, self.d_inner), ssm_state


def _check_batch(u: Tensor, state: Mamba2State) -> None:
    if state.ssm.shape[0] != u.shape[0]:
        raise ValueError(f"Mamba2: u has batch {u.shape[0]}, the state {state.ssm.shape[0]}; they must agree.")


def needs_operators(u: Tensor) -> bool:
    """Whether a step must go through the operators: for gradients, or to keep float32 under autocast."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled(u.device.type)


def check_sizes(
    *, d_model: int, expand: int, headdim: int, ngroups: int, d_state: int, d_conv: int, d_inner: int | None = None
) -> None:
    """Checks that headdim divides d_inner, that ngroups divides the heads, and the range of the others.

    Raises:
        ValueError: a size does not fit; the message gives the numbers and a fix.
    """
    if d_state < 1:
        raise ValueError(f"d_state={d_state} must be at least 1.")
    if not 1 <= d_conv <= MAX_WIDTH:
        raise ValueError(f"d_conv={d_conv}; the causal convolution is 1 to {MAX_WIDTH} tokens wide.")
    origin = f" (= expand {expand} x d_model {d_model})" if d_inner is None else ""
    d_inner = expand * d_model if d_inner is None else d_inner
    if d_inner < 1:
        raise ValueError(f"d_inner={d_inner} must be at least 1.")
    if headdim < 1 or d_inner % headdim:
        raise ValueError(
            f"headdim={headdim} does not divide d_inner={d_inner}{origin}; "
            f"use a divisor such as {math.gcd(d_inner, 64)}."
        )
    nheads = d_inner // headdim
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(
            f"ngroups={ngroups} does not divide nheads={nheads} (= d_inner {d_inner} / headdim {headdim}); "
            "use 1 or another divisor."
        )
