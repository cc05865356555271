"""The same weights in `transformers`' Mamba-2 (its PyTorch path) give the same logits."""

from typing import Any

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from tests.oracle import assert_close

CASES: dict[str, dict[str, Any]] = {
    "one group": {},
    "groups": {"ngroups": 2},
    "limit": {"dt_limit": (0.0, 0.05)},
    "narrow convolution": {"d_conv": 2},
}


def pair(dtype: torch.dtype, **changes: Any) -> tuple[MambaLM, Mamba2ForCausalLM]:
    """Our model with random weights, and theirs with a copy of them."""
    sizes = {"d_model": 32, "pattern": "MM", "vocab_size": 48, "d_state": 16, "headdim": 16, "embedding_std": 1.0}
    config = ModelConfig(**{**sizes, **changes})
    ours = MambaLM(config)
    theirs = Mamba2ForCausalLM(
        Mamba2Config(
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            vocab_size=config.padded_vocab_size,
            state_size=config.d_state,
            head_dim=config.headdim,
            num_heads=config.nheads,
            expand=config.expand,
            n_groups=config.ngroups,
            conv_kernel=config.d_conv,
            time_step_limit=config.dt_limit,
            layer_norm_epsilon=config.norm_eps,
            chunk_size=8,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                p.uniform_(0.5, 1.5)
    renamed = {
        f"backbone.{'embeddings.weight' if name == 'embedding.weight' else name}": t
        for name, t in ours.state_dict().items()
    }
    renamed["lm_head.weight"] = ours.embedding.weight
    theirs.load_state_dict(renamed)
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seqlen", [1, 7, 29])
def test_logits(case: str, seqlen: int) -> None:
    ours, theirs = pair(torch.float32, **CASES[case])
    tokens = torch.randint(48, (2, seqlen))
    expected = theirs(tokens, use_cache=False).logits
    assert_close("logits", ours(tokens).logits, expected, dtype=torch.float32)


def test_decoding_token_by_token() -> None:
    ours, theirs = pair(torch.float32, ngroups=2)
    tokens = torch.randint(48, (2, 20))
    with torch.no_grad():
        mine, cached = ours(tokens[:, :9]), theirs(tokens[:, :9], use_cache=True)
        for i in range(9, 20):
            assert_close(f"token {i}", mine.logits[:, -1], cached.logits[:, -1], dtype=torch.float32)
            token = tokens[:, i : i + 1]
            mine = ours(token, state=mine.state)
            cached = theirs(token, cache_params=cached.cache_params, use_cache=True)


def test_gradients() -> None:
    ours, theirs = pair(torch.float32, ngroups=2)
    tokens = torch.randint(48, (2, 21))
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    loss = ours.loss(tokens, targets)
    loss.backward()
    other = theirs(tokens, labels=tokens).loss
    other.backward()
    assert_close("loss", loss, other, dtype=torch.float32)
    theirs_by_name = dict(theirs.backbone.named_parameters())
    for name, p in ours.named_parameters():
        grad = theirs_by_name["embeddings.weight" if name == "embedding.weight" else name].grad
        assert p.grad is not None
        assert grad is not None
        assert_close(name, p.grad, grad, dtype=torch.float32, gradient=True)


def test_low_precision_is_no_worse() -> None:
    """bf16 weights: our logits are nearer to those of float32 than theirs, which round decays and norm weights too."""
    ours, theirs = pair(torch.float32)
    tokens = torch.randint(48, (4, 40))
    with torch.no_grad():
        exact = ours(tokens).logits
        mine, other = ours.bfloat16()(tokens).logits, theirs.bfloat16()(tokens, use_cache=False).logits
    error = [(t.float() - exact).square().mean() for t in (mine, other)]
    assert error[0] <= error[1]
