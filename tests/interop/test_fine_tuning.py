"""A checkpoint of transformers, fine-tuned here with an adapter, goes back to transformers."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import dualscan
from dualscan.interop import DualscanForCausalLM
from tests.models.families.cases import CASES, saved, tokens
from tests.oracle import relative_error

# One configuration a family, without experts, which peft has no adapters for.
FAMILIES = ("mamba2", "mamba", "falcon_mamba", "bamba", "falcon_h1", "zamba2")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_with_an_adapter(family: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.family == family)
    theirs, ids = saved(case, tmp_path / "theirs"), tokens(2, 11)
    before = theirs(ids).logits.detach()
    model = dualscan.load(tmp_path / "theirs")
    base = DualscanForCausalLM.from_model(model)
    adapted: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    loss = adapted(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        after, trained = adapted.eval()(ids, labels=ids)[:2]
    assert after < loss
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.save(tmp_path / "back", format="source")
    merged = adapted.merge_and_unload()
    merged.model.save(tmp_path / "back", format="source")
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert type(back) is type(theirs)
    with torch.no_grad():
        assert relative_error(back(ids).logits, trained) <= 1e-5
        assert relative_error(before, trained) > 1e-3
        # The adapter alone, put on the checkpoint again.
        again = DualscanForCausalLM.from_model(dualscan.load(tmp_path / "theirs"))
        assert relative_error(peft.PeftModel.from_pretrained(again, tmp_path / "adapter")(ids).logits, trained) <= 1e-6
