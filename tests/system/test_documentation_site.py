"""`make docs`: the site builds without a network and without a warning, and its check finds what is wrong."""

import re
import shutil
from pathlib import Path

import pytest
from docs_site import ROOT, build, problems
from isolation import run_isolated

pytest.importorskip("zensical", reason="the extra `docs` is not installed")

SCRIPT = f"""
import sys
from pathlib import Path

sys.path.insert(0, {str(ROOT / "tests")!r})
from docs_site import build, problems

print(*build(Path.cwd()) or problems(Path("site")), sep="\\n")
"""

SAMPLE = '''"""A module."""


def doubled(x):
    """Twice a number.

    Args:
        y: the number.
    """
'''


def site_of(folder: Path, page: str) -> list[str]:
    """What is wrong with a site of one page that also documents a module `sample`."""
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text(page)
    settings = (ROOT / "zensical.toml").read_text()
    without_pages = re.sub(r"^nav = \[\n.*?^\]\n", "", settings, flags=re.MULTILINE | re.DOTALL)
    (folder / "zensical.toml").write_text(without_pages)
    (folder / "src").mkdir()
    (folder / "src" / "sample.py").write_text(SAMPLE)
    return build(folder) or problems(folder / "site")


def test_site_builds_without_a_network_and_without_a_warning_or_dead_link(tmp_path: Path) -> None:
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "src").symlink_to(ROOT / "src")
    assert [line for line in run_isolated(SCRIPT, tmp_path) if line] == []
    for page in (
        "index.html",
        "tutorial/first-stream.html",
        "reference/protocol.html",
        "reference/api/errors.html",
    ):
        assert (tmp_path / "site" / page).is_file()
    text = (tmp_path / "site" / "reference" / "api" / "payload-client.html").read_text()
    assert "seconds for connecting, reading and further attempts together" in text  # from a docstring
    assert 'id="dray.PayloadClient.read' in text or 'id="dray.transport.PayloadClient.read' in text


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ("# Good\n\n[here](#good)\n", []),
        (
            "# Wrong\n\n[page](gone.md)\n[anchor](#gone)\n\n::: sample\n",
            [
                "page does not exist",
                "anchor does not exist",
                "Parameter 'y' does not appear in the function signature",
            ],
        ),
        (
            "# Wrong\n\n<a href='gone.html'>a</a>\n<script src='https://example.org/x.js'></script>\n"
            "<div class='mermaid'>graph</div>\n",
            [
                "gone.html leads nowhere",
                "https://example.org/x.js is loaded from elsewhere",
                "class mermaid loads a script",
            ],
        ),
    ],
    ids=["good", "markdown", "html"],
)
def test_check_finds_what_is_wrong_with_a_page(tmp_path: Path, page: str, found: list[str]) -> None:
    wrong = site_of(tmp_path, page)
    assert [each for each in found if not any(each in line for line in wrong)] == []
    assert wrong == [] or found
