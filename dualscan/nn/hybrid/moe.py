"""A mixture of experts (arXiv 1701.06538): each token passes through the few MLPs that a router picks for it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualscan.nn.mlp import ACTIVATIONS, MLP, activate
from dualscan.nn.precision import Float32Parameters

ROUTERS = ("topk_softmax", "softmax_topk", "sigmoid")


class Router(Float32Parameters):
    """Picks experts and their weights for every token.

    topk_softmax: softmax over the k largest scores;  softmax_topk: the k largest of the softmax over all scores;
    sigmoid (arXiv 2412.19437, section 2.1.2): the k largest of sigmoid(score) + bias among the best `groups_used` of
    `groups` groups of experts, weighted by sigmoid(score), divided by their sum if `normalize`, times `scale`.

    Args:
        d_model: width of the tokens.
        n_experts: experts to choose from.
        per_token: k, experts a token.
        kind: "topk_softmax", "softmax_topk" or "sigmoid".
        groups: of experts, for "sigmoid"; a group's rank is the sum of its two best.
        groups_used: groups that a token may use.
        normalize: weights sum to `scale`, for "sigmoid".
        scale: factor of the weights, for "sigmoid".
    """

    float32_parameters = ("bias",)

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        per_token: int,
        *,
        kind: str = "topk_softmax",
        groups: int = 1,
        groups_used: int = 1,
        normalize: bool = True,
        scale: float = 1.0,
    ):
        super().__init__()
        if kind not in ROUTERS:
            raise ValueError(f"router={kind!r} does not exist; use one of {', '.join(map(repr, ROUTERS))}.")
        if not 1 <= per_token <= n_experts:
            raise ValueError(f"experts_per_token={per_token} must be from 1 to n_experts={n_experts}.")
        if groups < 1 or n_experts % groups or not 1 <= groups_used <= groups:
            raise ValueError(
                f"router_groups={groups} must divide n_experts={n_experts}, and router_groups_used={groups_used} be "
                "from 1 to as many."
            )
        if per_token > groups_used * (n_experts // groups):
            raise ValueError(f"experts_per_token={per_token} exceeds the experts of router_groups_used={groups_used}.")
        self.kind, self.per_token, self.groups, self.groups_used = kind, per_token, groups, groups_used
        self.normalize, self.scale = normalize, scale
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)
        # Balances the load; it moves the choice and not the weights, so that no gradient reaches it.
        self.bias = nn.Parameter(torch.zeros(n_experts), requires_grad=False) if kind == "sigmoid" else None

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Weights `(tokens, k)` in float32 or better and experts `(tokens, k)` of `(tokens, d_model)`."""
        if self.kind == "sigmoid":
            return self._sigmoid(u)
        scores = F.linear(u, self.weight)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.kind == "topk_softmax":
            best, experts = scores.topk(self.per_token, dim=-1)
            return best.softmax(dim=-1), experts
        return scores.softmax(dim=-1).topk(self.per_token, dim=-1)

    def _sigmoid(self, u: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(u.dtype, torch.float32)
        scores = F.linear(u.to(dtype), self.weight.to(dtype)).sigmoid()
        assert self.bias is not None
        choice = scores.detach() + self.bias
        if self.groups_used < self.groups:
            grouped = choice.unflatten(-1, (self.groups, -1))
            rank = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            best = rank.topk(self.groups_used, dim=-1).indices
            hidden = torch.ones_like(rank, dtype=torch.bool).scatter(-1, best, False)
            choice = grouped.masked_fill(hidden[..., None], -torch.inf).flatten(-2)
        experts = choice.topk(self.per_token, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.scale, experts


class ExpertLinear(nn.Module):
    """A linear map without bias for each expert, `weight` (n_experts, out, in)."""

    def __init__(self, n_experts: int, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_out, d_in).uniform_(-1, 1) * d_in**-0.5)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Maps `(tokens, in)` by one expert's matrix."""
        return F.linear(x, self.weight[expert])


class MoE(nn.Module):
    """A mixer without memory: `(batch, seqlen, d_model)` in and out, each token through its own experts.

    y = sum_i w_i expert_i(u) over the k experts that the router picks, plus shared(u) for every token; an expert is an
    MLP without bias. No token is dropped.

    Args:
        d_model: width of the residual stream.
        n_experts: experts to choose from.
        per_token: experts a token.
        d_expert: hidden width of an expert.
        d_shared: hidden width of the MLP that every token passes; None has none.
        activation: of the experts and the shared MLP, as in `MLP`.
        bias: bias on the shared MLP.
        router: "topk_softmax", "softmax_topk" or "sigmoid"; see `Router`.
        **routing: further options of `Router`.

    Raises:
        ValueError: an unknown activation or router, or numbers that do not fit.

    Example:
        >>> y, state = MoE(32, n_experts=4, per_token=2, d_expert=16)(torch.randn(2, 5, 32))
        >>> y.shape, state
        (torch.Size([2, 5, 32]), None)

    Note:
        The tokens of an expert are computed together: at most n_experts small products a projection. Results are added
        in a fixed order, so that they repeat bit for bit.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int,
        per_token: int,
        d_expert: int,
        d_shared: int | None = None,
        activation: str = "swiglu",
        bias: bool = False,
        router: str = "topk_softmax",
        **routing: Any,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"MoE: activation={activation!r} does not exist; use one of {', '.join(ACTIVATIONS)}.")
        self.activation, self.n_experts = activation, n_experts
        self.router = Router(d_model, n_experts, per_token, kind=router, **routing)
        gated = MLP.gated(activation)
        self.gate_proj = ExpertLinear(n_experts, d_model, d_expert) if gated else None
        self.up_proj = ExpertLinear(n_experts, d_model, d_expert)
        self.out_proj = ExpertLinear(n_experts, d_expert, d_model)
        self.shared = MLP(d_model, d_shared, activation=activation, bias=bias) if d_shared is not None else None

    def forward(self, u: Tensor, state: None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, None]:
        """Maps every token by itself.

        Args:
            u: `(batch, seqlen, d_model)`.
            state: None: experts remember nothing.
            cu_seqlens: has no effect, as tokens do not meet.

        Returns:
            y like `u`, and None for the state.
        """
        tokens = u.flatten(0, -2)
        weights, experts = self.router(tokens)
        # Tokens sorted by expert, each as often as it is used; sorting back puts a token's experts side by side.
        order = experts.flatten().argsort(stable=True)
        rows = order // experts.shape[1]
        counts = experts.flatten().bincount(minlength=self.n_experts).tolist()
        parts = [self._expert(i, tokens[r]) for i, r in enumerate(rows.split(counts)) if len(r)]
        results = torch.cat(parts or [tokens[:0]])[order.argsort()].unflatten(0, experts.shape)
        y = (results * weights.to(results.dtype).unsqueeze(-1)).sum(dim=1).view_as(u)
        return (y if self.shared is None else y + self.shared(u)[0]), None

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        gate = None if self.gate_proj is None else self.gate_proj(x, expert)
        return self.out_proj(activate(self.activation, self.up_proj(x, expert), gate), expert)
