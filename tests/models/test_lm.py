"""The language model: every way through it gives the same logits, whatever layers it has."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualscan.models import lm
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from tests.oracle import assert_close, relative_error
from tests.strategies import pack_lengths, packed

quick = settings(max_examples=10, deadline=None, derandomize=True)

PATTERNS: dict[str, dict[str, Any]] = {
    "mamba2": {"pattern": "MM"},
    "mamba": {"pattern": "mmM"},
    "hybrid": {"pattern": "M*-M", "rope_theta": 100.0, "n_kv_heads": 2},
    "attention first": {"pattern": "*M", "tie_embeddings": False},
    "transformer": {"pattern": "*-*-", "rope_theta": 100.0},
    "groups": {"pattern": "M-M", "ngroups": 2, "chunk_size": 4, "d_conv": 2},
}


def model_of(pattern: str, **changes: Any) -> MambaLM:
    sizes = {"d_model": 32, "vocab_size": 50, "d_state": 8, "headdim": 16, "n_heads": 4, "embedding_std": 1.0}
    return MambaLM(ModelConfig(**{**sizes, **PATTERNS[pattern], **changes}))


def text(batch: int, seqlen: int) -> Tensor:
    return torch.randint(50, (batch, seqlen))


def tensors(state: Any) -> list[Tensor]:
    """Every tensor of a state, in order."""
    if isinstance(state, Tensor):
        return [state]
    return [] if state is None else [t for part in state for t in tensors(part)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_step_by_step_equals_the_whole(pattern: str, batch: int) -> None:
    model, tokens = model_of(pattern), text(batch, 13)
    whole = model(tokens)
    with torch.no_grad():
        state, logits = None, []
        for token in tokens.split(1, dim=1):
            out = model(token, state=state)
            state = out.state
            logits.append(out.logits)
    assert_close("logits", torch.cat(logits, 1), whole.logits, dtype=torch.float32)
    for actual, expected in zip(tensors(state), tensors(whole.state), strict=True):
        assert_close("state", actual, expected, dtype=torch.float32)


@quick
@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from(sorted(PATTERNS)))
def test_prefill_in_two_at_any_cut(first: int, rest: int, pattern: str) -> None:
    model, tokens = model_of(pattern), text(2, first + rest)
    one = model(tokens[:, :first])
    before = [t.clone() for t in tensors(one.state)]
    two = model(tokens[:, first:], state=one.state)
    assert_close("logits", torch.cat([one.logits, two.logits], 1), model(tokens).logits, dtype=torch.float32)
    for kept, old in zip(tensors(one.state), before, strict=True):
        assert torch.equal(kept, old)


@quick
@given(pack_lengths(), st.sampled_from(sorted(PATTERNS)))
def test_packed_is_each_sequence_alone(lengths: list[int], pattern: str) -> None:
    model, tokens = model_of(pattern), text(1, sum(lengths))
    out = model(tokens, cu_seqlens=packed(lengths))
    bounds = [0, *itertools.accumulate(lengths)]
    for start, end in itertools.pairwise(bounds):
        alone = model(tokens[:, start:end]).logits
        assert_close(f"[{start}, {end})", out.logits[:, start:end], alone, dtype=torch.float32)
    # The packed states go on as a batch: one token for every sequence.
    following = text(len(lengths), 1)
    stepped = model(following, state=out.state).logits
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone = model(torch.cat([tokens[:, start:end], following[i : i + 1]], 1)).logits[:, -1:]
        assert_close(f"next of {i}", stepped[i : i + 1], alone, dtype=torch.float32)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_future_changes_nothing(pattern: str) -> None:
    model, tokens = model_of(pattern), text(1, 12)
    other = tokens.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 50
    assert torch.equal(model(tokens).logits[:, :7], model(other).logits[:, :7])
    assert not torch.equal(model(tokens).logits[:, 7:], model(other).logits[:, 7:])


@pytest.mark.parametrize("keep", [1, 3, 12, 99])
def test_logits_to_keep(keep: int) -> None:
    model, tokens = model_of("hybrid"), text(2, 12)
    logits = model(tokens, logits_to_keep=keep).logits
    assert_close("logits", logits, model(tokens).logits[:, -keep:], dtype=torch.float32)


@pytest.mark.parametrize("most", [lm.MOST_LOGITS, 0], ids=["all logits", "in blocks"])
def test_loss_is_the_mean_cross_entropy(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "MOST_LOGITS", most)
    model, tokens = model_of("hybrid"), text(2, 12)
    targets = torch.roll(tokens, -1, 1)
    targets[:, -1] = -100
    logits = model(tokens).logits.double()
    kept = logits[:, :-1].log_softmax(-1).gather(-1, targets[:, :-1, None])
    assert_close("loss", model.loss(tokens, targets), -kept.mean(), dtype=torch.float32)
    bf16 = model.bfloat16().loss(tokens, targets)
    assert bf16.dtype == torch.float32
    lengths = packed([5, 7])
    flat = model.float().loss(tokens[:1], targets[:1], cu_seqlens=lengths)
    halves = torch.cat([model(tokens[:1, :5]).logits, model(tokens[:1, 5:]).logits], 1)
    assert_close("packed", flat, F.cross_entropy(halves[0].double(), targets[0]), dtype=torch.float32)


def gradients(model: MambaLM, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model.loss(tokens, torch.roll(tokens, -1, 1)).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_in_blocks_has_the_same_gradients(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of("hybrid"), text(2, 12)
    expected = gradients(model.double(), tokens)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = gradients(model.float(), tokens)
        monkeypatch.setattr(lm, "MOST_LOGITS", 0)
        blocks = gradients(model, tokens)
    assert any(not torch.equal(a, b) for a, b in zip(plain, blocks, strict=True)), "the same path twice"
    # Roundings add up over the layers: the gradients are held to those of the plain loss alone.
    allowed = 3 * torch.tensor([relative_error(g, exact) for g, exact in zip(plain, expected, strict=True)])
    found = torch.tensor([relative_error(g, exact) for g, exact in zip(blocks, expected, strict=True)])
    assert (found <= allowed + 1e-6).all(), (found, allowed)


@pytest.mark.parametrize("case", ["tied", "untied", "hooked", "frozen"])
def test_a_tied_weight_gets_one_gradient(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding's rows are added to the gradient that the loss leaves, unless there is more to an embedding."""
    model = model_of("attention first" if case == "untied" else "mamba2").double()
    model.embedding.weight.requires_grad_(case != "frozen")
    if case == "hooked":
        model.embedding.register_forward_hook(lambda module, args, out: 2 * out)
    tokens = text(2, 12)
    monkeypatch.setattr(lm, "MOST_LOGITS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(MambaLM, "_may_tie_gradients", False)
        expected = gradients(model, tokens)
    calls = []
    real = lm.tied_embedding
    monkeypatch.setattr(lm, "tied_embedding", lambda *given: calls.append(1) or real(*given))
    found = gradients(model, tokens)
    assert len(calls) == (case == "tied")
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dtypes(pattern: str, dtype: torch.dtype) -> None:
    model, tokens = model_of(pattern).to(dtype), text(1, 12)
    exact = model_of(pattern).double()
    exact.load_state_dict(model.state_dict())
    expected = exact(tokens).logits
    with torch.no_grad():
        out = model(tokens[:, :11])
        logits = torch.cat([out.logits, model(tokens[:, 11:], state=out.state).logits], 1)
    assert logits.dtype == dtype
    # A handful of roundings a layer add up in the residual stream; the oracle's row is for one operator.
    roundings = 4 * len(model.layers)
    assert_close("logits", (logits.double() - expected) / roundings + expected, expected, dtype=dtype)


def test_every_parameter_learns() -> None:
    for pattern in PATTERNS:
        model, tokens = model_of(pattern), text(2, 12)
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name


def test_initialisation() -> None:
    model = model_of("hybrid", d_model=128, embedding_std=0.02, vocab_size=2000)
    assert abs(model.embedding.weight.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * model.embedding.weight.numel())
    for block in model.layers:
        weight = block.get_submodule("mixer.out_proj").get_parameter("weight")
        bound = 1 / math.sqrt(weight.shape[1]) / math.sqrt(len(model.layers))
        assert weight.abs().max() <= bound
        assert abs(weight.std().item() * math.sqrt(3) / bound - 1) < 4 / math.sqrt(weight.numel())
    # With tied embeddings of this size the first loss is that of a uniform guess.
    tokens = torch.randint(2000, (2, 40))
    assert abs(model.loss(tokens[:, :-1], tokens[:, 1:]).item() - math.log(2000)) < 0.2
    assert model.output_weight is model.embedding.weight
    untied = model_of("attention first")
    assert untied.output_weight is not untied.embedding.weight


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m(torch.zeros(3, dtype=torch.int64)), ValueError, ["shape (3,)", "(batch, seqlen)"]),
        (lambda m: m(torch.zeros(1, 3)), TypeError, ["torch.float32", "torch.int64"]),
        (lambda m: m(text(1, 3), state=(None,)), ValueError, ["1 layers", "the model 4", "its own state"]),
        (lambda m: m(text(2, 3), state=m(text(1, 3)).state), ValueError, ["batch=2"]),
        (lambda m: m(text(2, 3), cu_seqlens=packed([3])), ValueError, ["batch=2", "cu_seqlens"]),
        (lambda m: m(text(1, 3), logits_to_keep=-1), ValueError, ["logits_to_keep=-1", "0 keeps all"]),
        (lambda m: m(torch.tensor([[1, 64]])), ValueError, ["token 64", "0 to 63", "tokenizer"]),
        (lambda m: m(torch.tensor([[-1, 4]])), ValueError, ["token -1", "0 to 63"]),
    ],
)
def test_bad_input(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        call(model_of("hybrid"))
    for word in words:
        assert word in str(raised.value)


def test_it_compiles_and_trains_the_same() -> None:
    torch._dynamo.reset()
    model, tokens = model_of("mamba2"), text(2, 13)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    F.cross_entropy(compiled(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert_close(name, grads[name], p.grad.double(), dtype=torch.float32, gradient=True)
