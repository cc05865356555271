"""`dualscan inspect` from a trained model to a page, and what it says to wrong input."""

import json
import re
import shutil

import pytest
import torch

from dualscan.cli.inspect import about
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from dualscan.models.weights import load
from dualscan.train import checkpoint


def data_of(page):
    return json.loads(
        re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"))[0]
    )


def test_page_of_a_run(command, run, tmp_path):
    out = tmp_path / "page.html"
    code, printed, err = command("inspect", run, "--text", "7 and 7 are", "--out", out, "--device", "cpu")
    assert (code, err) == (0, "")
    assert printed == f"{out}: 12 tokens, {out.stat().st_size / 1e6:.1f} MB; open it in a browser\n"
    data = data_of(out)
    assert data["tokens"] == ["⟨start⟩", *"7 and 7 are"]
    assert data["title"] == "trained, step-000006"
    assert data["about"].endswith("M parameters · layers: 1 Mamba-2")
    tokens = torch.tensor([[256, *b"7 and 7 are"]])
    likely = load(checkpoint.find(run))(tokens).logits[0, -1, :257].softmax(-1).max()
    assert data["predictions"][0][1] == pytest.approx(likely.item(), rel=1e-4)


def test_resolution_makes_a_smaller_page(command, run, tmp_path):
    sizes = []
    for resolution in (64, 8):
        out = tmp_path / f"{resolution}.html"
        assert command("inspect", run, "--text", "a" * 63, "--out", out, "--resolution", resolution)[0] == 0
        assert data_of(out)["mapCells"] == resolution
        sizes.append(out.stat().st_size)
    assert sizes[1] < sizes[0]


def test_about_counts_the_layers():
    config = ModelConfig(d_model=32, pattern="MM*-M", vocab_size=10, headdim=8)
    assert about(config).endswith("layers: 3 Mamba-2, 1 attention, 1 MLP")


@pytest.fixture
def transformer(tmp_path, run):
    """A checkpoint without Mamba layers."""
    folder = tmp_path / "transformer"
    MambaLM(ModelConfig(d_model=32, pattern="*-", vocab_size=257)).save(folder)
    shutil.copy(checkpoint.find(run) / "byte_tokenizer.json", folder)
    return folder


def test_wrong_input_gives_one_line_and_no_page(command, run, transformer, tmp_path):
    untold = tmp_path / "untold"
    shutil.copytree(checkpoint.find(run), untold)
    (untold / "byte_tokenizer.json").unlink()
    page = tmp_path / "page.html"
    for folder, options, words in (
        (run, {"text": ""}, 'text="" is empty'),
        (tmp_path / "absent", {}, "absent is not a folder"),
        (transformer, {}, "the model has no Mamba layers (pattern '*-')"),
        (untold, {}, "untold holds no tokenizer"),
        (run, {"text": "a" * 6000}, "matrices of 6001 tokens at 128 cells a side need about 5.4 GiB"),
        (run, {"resolution": 0}, "resolution=0 must be at least 1 cell"),
        (run, {"device": "gpu"}, "device='gpu' cannot be used"),
        (run, {"out": tmp_path / "absent" / "page.html"}, "give --out a folder that exists"),
    ):
        given = {"text": "some text", "out": page, **options}
        code, out, err = command("inspect", folder, *(part for k, v in given.items() for part in (f"--{k}", v)))
        assert (code, out) == (2, "")
        assert words in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert not page.exists()
