"""`use_in_transformers`: transformers' models on our operators give what they give on their own."""

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dualscan.interop import operators, patch, use_in_transformers
from dualscan.interop.patch import FAMILIES
from tests.interop.families import VOCAB, tiny
from tests.oracle import assert_close


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def mask(padding: str) -> Tensor | None:
    """`(2, 21)`: one row of 13 and one of 21 tokens."""
    if padding == "none":
        return None
    pad = torch.zeros(8, dtype=torch.int64)
    short = [pad, torch.ones(13, dtype=torch.int64)]
    return torch.stack([torch.cat(short if padding == "left" else short[::-1]), torch.ones(21, dtype=torch.int64)])


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records which of our operators run."""
    seen: list[str] = []
    for name in ("ssd", "ssd_step", "causal_conv1d"):
        ours = getattr(operators, name)

        def counted(*args: Any, name: str = name, ours: Any = ours, **kwargs: Any) -> Any:
            seen.append(name)
            return ours(*args, **kwargs)

        monkeypatch.setattr(operators, name, counted)
    return seen


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_and_gradients(family: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training mode, where families would take their fused path."""
    model, tokens, attention_mask = tiny(family).train(), torch.randint(VOCAB, (2, 21)), mask(padding)
    real = torch.ones(2, 21, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    labels = tokens.masked_fill(~real, -100)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model(tokens, attention_mask=attention_mask, labels=labels, use_cache=False)
        out.loss.backward()
        return out.logits[real], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    logits, grads = run()
    seen = calls(monkeypatch)
    with use_in_transformers([family]):
        mine, my_grads = run()
    assert {"ssd", "causal_conv1d"} <= set(seen)
    assert_close("logits", mine, logits, dtype=torch.float32)
    assert grads.keys() == my_grads.keys()
    for name, grad in grads.items():
        assert_close(name, my_grads[name], grad, dtype=torch.float32, gradient=True)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_generate(family: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny(family), torch.randint(2, VOCAB, (2, 21))
    options: dict[str, Any] = {
        "attention_mask": mask(padding),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    theirs = model.generate(prompt, **options)
    seen = calls(monkeypatch)
    with use_in_transformers([family]):
        ours = model.generate(prompt, **options)
    assert {"ssd", "ssd_step", "causal_conv1d"} == set(seen)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert_close("logits", torch.stack(ours.logits), torch.stack(theirs.logits), dtype=torch.float32)


def test_prefill_in_pieces(family: str) -> None:
    model, tokens = tiny(family), torch.randint(VOCAB, (2, 19))
    with torch.no_grad(), use_in_transformers([family]):
        whole = model(tokens, use_cache=True).logits
        cache, pieces, read = None, [], 0
        for piece in tokens.split([9, 2, 7, 1], dim=1):
            name = "cache_params" if family == "mamba2" else "past_key_values"
            positions = {} if family == "mamba2" else {"position_ids": torch.arange(read, read + piece.shape[1])[None]}
            out = model(piece, use_cache=True, **{name: cache}, **positions)
            cache, read = out[name], read + piece.shape[1]
            pieces.append(out.logits)
    assert_close("logits", torch.cat(pieces, 1), whole, dtype=torch.float32)


def test_falcon_h1_with_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny("falcon_h1", mamba_rms_norm=True, mamba_norm_before_gate=False), torch.randint(VOCAB, (2, 21))
    expected = model(tokens).logits
    with use_in_transformers():
        assert_close("logits", model(tokens).logits, expected, dtype=torch.float32)


def test_packed_sequences() -> None:
    """`seq_idx` keeps sequences apart, which transformers alone cannot; in a batch of rows too."""
    model = tiny("granitemoehybrid", layer_types=["linear_attention"] * 3)
    tokens, seq_idx = torch.randint(VOCAB, (2, 12)), torch.tensor([[0] * 5 + [1] * 7, [3] * 2 + [4] * 9 + [5]])
    alone = [[(0, 5), (5, 12)], [(0, 2), (2, 11), (11, 12)]]
    with torch.no_grad(), use_in_transformers(["granitemoehybrid"]):
        packed = model(tokens, seq_idx=seq_idx.int(), use_cache=False).logits
        for row, spans in enumerate(alone):
            for start, end in spans:
                one = model(tokens[row : row + 1, start:end], use_cache=False).logits
                assert_close("packed", packed[row : row + 1, start:end], one, dtype=torch.float32)


def test_packed_sequences_have_no_cache() -> None:
    x, bc = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 1, 4)
    arguments = x, torch.rand(1, 4, 2), -torch.ones(2), bc, bc, 8
    with pytest.raises(ValueError, match=r"seq_idx.*use_cache=False"):
        operators.mamba2_chunk_scan(*arguments, seq_idx=torch.tensor([[0, 0, 1, 1]]), return_final_states=True)


def test_low_precision_is_no_worse(family: str) -> None:
    """bfloat16 weights: about as near to float32 as transformers' own path, which leaves the scan in float32."""
    model, tokens = tiny(family).bfloat16(), torch.randint(VOCAB, (8, 40))
    with torch.no_grad():
        theirs = model(tokens).logits
        with use_in_transformers([family]):
            ours = model(tokens).logits
        exact = model.float()(tokens).logits
    error, yardstick = (((t.float() - exact).norm() / exact.norm()).item() for t in (ours, theirs))
    assert error <= 1.2 * yardstick


def test_what_we_do_not_cover_stays_theirs() -> None:
    """Another activation than SiLU: their convolution, our SSD."""
    model, tokens = tiny("mamba2", hidden_act="gelu"), torch.randint(VOCAB, (2, 21))
    expected = model(tokens).logits
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    continued = model.generate(tokens, **options)
    with use_in_transformers(["mamba2"]):
        assert_close("logits", model(tokens).logits, expected, dtype=torch.float32)
        assert model.generate(tokens, **options).tolist() == continued.tolist()


def test_undo_restores_every_function() -> None:
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in FAMILIES]
    names = [ours.__name__ for ours in operators.OFFERED]
    before = [getattr(module, name) for module in modules for name in names]
    replacements = use_in_transformers()
    assert len(replacements.changed) == len(set(replacements.changed)) == 30
    during = [getattr(module, name) for module in modules for name in names]
    assert not set(map(id, before)) & set(map(id, during))
    assert use_in_transformers().changed == []  # ours already
    assert [getattr(module, name) for module in modules for name in names] == during
    replacements.undo()
    assert [getattr(module, name) for module in modules for name in names] == before
    assert replacements.changed == []


def test_undo_leaves_what_somebody_else_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("transformers.models.bamba.modeling_bamba")
    with use_in_transformers(["bamba"]):
        theirs = object()
        monkeypatch.setattr(module, "causal_conv1d_fn", theirs)
    assert module.causal_conv1d_fn is theirs


def test_it_says_what_it_changed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger=patch.__name__)
    with use_in_transformers(["zamba2"]):
        assert "modeling_zamba2: causal_conv1d_fn" in caplog.text


def test_unknown_family() -> None:
    with pytest.raises(ValueError, match=r"'jamba'.*mamba2, bamba"):
        use_in_transformers(["mamba2", "jamba"])


def test_a_version_without_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("transformers.models.bamba.modeling_bamba")
    untouched = importlib.import_module("transformers.models.mamba2.modeling_mamba2").causal_conv1d_fn
    monkeypatch.delattr(module, "mamba2_chunk_scan")
    with pytest.raises(ImportError, match=r"modeling_bamba.*no mamba2_chunk_scan.*pip install"):
        use_in_transformers(["mamba2", "bamba"])
    assert importlib.import_module("transformers.models.mamba2.modeling_mamba2").causal_conv1d_fn is untouched


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'transformers.*pip install "dualscan\[hf\]"'):
        use_in_transformers()
