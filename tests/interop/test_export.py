"""Exported programs compute what the model computes, in ATen operations and in onnxruntime."""

import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

import dualscan
from dualscan.interop import export_prefill, export_step, save_onnx
from tests.oracle import assert_close

PATTERNS = ("MM", "PmS")  # S: Mamba-2, attention and MLP
SEQLEN, BATCH = 70, 2  # more than a chunk, and not a multiple


def model(pattern: str) -> dualscan.MambaLM:
    sizes: dict[str, Any] = {"d_model": 32, "vocab_size": 61, "d_state": 8, "headdim": 16, "n_heads": 4, "ngroups": 2}
    others = {"n_experts": 4, "experts_per_token": 2, "d_expert": 8, "inner_norms": True, "inner_norm_weights": False}
    built = dualscan.MambaLM(
        dualscan.ModelConfig(**sizes, **others, pattern=pattern, rope_theta=1e4, adapter_rank=4)
    ).eval()
    with torch.no_grad():
        for p in built.parameters():
            if p.ndim > 1:
                p.normal_(std=0.1)
    return built


def states(state: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(state) if t is not None]


@pytest.mark.parametrize("pattern", [PATTERNS[0], *(pytest.param(p, marks=pytest.mark.slow) for p in PATTERNS[1:])])
def test_programs_of_aten_operations(pattern: str, tmp_path: Path) -> None:
    """Saved, read again and run: prefill, then steps, against the model."""
    lm, tokens = model(pattern), torch.randint(61, (BATCH, SEQLEN + 3))
    prefill, step = export_prefill(lm, seqlen=SEQLEN, batch=BATCH, logits_to_keep=0), export_step(lm, batch=BATCH)
    programs = []
    for name, program in (("prefill", prefill), ("step", step)):
        assert not [node for node in program.graph.nodes if "dualscan" in str(node.target)]
        torch.export.save(program, tmp_path / f"{name}.pt2")
        programs.append(torch.export.load(tmp_path / f"{name}.pt2").module())
    with torch.no_grad():
        expected, (logits, state) = lm(tokens[:, :SEQLEN]), programs[0](tokens[:, :SEQLEN])
        for i in range(SEQLEN, SEQLEN + 3):
            assert_close("logits", logits, expected.logits, dtype=torch.float32)
            for (name, t), other in zip(state.items(), states(expected.state), strict=True):
                assert_close(name, t.float(), other.float(), dtype=torch.float32)
            token = tokens[:, i : i + 1]
            expected, (logits, state) = lm(token, state=expected.state), programs[1](token, state)


def test_sums_that_wait_for_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model on a GPU traces in the place of sums and norms."""
    monkeypatch.setattr("dualscan.nn.block.adds_in_norms", lambda h: True)
    lm, tokens = model("M-"), torch.randint(61, (BATCH, SEQLEN))
    program = export_prefill(lm, seqlen=SEQLEN, batch=BATCH)
    assert not [node for node in program.graph.nodes if "dualscan" in str(node.target)]
    with torch.no_grad():
        assert_close("logits", program.module()(tokens)[0], lm(tokens, logits_to_keep=1).logits, dtype=torch.float32)


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    """onnxruntime carries the state from prefill through steps, by the names of the tensors."""
    lm, tokens = model("mS"), torch.randint(61, (BATCH, SEQLEN + 3))
    sessions = []
    for name, program in (
        ("prefill", export_prefill(lm, seqlen=SEQLEN, batch=BATCH)),
        ("step", export_step(lm, batch=BATCH)),
    ):
        save_onnx(program, tmp_path / f"{name}.onnx")
        sessions.append(onnxruntime.InferenceSession(tmp_path / f"{name}.onnx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefill.onnx", "step.onnx"]

    def run(session: onnxruntime.InferenceSession, inputs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip([out.name for out in session.get_outputs()], session.run(None, inputs), strict=True))

    outputs = [out.name for out in sessions[1].get_outputs()]
    assert "next.0.ssm" in outputs
    assert [i.name for i in sessions[1].get_inputs()] == ["tokens", *(n.replace("next", "state") for n in outputs[1:])]
    made = run(sessions[0], {"tokens": tokens[:, :SEQLEN].numpy()})
    with torch.no_grad():
        expected = lm(tokens[:, :SEQLEN], logits_to_keep=1)
        for i in range(SEQLEN, SEQLEN + 3):
            assert_close("logits", torch.from_numpy(made["logits"]), expected.logits, dtype=torch.float32)
            token = tokens[:, i : i + 1]
            state = {name.replace("next", "state", 1): t for name, t in made.items() if name != "logits"}
            made = run(sessions[1], {"tokens": token.numpy(), **state})
            expected = lm(token, state=expected.state)
    assert_close("last", torch.from_numpy(made["logits"]), expected.logits, dtype=torch.float32)


def test_messages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lm = model("M")
    with pytest.raises(ValueError, match="seqlen=0 must be at least 1"):
        export_prefill(lm, seqlen=0)
    with pytest.raises(ValueError, match="batch=-1 must be at least 1"):
        export_step(lm, batch=-1)
    with pytest.raises(ValueError, match=r"pattern='ME' has experts \(E\).*without E"):
        export_step(model("ME"))
    program = export_step(lm)
    with pytest.raises(OSError, match="nowhere"):
        save_onnx(program, tmp_path / "nowhere" / "step.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'onnxscript.*pip install "dualscan\[onnx\]"'):
        save_onnx(program, tmp_path / "step.onnx")
    assert list(tmp_path.iterdir()) == []
