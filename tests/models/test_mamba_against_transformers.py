"""The same weights in `transformers`' Mamba (its PyTorch path) give the same logits and the same gradients."""

from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from tests.oracle import assert_close

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "other sizes": {"d_conv": 2, "d_state": 5, "dt_rank": 3, "expand": 1},
    "biases": {"mamba_bias": True, "conv_bias": False},
}


def pair(**changes: Any) -> tuple[MambaLM, MambaForCausalLM]:
    """Our model with random weights, and theirs with a copy of them."""
    sizes = {"d_model": 32, "pattern": "mm", "vocab_size": 48, "d_state": 16, "embedding_std": 1.0}
    config = ModelConfig(**{**sizes, **changes})
    ours = MambaLM(config)
    theirs = MambaForCausalLM(
        MambaConfig(
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            vocab_size=config.padded_vocab_size,
            state_size=config.d_state,
            expand=config.expand,
            conv_kernel=config.d_conv,
            time_step_rank="auto" if config.dt_rank is None else config.dt_rank,
            use_bias=config.mamba_bias,
            use_conv_bias=config.conv_bias,
            layer_norm_epsilon=config.norm_eps,
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
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seqlen", [1, 29])
def test_logits(case: str, seqlen: int) -> None:
    ours, theirs = pair(**CASES[case])
    tokens = torch.randint(48, (2, seqlen))
    assert_close("logits", ours(tokens).logits, theirs(tokens, use_cache=False).logits, dtype=torch.float32)


def test_decoding_token_by_token() -> None:
    ours, theirs = pair()
    tokens = torch.randint(48, (2, 20))
    with torch.no_grad():
        mine, cached = ours(tokens[:, :9]), theirs(tokens[:, :9], use_cache=True)
        for i in range(9, 20):
            assert_close(f"token {i}", mine.logits[:, -1], cached.logits[:, -1], dtype=torch.float32)
            token = tokens[:, i : i + 1]
            mine = ours(token, state=mine.state)
            cached = theirs(token, cache_params=cached.cache_params, use_cache=True)


def test_gradients() -> None:
    ours, theirs = pair()
    tokens = torch.randint(48, (2, 21))
    loss = ours.loss(tokens, torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1))
    loss.backward()
    other = theirs(tokens, labels=tokens).loss
    other.backward()
    assert_close("loss", loss, other, dtype=torch.float32)
    theirs_by_name = dict(theirs.backbone.named_parameters())
    for name, p in ours.named_parameters():
        grad = theirs_by_name["embeddings.weight" if name == "embedding.weight" else name].grad
        assert_close(name, p.grad, grad, dtype=torch.float32, gradient=True)
