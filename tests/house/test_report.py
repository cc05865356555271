"""Numbers on the pages are those of the committed result files."""

import json

import pytest

from benchmarks import report


def test_pages_are_up_to_date():
    assert report.stale_pages() == [], "run python -m benchmarks.report"


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_are_flat_records(path):
    records = json.loads(path.read_text(encoding="utf-8"))
    assert records
    for entry in records:
        assert {"job", "shape", "pass", "impl", "device", "torch", "commit", "date"} <= entry.keys()
        assert path.stem.startswith(entry["job"])


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match="no table is called 'nothing'"):
        report.fill("<!-- table: nothing -->\n<!-- end table -->")
