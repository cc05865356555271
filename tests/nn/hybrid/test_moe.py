"""Experts against one token at a time, and the three routers against their definitions."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dualscan.nn.hybrid.moe import MoE
from dualscan.nn.mlp import MLP
from tests.oracle import assert_close

D = 8
ROUTERS: list[dict[str, Any]] = [
    {"router": "topk_softmax"},
    {"router": "softmax_topk"},
    {"router": "sigmoid"},
    {"router": "sigmoid", "groups": 3, "groups_used": 2, "normalize": False, "scale": 2.5},
]


def layer(**options: Any) -> MoE:
    sizes = {"n_experts": 6, "per_token": 2, "d_expert": 5}
    moe = MoE(D, **{**sizes, **options}).double()
    if moe.router.bias is not None:
        moe.router.bias.data.normal_()
    return moe


def balance(moe: MoE) -> list[float]:
    assert moe.router.bias is not None
    return moe.router.bias.tolist()


def picked(moe: MoE, token: torch.Tensor) -> list[tuple[float, int]]:
    """Weight and expert of one token, by brute force."""
    router = moe.router
    scores = (router.weight @ token).tolist()
    if router.kind == "sigmoid":
        gates = [1 / (1 + math.exp(-s)) for s in scores]
        choice = [g + b for g, b in zip(gates, balance(moe), strict=True)]
        size = len(choice) // router.groups
        ranks = [sum(sorted(choice[i * size : (i + 1) * size])[-2:]) for i in range(router.groups)]
        groups = sorted(range(router.groups), key=lambda i: -ranks[i])[: router.groups_used]
        allowed = [i for i in range(len(choice)) if i // size in groups]
        best = sorted(allowed, key=lambda i: -choice[i])[: router.per_token]
        total = sum(gates[i] for i in best) if router.normalize else 1.0
        return [(router.scale * gates[i] / total, i) for i in best]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: router.per_token]
    over = best if router.kind == "topk_softmax" else range(len(scores))
    total = sum(math.exp(scores[i]) for i in over)
    return [(math.exp(scores[i]) / total, i) for i in best]


@pytest.mark.parametrize("options", ROUTERS)
@pytest.mark.parametrize(("activation", "d_shared"), [("swiglu", None), ("relu2", 7)])
def test_each_token_goes_through_its_experts(options: dict[str, Any], activation: str, d_shared: int | None) -> None:
    moe = layer(activation=activation, d_shared=d_shared, bias=True, **options)
    u = torch.randn(2, 5, D, dtype=torch.float64)
    y, state = moe(u)
    assert state is None
    expected = torch.zeros_like(u)
    shared = 0 if moe.shared is None else moe.shared(u)[0]
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        token = u[tuple(place)]
        for weight, i in picked(moe, token):
            hidden = moe.up_proj.weight[i] @ token
            if moe.gate_proj is None:
                hidden = F.relu(hidden) ** 2
            else:
                hidden = F.silu(moe.gate_proj.weight[i] @ token) * hidden
            expected[tuple(place)] += weight * (moe.out_proj.weight[i] @ hidden)
    assert_close("y", y, expected + shared, dtype=torch.float64)


def test_gradients_reach_the_router_and_the_experts() -> None:
    moe = layer(router="sigmoid", d_shared=3)
    u = torch.randn(1, 4, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: moe(u)[0], u)
    moe(u)[0].sum().backward()
    assert all(p.grad is not None for p in moe.parameters() if p.requires_grad)
    assert [name for name, p in moe.named_parameters() if not p.requires_grad] == ["router.bias"]


def test_no_tokens() -> None:
    assert layer()(torch.zeros(1, 0, D, dtype=torch.float64))[0].shape == (1, 0, D)


def test_one_expert_is_an_mlp() -> None:
    moe, u = layer(n_experts=1, per_token=1), torch.randn(1, 3, D, dtype=torch.float64)
    mlp = MLP(D, 5).double()
    for name in ("gate_proj", "up_proj", "out_proj"):
        getattr(mlp, name).weight.data = getattr(moe, name).weight[0].detach()
    assert_close("y", moe(u)[0], mlp(u)[0], dtype=torch.float64)


def test_the_balancing_bias_stays_float32() -> None:
    moe = MoE(D, n_experts=2, per_token=1, d_expert=3, router="sigmoid").bfloat16()
    assert {name: p.dtype for name, p in moe.router.named_parameters()} == {
        "weight": torch.bfloat16,
        "bias": torch.float32,
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "best"}, "router='best'.*topk_softmax"),
        ({"activation": "tanh"}, "activation='tanh'.*swiglu"),
        ({"per_token": 7}, "experts_per_token=7.*n_experts=6"),
        ({"groups": 4}, "router_groups=4.*n_experts=6"),
        ({"groups": 3, "per_token": 3}, "experts_per_token=3 exceeds"),
    ],
)
def test_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer(**options)
