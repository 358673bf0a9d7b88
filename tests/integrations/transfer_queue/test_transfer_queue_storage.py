"""dray behind the real TransferQueue: scenarios in one Ray cluster, in a network namespace of loopback."""

import ast
import json
import re
import sys
from pathlib import Path

import loopback
import pytest
from optional import require

HERE = Path(__file__).parent
PROGRAM = HERE / "queue_scenarios.py"
PAGE = HERE.parents[2] / "docs" / "how-to" / "transfer-queue.md"
THE_PAGE = "the lines of the page"

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]
require("ray", "transfer_queue")


def scenarios() -> list[str]:
    """The names in `SCENARIOS`, without importing Ray."""
    for node in ast.parse(PROGRAM.read_text("utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "SCENARIOS":
            assert isinstance(node.value, ast.Tuple)
            return [each.id for each in node.value.elts if isinstance(each, ast.Name)]
    raise AssertionError("no SCENARIOS")


def lines_of_the_page() -> str:
    """The configuration in docs/how-to/transfer-queue.md."""
    (lines,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(ast.parse(lines).body) == 5
    return str(lines)


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    if loopback.problem():
        pytest.skip(loopback.problem())
    ended = loopback.run([sys.executable, "-W", "ignore", str(PROGRAM), lines_of_the_page()], timeout=450)
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"scenario"')]
    assert ended.returncode == 0, (lines, ended.stderr[-4000:])
    return {line["scenario"]: line["problem"] for line in lines}


@pytest.mark.parametrize("scenario", [THE_PAGE, *scenarios()])
def test_with_the_real_package(results: dict[str, str], scenario: str) -> None:
    assert results[scenario] == ""
