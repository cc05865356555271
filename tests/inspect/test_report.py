"""A report is what its parts say, whatever the sizes of blocks, and says in one line why it cannot be made."""

import pytest
import torch

from dualscan.inspect import report as reports
from dualscan.inspect.memory import effective_context, spectrum
from dualscan.inspect.relevance import mean_mixing, rollout, weighted_mixing
from dualscan.inspect.report import VIEWS, inspect, pool
from dualscan.inspect.trace import logit_gradients, trace
from dualscan.inspect.views import look
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM


@pytest.fixture(scope="module")
def model() -> MambaLM:
    torch.manual_seed(2)
    sizes = {"d_model": 32, "vocab_size": 30, "d_state": 8, "headdim": 8, "n_heads": 2, "embedding_std": 1.0}
    scales = {"embedding_scale": 2.0, "residual_scale": 0.7, "logits_scale": 0.3}
    return MambaLM(ModelConfig(pattern="M*-mPS", adapter_rank=2, **sizes, **scales)).double()


TOKENS = torch.randint(30, (17,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("block_bytes", [1, 2**24])
def test_report_is_what_its_parts_say(model, monkeypatch, block_bytes):
    monkeypatch.setattr(reports, "_BLOCK_BYTES", block_bytes)
    seen = inspect(model, TOKENS, target=5, resolution=6, mean_resolution=17)
    stream, inputs = trace(model, TOKENS[None])
    gradients = list(logit_gradients(model, stream, position=-1, target=5))[::-1]
    kinds = [(layer.index, layer.kind) for layer in seen.layers]
    assert kinds == [(0, "mamba2"), (1, "attention"), (3, "mamba"), (4, "parallel"), (5, "shared")]
    assert (seen.map_block, seen.mean_block) == (3, 1)
    looked = ((i, look(model.layers[i].mixer, inputs[i])) for i in range(6))
    views = {i: view for i, view in looked if view is not None}
    for name in VIEWS:
        matrices = {i: getattr(view, name)()[0] for i, view in views.items()}
        for layer in seen.layers:
            torch.testing.assert_close(layer.maps[name], pool(matrices[layer.index], 3).float())
            torch.testing.assert_close(layer.mean[name], matrices[layer.index].abs().mean(0))
        torch.testing.assert_close(seen.rollout[name], rollout(map(mean_mixing, matrices.values())))
        weighted = [weighted_mixing(m, gradients[i + 1][0]) for i, m in matrices.items()]
        torch.testing.assert_close(seen.attribution[name], rollout(weighted)[-1])
    torch.testing.assert_close(seen.input_gradient, (stream[0] * gradients[0])[0].sum(-1))
    for layer in seen.layers:
        for name in VIEWS:
            context = effective_context(getattr(views[layer.index], name)()[0])[:, 8:].double().mean(-1)
            torch.testing.assert_close(layer.context[name], context)
        log_decay = views[layer.index].log_decay()
        assert (log_decay is None) == (layer.half_lives is None) == (layer.kind == "attention")
        if log_decay is not None:
            torch.testing.assert_close(layer.half_lives, spectrum(log_decay))


def test_predictions_are_the_models(model):
    seen = inspect(model, TOKENS)
    probabilities = model(TOKENS[None]).logits[0, -1, :30].softmax(-1)
    assert seen.target == seen.predictions[0][0] == probabilities.argmax().item()
    assert [p for _, p in seen.predictions] == pytest.approx(probabilities.topk(5).values.tolist(), rel=1e-5)


def test_one_token_is_a_text(model):
    seen = inspect(model, TOKENS[:1])
    assert seen.rollout["operator"].tolist() == [[1.0]]
    assert seen.layers[0].context["operator"].tolist() == [1.0] * 8


@pytest.mark.parametrize(("seqlen", "block"), [(7, 1), (7, 2), (8, 4), (5, 9)])
def test_pool_keeps_the_largest_magnitude(seqlen, block):
    matrix = torch.randn(2, seqlen, seqlen)
    pooled = pool(matrix, block)
    cells = -(-seqlen // block)
    assert pooled.shape == (2, cells, cells)
    for i in range(cells):
        for j in range(cells):
            tile = matrix[:, i * block : (i + 1) * block, j * block : (j + 1) * block].flatten(1)
            expected = tile.gather(1, tile.abs().argmax(1, keepdim=True))[:, 0]
            assert torch.equal(pooled[:, i, j], expected)


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        (TOKENS[:0], {}, r"tokens have shape \(0,\); expected \(seqlen,\) with at least one token"),
        (TOKENS[None], {}, r"tokens have shape \(1, 17\)"),
        (torch.tensor([3, 30]), {}, "token 30 is not in 0 to 29; use this model's own tokenizer"),
        (TOKENS, {"target": -1}, "token -1 is not in 0 to 29"),
        (TOKENS, {"resolution": 0}, "resolution=0 must be at least 1 cell"),
        (torch.zeros(5000, dtype=torch.int64), {}, "matrices of 5000 tokens at 125 cells a side need about 3.7 GiB"),
        (TOKENS, {"memory": 1e-6}, "more than memory=1e-06; shorten the text, lower the resolution, or allow more"),
    ],
)
def test_bad_input_is_named(model, tokens, options, words):
    with pytest.raises(ValueError, match=words):
        inspect(model, tokens, **options)


def test_a_model_without_mamba_layers_is_named():
    model = MambaLM(ModelConfig(d_model=32, pattern="*-", vocab_size=30))
    with pytest.raises(ValueError, match=r"the model has no Mamba layers \(pattern '\*-'\)"):
        inspect(model, TOKENS)
