"""The defects of `make mutants` can be planted, and the model finds one that is."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from defects import DEFECTS, Defect
from planting import ROOT, SOURCES, Search, search_for
from survivors import REASONS


def test_every_defect_has_a_name_of_its_own() -> None:
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_the_text_that_a_defect_replaces_is_there_once_and_what_replaces_it_compiles(defect: Defect) -> None:
    source = (SOURCES / "dray" / defect.file).read_text(encoding="utf-8")
    planted = defect.plant(source)
    assert planted != source
    compile(planted, defect.file, "exec")


@pytest.mark.parametrize(
    "name", ["no sequence check in a read", "slot freed at the end of the first of two leases"]
)
def test_the_model_finds_a_planted_defect(name: str) -> None:
    (defect,) = (defect for defect in DEFECTS if defect.name == name)
    assert search_for(defect, Search.MODEL, 100).seed is not None


def test_the_model_finds_nothing_where_nothing_is_planted() -> None:
    assert search_for(None, Search.MODEL, 20).seed is None


def test_what_mutation_leaves_is_explained_in_the_page_on_testing() -> None:
    table = []
    for why, survivors in REASONS.items():
        where = ", ".join(f"`{name}`" for name in sorted({each.function for each in survivors}))
        table.append(f"| {len(survivors)} | {where} | {why} |")
    assert "\n".join(table) in (ROOT / "docs/reference/testing.md").read_text(encoding="utf-8")


def test_every_defect_is_in_the_page_on_testing() -> None:
    text = (ROOT / "docs/reference/testing.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| (.*) \| `(.*)` \| (\w+) \| [\d,]+ \|$", text, re.MULTILINE)
    assert documented == [(defect.name, defect.file, defect.search.value) for defect in DEFECTS]
