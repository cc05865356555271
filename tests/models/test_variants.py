"""Models with another head pattern or feature map: saved, loaded and generated from like the standard one."""

from pathlib import Path
from typing import Any

import pytest
import torch

import dualscan
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from tests.oracle import assert_close


@pytest.mark.parametrize(
    "options",
    [
        {"head_pattern": "multi-query"},
        {"feature_map": "rfa"},
        {"head_pattern": "multi-state", "feature_map": "layer_norm+square"},
    ],
)
def test_a_saved_variant_is_the_same_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = MambaLM(ModelConfig(d_model=32, pattern="MM", vocab_size=64, d_state=8, headdim=16, **options))
    model.save(tmp_path)
    loaded = dualscan.load(tmp_path)
    assert loaded.config == model.config
    tokens = torch.randint(64, (2, 9))
    with torch.inference_mode():
        whole, stepped, state = model(tokens).logits, [], None
        assert torch.equal(loaded(tokens).logits, whole)
        for token in tokens.split(1, 1):
            logits, state = loaded(token, state=state)
            stepped.append(logits)
    assert_close("steps", torch.cat(stepped, 1), whole, dtype=torch.float32)
