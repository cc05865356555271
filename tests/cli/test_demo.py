"""The demo's story on a model that trains in a moment, and the check of the three forms."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dualscan.cli import demo
from dualscan.cli._support.agreement import FORMS, compare_forms
from dualscan.models.lm import MambaLM
from dualscan.models.presets import preset
from dualscan.nn import mamba2
from dualscan.train import checkpoint
from dualscan.train.config import demo as demo_recipe
from tests.oracle import CAPS


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The demo's configuration with a tiny model and three steps."""
    monkeypatch.chdir(tmp_path)
    return dataclasses.replace(
        demo_recipe(), model=preset("tiny"), max_steps=3, seqlen=32, batch_size=2, out=Path("demo")
    )


def test_the_demo_tells_its_story(config, capsys, monkeypatch):
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 40)
    monkeypatch.setattr(demo, "COMPARED_TOKENS", 100)
    assert demo.run(config) == 0
    out, _ = capsys.readouterr()
    headings = [line for line in out.splitlines() if line.startswith("[")]
    assert [heading[:5] for heading in headings] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert "bits per byte on The Two Gentlemen of Verona" in out
    assert "All forms agree to rounding." in out
    assert demo.PROMPT in out
    assert f"dualscan generate {config.out}" in out
    assert checkpoint.find(config.out).name == "step-000003"
    assert (config.out / "loss.png").exists()
    assert max(map(len, out.splitlines())) <= 130
    assert demo.run(config) == 0, "an earlier demo in the folder is replaced"


def test_the_recipe_keeps_the_promise_of_three_minutes():
    recipe = demo_recipe()
    assert recipe.max_minutes is not None
    assert recipe.max_minutes <= 3
    assert recipe.data is None


def test_forms_agree_on_a_model():
    torch.manual_seed(0)
    tokens = torch.randint(0, 257, (1, 150))
    agreements = compare_forms(MambaLM(preset("tiny")), tokens)
    assert {(a.form, a.dtype) for a in agreements} == {(f, d) for f in FORMS for d in (torch.float32, torch.float64)}
    for agreement in agreements:
        assert agreement.agrees
        assert agreement.error <= CAPS[agreement.dtype][0]
    assert all(a.error > 0 for a in agreements if a.dtype == torch.float32), "nothing was compared"


@pytest.mark.parametrize("form", ["quadratic", "chunked"])
def test_a_wrong_form_is_noticed(form, config, capsys, monkeypatch):
    real = mamba2.ssd

    def wrong(x, *arguments, impl, **options):
        y, state = real(x, *arguments, impl=impl, **options)
        return (y * 1.001 if impl == form else y), state

    monkeypatch.setattr(mamba2, "ssd", wrong)
    agreements = compare_forms(MambaLM(preset("tiny")), torch.randint(0, 257, (1, 100)))
    assert {a.form for a in agreements if not a.agrees} == {form}
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 5)
    assert demo.run(config) == 1
    assert "do NOT agree" in capsys.readouterr().out
