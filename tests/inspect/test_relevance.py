"""Rollout, attribution and gradients against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualscan.inspect.relevance import mean_mixing, rollout, weighted_mixing
from dualscan.inspect.trace import logit_gradients, trace
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from dualscan.nn.hybrid.shared import SharedBlock

quick = settings(max_examples=15, deadline=None, derandomize=True)


def causal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).tril()


def all_paths(layers: list[Tensor]) -> Tensor:
    """Rollout as a sum over every path of tokens through the layers."""
    steps = [(m + torch.eye(len(m))) / (m + torch.eye(len(m))).sum(-1, keepdim=True) for m in layers]
    seqlen = len(layers[0])
    result = torch.zeros(seqlen, seqlen, dtype=torch.float64)
    for path in itertools.product(range(seqlen), repeat=len(layers) + 1):
        weight = 1.0
        for step, (source, sink) in zip(steps, itertools.pairwise(path), strict=True):
            weight *= step[sink, source].item()
        result[path[-1], path[0]] += weight
    return result


@quick
@given(st.integers(1, 4), st.integers(1, 3))
def test_rollout_is_the_sum_over_all_paths(seqlen: int, nlayers: int) -> None:
    layers = [mean_mixing(causal(2, seqlen, seqlen)) for _ in range(nlayers)]
    joint = rollout(layers)
    torch.testing.assert_close(joint, all_paths(layers), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(joint.sum(-1), torch.ones(seqlen, dtype=torch.float64))
    assert (joint.triu(1) == 0).all()


def test_rollout_needs_a_layer():
    with pytest.raises(ValueError, match="rollout got no layers"):
        rollout([])


def test_mean_mixing_by_hand():
    heads = torch.tensor([[[0.0, 0.0], [-3.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]])
    # A first row of zeros is the token itself; the second is |.| averaged, (4, 2) / 2, over its sum.
    assert torch.equal(mean_mixing(heads), torch.tensor([[1.0, 0.0], [2 / 3, 1 / 3]]))


@quick
@given(st.integers(1, 3), st.integers(1, 5))
def test_weighted_mixing_entry_by_entry(nheads: int, seqlen: int) -> None:
    matrices, gradient = causal(nheads, seqlen, seqlen), torch.randn(seqlen, 4, dtype=torch.float64)
    largest = max(max(matrices.flatten().tolist()), 0.0)
    strength = [max(max(row), 0.0) for row in gradient.tolist()]
    spread = max(strength) - min(strength)
    actual = weighted_mixing(matrices, gradient)
    for i, j in itertools.product(range(seqlen), repeat=2):
        mean = sum(max(matrices[h, i, j].item(), 0.0) for h in range(nheads)) / nheads
        scaled = (strength[j] - min(strength)) / spread if spread else 0.0
        expected = mean / largest * scaled if largest else 0.0
        assert actual[i, j].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("pattern", "scale"), [("MM", 1.0), ("M*-mP", 0.6), ("MSS", 0.8)])
def test_gradients_layer_by_layer_are_those_of_the_whole_model(pattern, scale):
    torch.manual_seed(1)
    sizes = {"d_model": 16, "vocab_size": 20, "d_state": 4, "headdim": 8, "embedding_std": 1.0, "adapter_rank": 2}
    config = ModelConfig(pattern=pattern, embedding_scale=scale, residual_scale=scale, logits_scale=scale, **sizes)
    model = MambaLM(config).double()
    tokens = torch.randint(20, (1, 7))
    stream = trace(model, tokens).stream
    torch.testing.assert_close(
        scale * torch.nn.functional.linear(model.norm_f(stream[-1]), model.output_weight), model(tokens).logits
    )
    found = list(logit_gradients(model, stream, position=4, target=3))[::-1]
    assert len(found) == config.n_layers + 1
    for first, actual in enumerate(found):
        h = stream[first].clone().requires_grad_()
        top = h
        for block in itertools.islice(model.layers, first, None):
            own = {"embedding": stream[0] if first else h} if isinstance(block, SharedBlock) else {}
            top = block(top, **own)[0]
        logit = scale * (model.norm_f(top) @ model.output_weight.T)[0, 4, 3]
        (expected,) = torch.autograd.grad(logit, h)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)
        assert (actual[:, 5:] == 0).all()
    assert all(p.grad is None for p in model.parameters())


def test_gradients_agree_with_finite_differences():
    config = ModelConfig(d_model=16, pattern="M", vocab_size=20, d_state=4, headdim=8, embedding_std=1.0)
    model, tokens = MambaLM(config).double(), torch.randint(20, (1, 5))
    stream = trace(model, tokens).stream
    *_, gradient = logit_gradients(model, stream, position=-1, target=2)
    direction, step = torch.randn(1, 5, 16, dtype=torch.float64), 1e-5

    @torch.no_grad()
    def logit(h: Tensor) -> float:
        return (model.norm_f(model.layers[0](h)[0])[0, -1] @ model.output_weight[2]).item()

    slope = (logit(stream[0] + step * direction) - logit(stream[0] - step * direction)) / (2 * step)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-6)
