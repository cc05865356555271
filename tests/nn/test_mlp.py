"""The MLP against its formula and transformers' Llama."""

import math

import pytest
import torch

from dualscan.nn.mlp import MLP
from tests.oracle import assert_close
from tests.strategies import packed


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x * x, torch.zeros_like(x))


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize(("name", "function"), [("gelu", _gelu), ("relu2", _relu2)])
@pytest.mark.parametrize("bias", [False, True])
def test_two_matrices(name: str, function, bias: bool):
    mlp, u = MLP(12, 20, activation=name, bias=bias).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    up, down = mlp.up_proj, mlp.out_proj
    assert (up.bias is not None) == bias
    hidden = function(u @ up.weight.T + (up.bias if bias else 0))
    y, state = mlp(u)
    assert_close(name, y, hidden @ down.weight.T + (down.bias if bias else 0), dtype=torch.float64)
    assert state is None
    assert mlp.gate_proj is None


def test_swiglu_matches_llama():
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs, ours = LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=1)), MLP(12, 20)
    ours.load_state_dict({name.replace("down_proj", "out_proj"): t for name, t in theirs.state_dict().items()})
    u = torch.randn(2, 5, 12)
    assert_close("y", ours(u)[0], theirs(u), dtype=torch.float32)


def test_every_token_by_itself():
    mlp, u = MLP(12).eval(), torch.randn(1, 6, 12)
    y, _ = mlp(u)
    assert torch.equal(mlp(u, cu_seqlens=packed([2, 4]))[0], y)
    with torch.inference_mode():
        steps = [mlp(token)[0] for token in u.split(1, dim=1)]
    assert_close("steps", torch.cat(steps, dim=1), y, dtype=torch.float32)


@pytest.mark.parametrize(("activation", "hidden"), [("swiglu", 2048), ("gelu", 3072), ("relu2", 3072)])
def test_default_width(activation: str, hidden: int):
    assert MLP.default_hidden(768, activation) == hidden
    assert MLP(768, activation=activation).out_proj.in_features == hidden
    assert MLP.default_hidden(100) == 320  # 266.7 rounded up to a multiple of 64


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"activation": "tanh"}, "'tanh'.*'swiglu', 'geglu', 'gelu', 'relu2'"),
        ({"d_hidden": 0}, "d_hidden=0.*at least 1"),
    ],
)
def test_refuses(wrong: dict, words: str):
    with pytest.raises(ValueError, match=words):
        MLP(12, **wrong)


def test_gate_scale_and_geglu():
    mlp, u = MLP(8, 12, activation="geglu", bias=True, gate_scale=0.7), torch.randn(3, 4, 8)
    assert mlp.gate_proj is not None
    gate = torch.nn.functional.gelu(0.7 * mlp.gate_proj(u))
    torch.testing.assert_close(mlp(u)[0], mlp.out_proj(gate * mlp.up_proj(u)))
