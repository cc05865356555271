"""lm-eval on a folder that our registration reads, with tasks and data on disk: its numbers are ours, by hand."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dualscan
from dualscan.data.tokenizer import ByteTokenizer
from dualscan.interop import DualscanForCausalLM, register_with_transformers, to_transformers_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "dualscan[eval]" (640 MiB, so not in dev)')
# Its dependencies use names that Python and NumPy deprecate.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

CHOICES: list[dict[str, Any]] = [
    {"query": "The sky is", "choices": [" blue", " loud"], "gold": 0},
    {"query": "Two and two make", "choices": [" five", " four", " a very long answer"], "gold": 1},
    {"query": "Water", "choices": [" burns", " flows"], "gold": 1},
]
DOCUMENTS = [
    {"text": "A short text.\n"},
    {"text": "né, und ein längerer Text, über mehr als eine Zeile.\nUnd Schluss."},
]
PROMPTS = [{"query": "abc"}, {"query": "a longer prompt than the first"}]
TASKS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "local_choice": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "choices",
            "target_delimiter": "",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "local_text": (
        DOCUMENTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    ),
    "local_generation": (
        PROMPTS,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{query}}",
            "doc_to_target": "x",
            "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, (documents, settings) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        files = {"data_files": {"test": str(data)}}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **settings}
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return folder


def log_likelihood(model: dualscan.MambaLM, context: list[int], text: list[int]) -> float:
    logits = model(torch.tensor([[*context, *text]])).logits[0, :, :257].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(text) - 1)
    return sum(logits[place, token].item() for place, token in zip(places, text, strict=True))


def test_numbers(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = ByteTokenizer()
    sizes: dict[str, Any] = {"d_model": 32, "vocab_size": 257, "d_state": 8, "headdim": 16}
    model = dualscan.MambaLM(dualscan.ModelConfig(**sizes, pattern="MM", tie_embeddings=False)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.3)
    folder = tmp_path / "model"
    DualscanForCausalLM.from_model(model, eos_token_id=256, pad_token_id=256).save_pretrained(folder)
    to_transformers_tokenizer(tokenizer).save_pretrained(folder)

    register_with_transformers()
    HFLM = importlib.import_module("lm_eval.models.huggingface").HFLM
    TaskManager = importlib.import_module("lm_eval.tasks").TaskManager
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=str(folder), device="cpu", batch_size=2),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )

    with torch.no_grad():
        scores = [
            [log_likelihood(model, tokenizer.encode(q["query"]), tokenizer.encode(c)) for c in q["choices"]]
            for q in CHOICES
        ]
        found = results["samples"]["local_choice"]
        for sample, expected in zip(sorted(found, key=lambda s: s["doc_id"]), scores, strict=True):
            assert [resp[0] for resp in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-4)
        right = [max(range(len(s)), key=s.__getitem__) == q["gold"] for s, q in zip(scores, CHOICES, strict=True)]
        assert results["results"]["local_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))

        texts = [tokenizer.encode(document["text"]) for document in DOCUMENTS]
        total = sum(log_likelihood(model, [tokenizer.eos_id], text) for text in texts)
        perplexity = math.exp(-total / sum(map(len, texts)))
        assert results["results"]["local_text"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=1e-4)

        for sample in results["samples"]["local_generation"]:
            prompt = torch.tensor([tokenizer.encode(sample["doc"]["query"])])
            made = model.generate(prompt, max_tokens=6, temperature=0.0, stop_ids=[256]).tokens[0]
            assert sample["resps"][0][0] == tokenizer.decode(made.tolist())
