"""docs/families.md says what is tested, and nothing is on it that is not."""

from dualscan.models import families
from tests.models.families import table


def test_the_page_is_up_to_date() -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    assert table.page(text) == text, "run python -m tests.models.families.table"


def test_every_family_is_tested_in_three_configurations() -> None:
    counts = table.tested()
    assert set(counts) == set(families.NAMES)
    assert min(counts.values()) >= 3
