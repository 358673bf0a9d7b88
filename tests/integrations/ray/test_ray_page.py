"""The programs of docs/how-to/ray.md and of the page on the object store run, and print what the pages promise."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from optional import require

require("ray", "torch")

from ray_cluster import ROOT, RayHome  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

PAGES = ROOT / "docs" / "how-to"
EPISODES = "\n".join(f"mean reward {number:.1f}" for number in range(5))


@pytest.fixture
def home() -> Iterator[RayHome]:
    made = RayHome()
    yield made
    made.close()


def block(page: str, pattern: str) -> str:
    """The code after what matches `pattern` in a page."""
    text = (PAGES / page).read_text(encoding="utf-8")
    found = re.search(pattern + r".*?\n```python[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page} has no code after {pattern!r}"
    return found[1]


def printed(program: str, home: RayHome) -> str:
    """What a program prints, in a namespace of its own."""
    path = Path(home.path, "program.py")
    path.write_text(program, encoding="utf-8")
    process = home.start([sys.executable, str(path)], {}, stdout=subprocess.PIPE)
    try:
        return process.communicate(timeout=180)[0].decode()
    finally:
        assert home.end(process, 1) == 0


@pytest.mark.parametrize(
    ("page", "pattern", "output"),
    [
        ("ray.md", "<!-- five lines -->", "cartpole 200.0"),
        ("ray.md", "<!-- streams -->", "[0.0, 1.0, 2.0, 3.0, 4.0]"),
        ("from-ray-object-store.md", "## Before", EPISODES),
        ("from-ray-object-store.md", "## After", EPISODES),
    ],
)
def test_a_program_of_the_page_prints_what_it_shows(page: str, pattern: str, output: str, home: RayHome) -> None:
    assert printed(block(page, pattern), home).strip() == output
