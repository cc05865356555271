"""`DualscanForCausalLM`: our model behind the interface of transformers gives what it gives by itself."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Mamba2Config, StaticCache

import dualscan
from dualscan.generate.engine import generate
from dualscan.interop import DualscanConfig, DualscanForCausalLM, register_with_transformers
from tests.oracle import assert_close

VOCAB = 61
SIZES: dict[str, Any] = {"d_model": 32, "vocab_size": VOCAB, "d_state": 8, "headdim": 16, "n_heads": 4}
EXPERTS: dict[str, Any] = {"n_experts": 4, "experts_per_token": 2, "d_expert": 8}
PATTERNS = ("MM", "mM*-", "PSES")


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register_with_transformers()


def model(pattern: str = "mM*-", **changes: Any) -> DualscanForCausalLM:
    config = dualscan.ModelConfig(
        **{
            **SIZES,
            **EXPERTS,
            "adapter_rank": 4,
            "pattern": pattern,
            "rope_theta": 1e4,
            "tie_embeddings": False,
            **changes,
        }
    )
    wrapped = DualscanForCausalLM.from_model(dualscan.MambaLM(config).eval(), pad_token_id=0, eos_token_id=1)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.ndim > 1:
                p.normal_(std=0.3)
    return wrapped


def padded(side: str, lengths: tuple[int, ...] = (5, 12, 9)) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Tokens, mask, and the rows alone; "between" has padding inside the rows."""
    rows = [torch.randint(2, VOCAB, (n,)) for n in lengths]
    mask = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for i, row in enumerate(rows):
        places = {"left": torch.arange(-len(row), 0), "right": torch.arange(len(row))}
        mask[i, places[side] if side in places else torch.randperm(mask.shape[1])[: len(row)]] = 1
    tokens = torch.zeros_like(mask)
    for i, row in enumerate(rows):
        tokens[i, mask[i].bool()] = row
    return tokens, mask, rows


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing(pattern: str, side: str) -> None:
    """Values and gradients of a padded batch are those of its rows alone; in float64, where nothing hides."""
    wrapped = model(pattern).double()
    tokens, mask, rows = padded(side)
    logits = wrapped(tokens, attention_mask=mask).logits
    weights = torch.randn(VOCAB, dtype=torch.float64)
    (logits[mask.bool()] @ weights).sin().sum().backward()
    grads = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.zero_grad()
    for i, row in enumerate(rows):
        alone = wrapped.model(row[None]).logits[0, :, :VOCAB]
        assert_close(f"row {i}", logits[i, mask[i].bool()], alone, dtype=torch.float64)
        (alone @ weights).sin().sum().backward()
    for name, p in wrapped.named_parameters():
        assert p.grad is not None
        assert_close(name, grads[name], p.grad, dtype=torch.float64, gradient=True)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_generate_with_padding(pattern: str) -> None:
    """Greedy continuations are those of our own engine, row by row."""
    wrapped = model(pattern)
    tokens, mask, rows = padded("left")
    made = wrapped.generate(tokens, attention_mask=mask, max_new_tokens=7, do_sample=False)
    for row, new in zip(rows, made[:, tokens.shape[1] :], strict=True):
        expected = generate(wrapped.model, row[None], max_tokens=7, temperature=0.0, stop_ids=[1]).tokens[0]
        n = (expected != 1).sum()
        assert new[:n].tolist() == expected[:n].tolist()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_cached_search_equals_search_without_a_cache(options: dict[str, Any]) -> None:
    wrapped = model()
    tokens, mask, _ = padded("left")
    made: list[Any] = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        inputs = {"attention_mask": mask, "max_new_tokens": 8, "use_cache": use_cache}
        made.append(wrapped.generate(tokens, **inputs, **{"do_sample": False, **options}))
    assert torch.equal(*made)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_cache_continues_padded_pieces(pattern: str) -> None:
    """Two pieces with padding anywhere, then a token: as the rows alone, whole."""
    wrapped = model(pattern)
    pieces = [padded("left", (3, 6, 1)), padded("right", (4, 2, 5)), padded("left", (1, 1, 1))]
    cache, masks, outputs = DynamicCache(), [], []
    with torch.no_grad():
        for tokens, mask, _ in pieces:
            masks.append(mask)
            out = wrapped(tokens, attention_mask=torch.cat(masks, 1), past_key_values=cache)
            assert out.past_key_values is cache
            outputs.append(out.logits)
        for i in range(3):
            whole = torch.cat([rows[i] for _, _, rows in pieces])
            found = torch.cat([out[i, mask[i].bool()] for out, mask in zip(outputs, masks, strict=True)])
            assert_close(f"row {i}", found, wrapped.model(whole[None]).logits[0, :, :VOCAB], dtype=torch.float32)
    assert cache.get_seq_length() == sum(mask.shape[1] for mask in masks)


def test_logits_to_keep_and_loss() -> None:
    wrapped = model()
    tokens, mask, _ = padded("right")
    labels = tokens.masked_fill(mask == 0, -100)
    out = wrapped(tokens, attention_mask=mask, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert_close("loss", out.loss, expected, dtype=torch.float32)
    last = wrapped(tokens, attention_mask=mask, logits_to_keep=2).logits
    assert_close("last", last, out.logits[:, -2:], dtype=torch.float32)
    some = wrapped(tokens, attention_mask=mask, logits_to_keep=torch.tensor([0, 3])).logits
    assert_close("some", some, out.logits[:, [0, 3]], dtype=torch.float32)


def test_a_cache_only_where_it_is_wanted() -> None:
    wrapped, tokens = model("M"), torch.randint(VOCAB, (1, 4))
    assert wrapped(tokens).past_key_values is not None
    assert wrapped(tokens, use_cache=False).past_key_values is None
    assert wrapped.train()(tokens).past_key_values is None


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tied: bool, tmp_path: Path) -> None:
    wrapped = model(tie_embeddings=tied, dt_limit=(0.0, 0.5))
    wrapped.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DualscanForCausalLM
    assert loaded.model.config == wrapped.model.config
    assert (loaded.config.pad_token_id, loaded.config.eos_token_id) == (0, 1)
    before, after = wrapped.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    reference = wrapped.model.bfloat16()
    assert all(torch.equal(p, q) for p, q in zip(low.model.parameters(), reference.parameters(), strict=True))
    assert low.model.layers[1].mixer.A_log.dtype == torch.float32


def test_the_way_back_to_this_package(tmp_path: Path) -> None:
    wrapped = model()
    wrapped.model.save(tmp_path)
    tokens = torch.randint(VOCAB, (2, 9))
    assert torch.equal(dualscan.load(tmp_path)(tokens).logits[..., :VOCAB], wrapped(tokens).logits)


def test_special_tokens_of_the_checkpoint(tmp_path: Path) -> None:
    """A model from another program's checkpoint ends its texts where that does, unless it is told otherwise."""
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "num_hidden_layers": 1}
    config = Mamba2Config(**sizes, eos_token_id=7)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ours = dualscan.load(tmp_path)
    generation = DualscanForCausalLM.from_model(ours).generation_config
    expected = (config.bos_token_id, 7, config.pad_token_id)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == expected
    assert DualscanForCausalLM.from_model(ours, eos_token_id=9).generation_config.eos_token_id == 9


def test_a_new_model_from_its_configuration() -> None:
    config = AutoConfig.for_model("dualscan", **SIZES, pattern="M*")
    assert (config.hidden_size, config.num_hidden_layers) == (32, 2)
    torch.manual_seed(5)
    made = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(5)
    ours = dualscan.MambaLM(config.model_config)
    assert all(torch.equal(p, q) for p, q in zip(made.model.parameters(), ours.parameters(), strict=True))
    assert DualscanConfig().model_config == dualscan.preset("mamba2_130m")


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tied: bool, tmp_path: Path) -> None:
    wrapped, tokens = model("M", tie_embeddings=tied), torch.randint(VOCAB, (1, 6))
    before = wrapped(tokens).logits
    wrapped.resize_token_embeddings(70)
    logits = wrapped(tokens).logits
    assert logits.shape[-1] == 70
    assert_close("old tokens", logits[..., :VOCAB], before, dtype=torch.float32)
    assert (wrapped.model.config.vocab_size, wrapped.model.embedding.num_embeddings) == (70, 80)
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, logits)


@pytest.mark.slow
def test_trainer_takes_a_step(tmp_path: Path) -> None:
    """One step of SGD in transformers' Trainer on a padded batch moves the weights by the gradient."""
    from transformers import Trainer, TrainingArguments

    wrapped = model().train()
    tokens, mask, _ = padded("right")
    labels = tokens.masked_fill(mask == 0, -100)
    wrapped(tokens, attention_mask=mask, labels=labels).loss.backward()
    expected = {name: (p - 0.1 * p.grad).detach() for name, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.zero_grad()
    rows = [{"input_ids": t, "attention_mask": m, "labels": y} for t, m, y in zip(tokens, mask, labels, strict=True)]
    options: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1}
    where: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(**options, **where, per_device_train_batch_size=3, lr_scheduler_type="constant")
    Trainer(wrapped, arguments, train_dataset=rows).train()  # pyrefly: ignore[bad-argument-type]
    for name, p in wrapped.named_parameters():
        assert_close(name, p, expected[name], dtype=torch.float32)


@pytest.mark.parametrize("pattern", [pytest.param(PATTERNS[0], marks=pytest.mark.slow), PATTERNS[1]])
def test_lora(pattern: str) -> None:
    """Default targets; gradients reach the adapters alone; adapters compute what their merged weights compute."""
    import peft

    base, tokens = model(pattern), torch.randint(VOCAB, (2, 9))
    before = base(tokens).logits.detach()
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    wrapped = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_A" in name
    }
    assert wrapped == {"in_proj", "out_proj"}
    out = adapted(tokens, labels=tokens)
    assert not torch.allclose(out.logits, before, atol=1e-3)
    out.loss.backward()
    for name, p in adapted.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == ("lora_" in name), name
    made = adapted.generate(input_ids=tokens, max_new_tokens=6, do_sample=False)
    merged: Any = adapted.merge_and_unload()
    assert_close("logits", merged(tokens).logits, out.logits, dtype=torch.float32)
    assert merged.generate(tokens, max_new_tokens=6, do_sample=False).tolist() == made.tolist()


@pytest.mark.slow
def test_adapters_of_a_peft_that_is_imported_late() -> None:
    script = """
import dualscan
from dualscan.interop import DualscanForCausalLM
model = DualscanForCausalLM.from_model(dualscan.MambaLM(dualscan.preset("tiny")))
import peft
print(sorted(peft.get_peft_model(model, peft.LoraConfig()).peft_config["default"].target_modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['in_proj', 'out_proj']"


def test_messages(tmp_path: Path) -> None:
    wrapped, tokens = model("MM"), torch.randint(VOCAB, (2, 5))
    for option in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"{option} is not available"):
            wrapped(tokens, **{option: True})
    with pytest.raises(ValueError, match=r"inputs_embeds is not available.*input_ids"):
        wrapped(tokens, inputs_embeds=torch.randn(2, 5, 32))
    for shape in ((2, 4), (3, 5), (2, 1, 5, 5)):
        with pytest.raises(ValueError, match=r"attention_mask has shape .* for input_ids \(2, 5\)"):
            wrapped(tokens, attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match=r"StaticCache of 2 layers \(StaticLayer\).*DynamicCache\(\)"):
        wrapped(tokens, past_key_values=StaticCache(wrapped.config, max_cache_len=8))
    other = model("MMM")(tokens).past_key_values
    with pytest.raises(ValueError, match=r"DynamicCache of 3 layers .* 2 states"):
        wrapped(tokens, past_key_values=other)
    with pytest.raises(RuntimeError, match="cannot go back"):
        other.crop(-1)
    with pytest.raises(ValueError, match="headdim=7 does not divide"):
        DualscanConfig(**{**SIZES, "headdim": 7})


def test_what_was_not_written_for_it(tmp_path: Path) -> None:
    """Folders of our own format and of other families go through `dualscan.load`."""
    own = dualscan.MambaLM(dualscan.preset("tiny"))
    own.save(tmp_path / "own")
    own.save(tmp_path / "mamba2", format="mamba2")
    for name, words in (("own", "has no model_type"), ("mamba2", "is of the type 'mamba2'")):
        with pytest.raises(ValueError, match=rf"{words}.*DualscanForCausalLM.from_model\(dualscan.load\(folder\)\)"):
            DualscanForCausalLM.from_pretrained(tmp_path / name)
    with pytest.raises(TypeError, match="takes a MambaLM, not a DualscanForCausalLM"):
        DualscanForCausalLM.from_model(model("M"))  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize("fault", ["misses 'model.layers.0.mixer.D' and 1 more", "has the unknown 'model.extra'"])
def test_weights_of_another_model_are_refused(fault: str, tmp_path: Path) -> None:
    model("MM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if "misses" in fault:
        tensors = {name: t for name, t in tensors.items() if not name.endswith("mixer.D")}
    else:
        tensors["model.extra"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"checkpoint {fault}.*config.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import dualscan.interop

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'transformers.*pip install "dualscan\[hf\]"'):
        _ = dualscan.interop.DualscanForCausalLM
