"""The table of docs/families.md, from the families themselves and from what is tested of each.

`python -m tests.models.families.table` writes it; a test checks that the page is up to date.
"""

from collections import Counter
from pathlib import Path

from dualscan.models import families
from tests.house.tree import ROOT
from tests.models.families import cases, test_dualscan_hf, test_mamba_ssm
from tests.models.families.test_against_transformers import GRADIENTS, LOGITS

PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- table: families -->", "<!-- end table -->"


def tested() -> Counter[str]:
    """Configurations of each family that the tests compare with another implementation."""
    others = {"mamba_ssm": len(test_mamba_ssm.CASES), "dualscan_hf": len(test_dualscan_hf.CASES)}
    return Counter(case.family for case in cases.CASES) + Counter(others)


def table() -> str:
    """Markdown: the families, what they differ in, and what is out of reach."""
    lines = [
        "| family | published as | loads, goes back bit for bit | takes of models made here | configurations |",
        "|---|---|---|---|---|",
    ]
    counts = tested()
    known = [families.family(name) for name in families.NAMES]
    for family in known:
        status = "yes" if counts[family.name] else "untested"
        lines.append(f"| `{family.name}` | {family.checkpoints} | {status} | {family.takes} | {counts[family.name]} |")
    lines += [
        "",
        "Each configuration is a random model, not published weights, compared in float32 with transformers' own or,",
        f"for mamba_ssm, with its definitions written out: logits of one pass, pieces and steps within {LOGITS:g},",
        f"gradients of every tensor within {GRADIENTS:g} (relative root mean square), greedy batches of different",
        "lengths equal, files equal bit for bit. `dualscan_hf` is the same model, stored by another program.",
        "",
        "Models made here that go there are compared in the same way, and come back bit for bit. The letters are those",
        "of `ModelConfig.pattern`; other settings have to fit, too, and one that does not is named.",
        "",
        "Where the model here computes something else than the family's own code, or where that is easily overlooked:",
        "",
        *(f"- `{family.name}`: {family.differences}" for family in known if family.differences),
        "",
        "Refused by name, with what is missing:",
        "",
        *(f"- `{name}`: {lacks}" for name, lacks in families.OUT_OF_REACH.items()),
    ]
    return "\n".join(lines)


def page(text: str) -> str:
    """A page with the table filled in."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def write(path: Path = PAGE) -> None:
    """Fills the table into the page."""
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
