"""The page in Chromium: what is chosen is what is drawn, by mouse and by keys, and nothing is fetched."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dualscan.inspect.report import VIEWS
from tests.inspect.browser import Tab, browse, find_chromium
from tests.inspect.conftest import TEXT, TOKENS

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
LAST = len(TOKENS) - 1


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    assert CHROMIUM is not None
    with browse(CHROMIUM, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab, page_file: Path) -> Iterator[Tab]:
    """The page, freshly opened; whatever a test does to it, it fetches nothing and complains of nothing."""
    browser.requested.clear()
    browser.complaints.clear()
    browser.open(page_file)
    yield browser
    browser.settle()
    assert browser.requested == [page_file.as_uri()] * len(browser.requested)
    assert browser.complaints == []
    assert browser.run("performance.getEntriesByType('resource').length") == 0


MATRIX = """matrixOf(chosen.layer, chosen.head, chosen.view).then((m) =>
    Array.from({length: m.cells}, (_, i) => Array.from({length: m.cells}, (_, j) => m.value(i, j))))"""
# The colour in the middle of the cell that a row and a column of the map share.
PIXEL = """(({{cells}}, map) => {{
    const cell = (map.clientWidth - MARGIN) / cells;
    const [x, y] = [MARGIN + ({j} + 0.5) * cell, TOP + ({i} + 0.5) * cell].map((v) => Math.round(v * devicePixelRatio));
    const pixel = new OffscreenCanvas(1, 1).getContext("2d");
    pixel.drawImage(map, -x, -y);
    return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3); }})(shown.matrix, $("map"))"""


def test_every_choice_of_the_selectors_shows_its_matrix(tab, seen):
    pictures = set()
    for view in VIEWS:
        tab.choose("view", view)
        for place, layer in enumerate(seen.layers):
            tab.choose("layer", place)
            assert tab.run("document.getElementById('head').options.length") == layer.maps[view].shape[0] + 1
            assert tab.run("document.getElementById('heads').children.length") == layer.maps[view].shape[0] + 1
            for head in (-1, 0, layer.maps[view].shape[0] - 1):
                chosen = tab.choose("head", head)
                assert (chosen["view"], chosen["layer"], chosen["head"]) == (view, place, head)
                expected = layer.mean[view] if head == -1 else layer.maps[view][head]
                actual = torch.tensor(tab.run(MATRIX))
                assert ((actual - expected).abs() <= 0.008 * expected.abs().amax(-1, keepdim=True)).all()
                pictures.add(tab.run("$('map').toDataURL()"))
                pressed = tab.run("document.querySelector('#heads [aria-pressed=true]').dataset.head")
                assert pressed == str(head)
    # Attention's two views agree, and so do its three pictures; every other choice has a picture of its own.
    assert len(pictures) == 3 * (2 * len(seen.layers) - 1)


def test_colours_follow_the_entries(tab, seen):
    tab.choose("head", 1)
    maps = seen.layers[0].maps["operator"][1]
    tab.choose("scale", "map")
    i, j = divmod(int(maps.abs().argmax()), maps.shape[-1])
    strongest = tab.run("palette.more[1]" if maps[i, j] > 0 else "palette.less[1]")
    assert tab.run(PIXEL.format(i=i, j=j)) == strongest
    assert tab.run(PIXEL.format(i=2, j=maps.shape[-1] - 1)) == tab.run("palette.future")
    # Relative to its row, the largest entry of every row has the strongest colour. The last row carries the cursor.
    tab.choose("scale", "row")
    for i in range(maps.shape[-1] - 1):
        j = int(maps[i].abs().argmax())
        expected = tab.run("palette.more[1]" if maps[i, j] > 0 else "palette.less[1]")
        assert tab.run(PIXEL.format(i=i, j=j)) == expected


def read_value(text: str) -> float:
    found = re.search(r"with (−?[\d.]+(?:e[+−]\d+)?);", text)
    assert found, text
    return float(found[1].replace("−", "-"))


def test_arrow_keys_walk_over_the_map(tab, seen):
    tab.run("$('map').focus()")
    chosen = tab.press("ArrowUp", "ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowRight")
    assert (chosen["row"], chosen["column"]) == (LAST - 2, LAST - 2)
    value = read_value(tab.run("$('readout').textContent"))
    assert value == pytest.approx(seen.layers[0].mean["operator"][LAST - 2, LAST - 2].item(), rel=0.2)
    assert tab.press("ArrowRight")["column"] == LAST - 1
    assert "reads no later token" in tab.run("$('readout').textContent")


def test_a_click_on_the_map_chooses_row_and_column(tab, seen):
    tab.choose("layer", 1)
    margin, top, cells = tab.run("[MARGIN / $('map').clientWidth, TOP / $('map').clientHeight, shown.matrix.cells]")
    side = (1 - margin) / cells
    high = tab.run("($('map').clientWidth - MARGIN) / $('map').clientHeight") / cells
    chosen = tab.click("#map", x=margin + 4.5 * side, y=top + 20.5 * high)
    assert (chosen["row"], chosen["column"]) == (20, 4)
    expected = seen.layers[1].mean["operator"][20, 4].item()
    bound = 0.008 * seen.layers[1].mean["operator"][20].max().item()
    assert read_value(tab.run("$('readout').textContent")) == pytest.approx(expected, abs=bound, rel=0.01)


def strip_values(tab: Tab) -> list[float]:
    titles = tab.run("[...$('strip').children].map((e) => e.title)")
    return [float(title.rpartition(": ")[2].replace("−", "-")) for title in titles]


def test_the_text_takes_the_colours_that_were_asked_for(tab, seen):
    rollout = seen.rollout["operator"]
    assert strip_values(tab) == pytest.approx(rollout[LAST].tolist(), abs=0.008)
    tab.run("$('strip').focus()")
    assert tab.press("Home", "ArrowRight", "ArrowRight", "ArrowRight")["row"] == 3
    assert strip_values(tab) == pytest.approx(rollout[3].tolist(), abs=0.008)
    assert tab.press("End")["row"] == LAST
    tab.click("input[value=gradient]")
    assert strip_values(tab) == pytest.approx(seen.input_gradient.tolist(), rel=0.01, abs=1e-4)
    tab.choose("view", "unified")
    tab.click("input[value=attribution]")
    assert strip_values(tab) == pytest.approx(seen.attribution["unified"].tolist(), rel=0.06, abs=1e-4)
    tab.click("input[value=row]")
    mean = seen.layers[0].mean["unified"]
    assert strip_values(tab) == pytest.approx(mean[LAST].tolist(), abs=0.009 * mean[LAST].max().item())
    # The strongest other token has the strongest colour, tokens after the chosen one have none.
    assert tab.click("#strip span:nth-child(11)")["row"] == 10
    alphas = tab.run(
        "[...$('strip').children].map((e) => parseFloat((e.style.background.match(/[\\d.]+%?\\)/) || ['0'])[0]))"
    )
    assert all(alpha == 0 for alpha in alphas[11:])
    assert max(range(10), key=lambda j: alphas[j]) == int(mean[10, :10].argmax())


def test_text_is_shown_as_it_is(tab):
    shown = tab.run("$('strip').textContent")
    assert shown == "⟨start⟩" + TEXT.replace("\n", "↵\n").replace("\t", "⇥\t").replace("é", "\\xc3\\xa9")
    assert tab.run("document.querySelectorAll('#strip b').length") == 0
    assert tab.run("document.title") == "Looking inside a <small> model"
    assert "explained: <" in tab.run("$('next').textContent")


def test_heads_are_chosen_by_thumbnail_spectrum_and_overview(tab, seen):
    assert tab.click("#heads button:nth-child(4)")["head"] == 2
    assert tab.click("#spectrum g:nth-of-type(6)")["head"] == 5
    rows = len(seen.layers)
    height = tab.run("$('context').clientHeight")
    # Above the heads' numbers, 22 pixels high, the last layer is the last row; its first head stands first.
    chosen = tab.click("#context", x=0.12, y=(height - 22) * (rows - 0.5) / rows / height)
    assert (chosen["layer"], chosen["head"]) == (rows - 1, 0)
    note = tab.run("$('context-note').textContent")
    value = float(re.findall(r"head 0 ([\d.]+) tokens", note)[0])
    assert value == pytest.approx(seen.layers[-1].context["operator"][0].item(), rel=0.01)
    assert "5 to 95 %" in tab.run("document.querySelector('#spectrum title').textContent")
    tab.choose("layer", 2)
    assert "nothing decays" in tab.run("$('spectrum').textContent")
    assert "no state" in tab.run("$('half-life-note').textContent")


def test_every_control_is_reached_by_the_tabulator(tab):
    reached = []
    for _ in range(16):
        tab.press("Tab")
        reached.append(
            tab.run("document.activeElement.id || document.activeElement.name || document.activeElement.dataset.head")
        )
    order = ["strip", "strip", "view", "layer", "head", "scale", "map", "-1", "0", "1"]
    assert [name for name in reached if name][: len(order)] == order


@pytest.mark.parametrize("width", [360, 800])
def test_narrow_windows_need_no_scrolling_sideways(tab, page_file, width):
    tab.open(page_file, width=width, height=700)
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("$('map').clientWidth") > 0.6 * width * (1 if width < 600 else 0.8)


def test_dark_and_light_follow_the_system(tab, page_file):
    light = tab.run("getComputedStyle(document.body).backgroundColor")
    pixel = tab.run(PIXEL.format(i=30, j=0))
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    tab.call("Emulation.setEmulatedMedia", features=[scheme])
    tab.wait(lambda: tab.run(PIXEL.format(i=30, j=0)) != pixel, "the map is drawn in other colours")
    assert tab.run("getComputedStyle(document.body).backgroundColor") != light


def test_a_request_would_be_noticed(browser, tmp_path):
    page = tmp_path / "fetching.html"
    page.write_text(
        "<body data-drawn='{}'><script>console.error('oh'); fetch('http://example.org/x')</script>", "utf-8"
    )
    browser.requested.clear()
    browser.complaints.clear()
    browser.open(page)
    browser.wait(lambda: browser.run("1") == 1 and len(browser.complaints) > 1, "the browser complains")
    assert "http://example.org/x" in browser.requested
    assert any("oh" in json.loads(complaint).get("args", [{}])[0].get("value", "") for complaint in browser.complaints)
