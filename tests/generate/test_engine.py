"""Generation token by token against the full forward pass, and what ends it."""

import pytest
import torch

from dualscan.generate import engine
from dualscan.generate.engine import generate, prefill, stream
from dualscan.generate.sampling import Sampling
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from tests.oracle import assert_close


@pytest.fixture(scope="module")
def model() -> MambaLM:
    """Random weights, scaled up so that the most likely token is clear; in float64 for exact comparison."""
    torch.manual_seed(1)
    model = MambaLM(ModelConfig(d_model=32, pattern="MM", vocab_size=37, d_state=16, headdim=16)).double()
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    return model


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 37, (length,), generator=generator) for length in lengths]


def greedy_by_full_forward(model: MambaLM, prompt: torch.Tensor, n: int) -> list[int]:
    tokens = prompt[None]
    with torch.inference_mode():
        for _ in range(n):
            best = model(tokens).logits[:, -1, : model.config.vocab_size].argmax(-1)
            tokens = torch.cat([tokens, best[:, None]], dim=1)
    return tokens[0, len(prompt) :].tolist()


def test_greedy_is_the_argmax_of_the_full_forward(model):
    (prompt,) = prompts(9)
    out = generate(model, prompt[None], max_tokens=25, temperature=0)
    assert out.tokens[0].tolist() == greedy_by_full_forward(model, prompt, 25)
    assert out.lengths.tolist() == [25]


def test_prefill_in_pieces_is_prefill(model, monkeypatch):
    rows = torch.stack(prompts(11, 11))
    whole, _ = prefill(model, rows)
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 4)
    pieces, state = prefill(model, rows)
    assert_close("logits", pieces, whole, dtype=torch.float64)
    with torch.inference_mode():
        assert_close("logits", whole, model(rows).logits[:, -1], dtype=torch.float64)
        following = torch.zeros(2, 1, dtype=torch.int64)
        expected = model(torch.cat([rows, following], dim=1)).logits[:, -1]
        assert_close("step", model(following, state=state).logits[:, -1], expected, dtype=torch.float64)


def test_prompts_of_different_lengths_do_not_mix(model):
    rows = prompts(3, 14, 1, 8)
    together = generate(model, rows, max_tokens=12, temperature=0)
    for index, row in enumerate(rows):
        assert together.tokens[index].tolist() == greedy_by_full_forward(model, row, 12)


def test_seeds_reproduce_and_differ(model):
    rows = torch.stack(prompts(5, 5))
    draws = [generate(model, rows, max_tokens=20, seed=seed).tokens for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].max() < model.config.vocab_size


def test_the_global_generator_serves_without_a_seed(model):
    rows = torch.stack(prompts(5))
    torch.manual_seed(11)
    first = generate(model, rows, max_tokens=20).tokens
    torch.manual_seed(11)
    assert torch.equal(first, generate(model, rows, max_tokens=20).tokens)


def test_stop_ids_end_each_row_by_itself(model):
    rows = prompts(3, 6)
    free = [greedy_by_full_forward(model, row, 30) for row in rows]
    stop = free[0][4]
    ends = [sequence.index(stop) if stop in sequence else 30 for sequence in free]
    out = generate(model, rows, max_tokens=30, temperature=0, stop_ids=[stop])
    assert out.lengths.tolist() == ends
    for row, sequence, end in zip(out.tokens.tolist(), free, ends, strict=True):
        assert row[:end] == sequence[:end]
        assert set(row[end:]) <= {stop}
    if all(end < 30 for end in ends):
        assert out.tokens.shape[1] == max(ends) + 1


def test_padding_rows_of_the_embedding_are_never_drawn(model):
    assert model.config.padded_vocab_size == 48
    with torch.no_grad():
        kept = model.embedding.weight[37:].clone()
        model.embedding.weight[37:] = 100 * model.embedding.weight[:11]
    out = generate(model, torch.stack(prompts(5)), max_tokens=40, seed=0)
    with torch.no_grad():
        model.embedding.weight[37:] = kept
    assert out.tokens.max() < 37


def test_repetition_penalty_counts_prompt_and_made_tokens(model):
    """A huge penalty on positive logits forbids a second visit as long as fresh tokens with positive logits remain."""
    (prompt,) = prompts(6)
    plain = generate(model, prompt[None], max_tokens=8, temperature=0).tokens[0].tolist()
    out = generate(model, prompt[None], max_tokens=8, temperature=0, repetition_penalty=1e6).tokens[0].tolist()
    assert len({*plain, *prompt.tolist()}) < len(plain) + len(set(prompt.tolist())), "the plain text repeats itself"
    assert len(set(out)) == len(out)
    assert not set(out) & set(prompt.tolist())


def test_stream_yields_as_it_goes_and_leaves_gradients_alone(model):
    tokens = stream(model, torch.stack(prompts(4)), max_tokens=3, sampling=Sampling(temperature=0))
    first = next(tokens)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert first.shape == (1,)
    assert len(list(tokens)) == 2


def test_model_method_is_the_same(model):
    rows = torch.stack(prompts(5))
    assert torch.equal(
        model.generate(rows, max_tokens=9, seed=1, top_k=5).tokens,
        generate(model, rows, max_tokens=9, seed=1, top_k=5).tokens,
    )


def test_no_tokens(model):
    out = generate(model, prompts(3, 4), max_tokens=0)
    assert out.tokens.shape == (2, 0)
    assert out.lengths.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (torch.zeros(4, dtype=torch.int64), ValueError, r"shape \(4,\); expected \(batch, seqlen\)"),
        ([], ValueError, "no prompt"),
        ([torch.zeros(0, dtype=torch.int64)], ValueError, "prompt 0 is empty"),
        (torch.zeros(1, 4), TypeError, r"dtype torch\.float32"),
        ([[1, 2, 3]], TypeError, r"prompt 0 is of type list; pass tensors: torch\.tensor\(tokenizer\.encode"),
        ("some text", TypeError, r"prompt 0 is of type str"),
        ([torch.zeros(1, 4, dtype=torch.int64)], ValueError, r"prompt 0 has shape \(1, 4\)"),
    ],
)
def test_bad_prompts_are_named(model, wrong, error, words):
    with pytest.raises(error, match=words):
        generate(model, wrong, max_tokens=2)


def test_bad_lengths_are_named(model):
    with pytest.raises(ValueError, match="max_tokens=-1"):
        generate(model, prompts(3), max_tokens=-1)
