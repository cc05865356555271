"""The Mamba block (arXiv 2312.00752, section 3.4 and figure 3): the predecessor that Mamba-2 is compared with.

Here B, C and Δ come from the convolved channels, after the input projection and not beside it, so that the projections
are sequential; Δ goes through a bottleneck of rank d_model / 16, and there is no norm before the output projection.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dualscan.nn import init
from dualscan.nn.mamba2 import check_sizes
from dualscan.nn.norm import RMSNorm
from dualscan.nn.precision import Float32Parameters, apply_linear, project
from dualscan.ops.conv1d import causal_conv1d
from dualscan.ops.selective_scan import selective_scan, selective_scan_step


class MambaState(NamedTuple):
    """What a Mamba layer remembers; the same size whatever came before.

    Attributes:
        conv: `(batch or nseq, d_inner, d_conv - 1)`, the last inputs of the convolution.
        ssm: `(batch or nseq, d_inner, d_state)`, float32.
    """

    conv: Tensor
    ssm: Tensor


class StepSizeProjection(Float32Parameters):
    """The matrix that widens Δ's bottleneck, `weight` (d_inner, dt_rank), and the bias that the scan adds.

    The bias sets the time scale of every channel; it stays float32, and no recipe for linear layers resets it.
    """

    float32_parameters = ("bias",)

    def __init__(self, dt_rank: int, d_inner: int):
        super().__init__()
        bound = dt_rank**-0.5
        self.weight = nn.Parameter(torch.empty(d_inner, dt_rank).uniform_(-bound, bound))
        self.bias = nn.Parameter(init.step_size_bias(d_inner))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dt_rank)` to `(..., d_inner)`, without the bias."""
        return project(x, self.weight)


class Mamba(Float32Parameters):
    """Mamba mixer: `(batch, seqlen, d_model)` in and out.

    [x, z] = in_proj(u);  x = SiLU(conv(x));  [dt, B, C] = x_proj(x);  y = S6(x, softplus(dt_proj(dt)), -exp(A_log), B,
    C) + D x; out_proj(y · SiLU(z)). (arXiv 2312.00752, algorithm 2 and figure 3.)

    Args:
        d_model: width of the residual stream.
        d_state: N, size of the state per channel.
        expand: d_inner / d_model.
        d_conv: width of the causal convolution, 1 to 8.
        dt_rank: width of Δ's bottleneck; None takes d_model / 16, rounded up.
        bias: bias on in_proj and out_proj.
        conv_bias: bias on the convolution.
        inner_norms: normalises Δ's bottleneck, B and C, as Jamba does (arXiv 2403.19887).
        inner_norm_weights: these norms have weights; Falcon-Mamba's (arXiv 2410.05355) have none.
        norm_eps: epsilon of these norms.
        impl: implementation of the scan over sequences, as in `selective_scan`; an attribute that may be changed later.

    Raises:
        ValueError: a size out of its range.

    Example:
        >>> layer = Mamba(32)
        >>> u = torch.randn(2, 10, 32)
        >>> y, state = layer(u[:, :7])
        >>> y2, state = layer(u[:, 7:], state)
        >>> torch.allclose(torch.cat([y, y2], 1), layer(u)[0], atol=1e-5)
        True
    """

    float32_parameters = ("A_log", "D")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        inner_norms: bool = False,
        inner_norm_weights: bool = True,
        norm_eps: float = 1e-5,
        impl: str = "auto",
    ):
        super().__init__()
        # A channel is a head of its own.
        check_sizes(d_model=d_model, expand=expand, headdim=1, ngroups=1, d_state=d_state, d_conv=d_conv)
        dt_rank = self.default_dt_rank(d_model) if dt_rank is None else dt_rank
        if dt_rank < 1:
            raise ValueError(f"dt_rank={dt_rank} must be at least 1; None takes d_model / 16.")
        d_inner = expand * d_model
        self.d_model, self.d_inner, self.d_state, self.d_conv, self.dt_rank = d_model, d_inner, d_state, d_conv, dt_rank
        self.impl = impl
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias)
        # Holds the weights (channels, 1, d_conv) under the names that published checkpoints use; the operator computes.
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, bias=conv_bias)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        widths = [dt_rank, d_state, d_state]
        norm = RMSNorm if inner_norm_weights else partial(nn.RMSNorm, elementwise_affine=False)
        self.inner_norms = nn.ModuleList(norm(n, eps=norm_eps) for n in widths) if inner_norms else None
        self.dt_proj = StepSizeProjection(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    @staticmethod
    def default_dt_rank(d_model: int) -> int:
        """d_model / 16, rounded up (section 3.6)."""
        return -(-d_model // 16)

    def forward(
        self, u: Tensor, state: MambaState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
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
            raise ValueError(f"Mamba: u has shape {tuple(u.shape)}; expected (batch, seqlen, d_model={self.d_model}).")
        x, z = apply_linear(self.in_proj, u).chunk(2, dim=-1)
        x, conv_state = causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_states=None if state is None else state.conv.to(x.dtype),
            cu_seqlens=cu_seqlens,
        )
        y, ssm_state = self._mix(x, z, None if state is None else state.ssm, cu_seqlens)
        return apply_linear(self.out_proj, y), MambaState(conv_state, ssm_state)

    def _mix(self, x: Tensor, z: Tensor, ssm_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scan over the convolved channels, gated: `(batch, seqlen, d_inner)` and the next state."""
        dt, B, C = self.select(x)
        dt, A = self.dt_proj(dt), -torch.exp(self.A_log)
        shared: dict[str, Any] = {"D": self.D, "dt_bias": self.dt_proj.bias, "dt_softplus": True}
        if x.shape[1] == 1 and cu_seqlens is None and ssm_state is not None:
            x, dt, B, C, z = (t[:, 0] for t in (x, dt, B, C, z))
            y, ssm_state = selective_scan_step(ssm_state, x, dt, A, B, C, z=z, **shared)
            return y.unsqueeze(1), ssm_state
        return selective_scan(
            x, dt, A, B, C, z=z, initial_states=ssm_state, cu_seqlens=cu_seqlens, impl=self.impl, **shared
        )

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What follows from the convolved channels: Δ's bottleneck `(..., dt_rank)`, B and C `(..., d_state)`."""
        dt, B, C = apply_linear(self.x_proj, x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.inner_norms is not None:
            dt, B, C = (norm(t) for norm, t in zip(self.inner_norms, (dt, B, C), strict=True))
        return dt, B, C
