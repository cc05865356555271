"""Mixers side by side, scaled and shared blocks: against what they are made of, and shared after a copy."""

import copy
from pathlib import Path

import pytest
import torch

import dualscan
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from dualscan.nn.attention import Attention
from dualscan.nn.block import Block
from dualscan.nn.hybrid.parallel import Parallel
from dualscan.nn.hybrid.scaled import ScaledBlock
from dualscan.nn.hybrid.shared import SharedBlock
from dualscan.nn.mamba2 import Mamba2
from dualscan.nn.mlp import MLP
from tests.oracle import assert_close

D = 16


def test_side_by_side() -> None:
    mamba2, attention = Mamba2(D, d_state=4, headdim=8), Attention(D, 2)
    layer = Parallel([mamba2, attention], in_scales=(0.5, 1.0), out_scales=(1.0, 3.0)).double()
    u = torch.randn(2, 7, D, dtype=torch.float64)
    expected = mamba2(0.5 * u)[0] + 3.0 * attention(u)[0]
    assert_close("y", layer(u)[0], expected, dtype=torch.float64)
    first, state = layer(u[:, :4])
    second, state = layer(u[:, 4:], state)
    assert_close("pieces", torch.cat((first, second), dim=1), expected, dtype=torch.float64)


def test_scaled() -> None:
    mlp, h = MLP(D), torch.randn(1, 3, D)
    plain, scaled = Block(D, mlp), ScaledBlock(D, mlp, scale=0.25)
    torch.testing.assert_close(scaled(h)[0] - h, 0.25 * (plain(h)[0] - h))


def shared_model() -> MambaLM:
    sizes = {"d_model": D, "vocab_size": 20, "d_state": 4, "headdim": 8, "n_heads": 2, "head_dim": 8}
    return MambaLM(ModelConfig(**sizes, pattern="MSSS", n_shared=2, adapter_rank=2, mlp_activation="geglu")).eval()


def transformers_of(model: MambaLM) -> list[int]:
    return [id(block._shared[0]) for block in model.layers if isinstance(block, SharedBlock)]


def test_transformers_are_taken_in_turn_and_stay_shared(tmp_path: Path) -> None:
    model, ids = shared_model(), torch.randint(20, (1, 6))
    model.save(tmp_path)
    for other in (model, copy.deepcopy(model), dualscan.load(tmp_path), dualscan.load(tmp_path).to(torch.bfloat16)):
        first, second, third = transformers_of(other)
        assert first == third != second
        owned = [block.transformer for block in other.layers if isinstance(block, SharedBlock)]
        assert [id(transformer) for transformer in owned[:2]] == [first, second]
        assert owned[2] is None
    names = [name for name in model.state_dict() if name.endswith("transformer.attention.q_proj.weight")]
    assert names == ["layers.1.transformer.attention.q_proj.weight", "layers.2.transformer.attention.q_proj.weight"]
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_packed_sequences_through_shared_blocks() -> None:
    model, ids = shared_model(), torch.randint(20, (1, 9))
    packed = model(ids, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32)).logits
    for begin, end in ((0, 4), (4, 9)):
        torch.testing.assert_close(packed[:, begin:end], model(ids[:, begin:end]).logits, atol=1e-5, rtol=1e-5)


def test_a_shared_block_wants_the_embedding() -> None:
    with pytest.raises(ValueError, match="the embedding is missing"):
        shared_model().layers[1](torch.randn(1, 2, D))
