"""The script that draws the pictures of docs/explanations/duality.md draws them all."""

import runpy

import pytest

from tests.house.tree import ROOT

SCRIPT = ROOT / "docs" / "_pictures.py"
PAGE = ROOT / "docs" / "explanations" / "duality.md"


@pytest.fixture(scope="module")
def pictures():
    return runpy.run_path(str(SCRIPT))["PICTURES"]


def test_the_page_shows_every_picture(pictures):
    page = PAGE.read_text(encoding="utf-8")
    shown = {name for name in pictures if f"(../images/duality-{name}.png)" in page}
    assert shown == set(pictures)
    assert all((ROOT / "docs" / "images" / f"duality-{name}.png").exists() for name in pictures)


@pytest.mark.parametrize("name", ["duality", "blocks", "masks", pytest.param("costs", marks=pytest.mark.slow)])
def test_pictures_are_drawn(pictures, name, tmp_path):
    path = tmp_path / "picture.png"
    pictures[name]().savefig(path)
    assert path.stat().st_size > 10_000
