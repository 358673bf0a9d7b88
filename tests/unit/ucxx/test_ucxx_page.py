"""docs/reference/UCXX.md has the diagram, limits, settings, log lines and counters of the code."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dray.errors import TransportError
from dray.prefetch import BatchReaderStatistics, batch, freeing, reader
from dray.ring import RingStatistics, slot_state
from dray.transport import attempts, client_statistics, pool
from dray.transport.server_statistics import COUNTED
from dray.ucxx import CompletionReaderStatistics, UCXXBufferConfig, UCXXConfig, data_packer

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "reference" / "UCXX.md").read_text(encoding="utf-8")
PACKAGES = ("ring", "protocol", "transport", "prefetch", "ucxx")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def calls() -> Iterator[tuple[Path, ast.Call]]:
    for package in PACKAGES:
        for path in sorted((ROOT / "src" / "dray" / package).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield path, node


def test_life_cycle_is_that_of_the_table() -> None:
    (diagram,) = re.findall(r"```mermaid\n(.*?)\n```", PAGE, re.DOTALL)
    assert diagram == slot_state.diagram()


def test_example_works() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", section("A step"), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    episodes = names["episodes"]
    assert isinstance(episodes, list)
    assert [episode["observations"].tolist() for episode in episodes] == [[[0.0, 1.0]]] * 4


def test_limits_are_those_of_the_code() -> None:
    limits = {row[0]: row[3] for row in rows(section("Retries"))[1:]}
    assert re.findall(r"[\d.]+", limits["1"]) == [str(attempts.MAX_ATTEMPTS)]
    assert (
        re.findall(r"[\d.]+", limits["2"]) == [str(UCXXConfig().ucxx_read_max_attempts)] == [str(batch.MAX_READS)]
    )
    assert re.findall(r"[\d.]+", limits["3"]) == [str(batch.MAX_ROUNDS), str(batch.ROUND_PAUSE)]
    reads = batch.MAX_READS * batch.MAX_ROUNDS
    assert f"{batch.MAX_READS} · {batch.MAX_ROUNDS} = {reads} times" in " ".join(PAGE.split())
    assert f"at most {reads * attempts.MAX_ATTEMPTS} transport failures" in " ".join(PAGE.split())


@pytest.mark.parametrize(
    ("title", "phrase", "value"),
    [
        ("Quarantine", "each for {} s from its last failure", attempts.QUARANTINE_SECONDS),
        ("Idle connections", "idle for {} s is closed and replaced", pool.IDLE_SECONDS),
        ("Idle connections", "the server closes it at {} s", UCXXBufferConfig().idle_timeout),
        ("Idle connections", "The {} s between", UCXXBufferConfig().idle_timeout - pool.IDLE_SECONDS),
        ("Life cycle of a slot", "at most {} times with", freeing.MAX_ATTEMPTS),
        ("Life cycle of a slot", "with {} s in between", freeing.RETRY_PAUSE),
        ("Retries", "are read together, {} at most", batch.GROUP),
        ("Retries", "`ucxx_read_timeout` seconds ({}) at most", UCXXConfig().ucxx_read_timeout),
        ("Retries", "`ucxx_prefetch_timeout` ({})", UCXXConfig().ucxx_prefetch_timeout),
        ("Retries", "each of them at least {} s", data_packer.MIN_LATE_SECONDS),
        ("Prefetch", "{} s longer than the batch has", reader.GRACE_SECONDS),
        ("Prefetch", "frees what was handed out ({} s at most)", freeing.CLOSE_SECONDS),
    ],
)
def test_seconds_and_counts_are_those_of_the_code(title: str, phrase: str, value: float) -> None:
    assert phrase.format(f"{value:g}") in " ".join(section(title).split())


def test_two_groups_and_two_idle_connections_are_those_of_the_code() -> None:
    assert "then two." in section("Retries")
    assert "two idle connections for each endpoint" in section("Idle connections")
    assert (batch.MAX_GROUPS, pool.MAX_IDLE) == (2, 2)


def test_every_setting_has_its_default() -> None:
    documented = {row[0].strip("`"): row[1] for row in rows(section("Tuning"))[1:]}
    expected = {}
    for config in (UCXXBufferConfig(), UCXXConfig()):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name not in ("schema", "per_step", "secret"):
                expected[field.name] = f"`{value!r}`".replace("'", '"')
    assert documented == expected


def test_every_log_line_is_explained_with_its_logger_and_level() -> None:
    loggers = {path: None for path, _ in calls()}
    for path in loggers:
        found = re.search(r'logging\.getLogger\("([\w.]+)"\)', path.read_text(encoding="utf-8"))
        loggers[path] = found and found[1]
    levels = {"exception": "ERROR", "log": "WARNING, then DEBUG"}
    expected = set()
    for path, call in calls():
        function = call.func
        if not isinstance(function, ast.Attribute):
            continue
        limited = function.attr == "warn"  # of a LineLimit, which gets the logger
        if limited or (isinstance(function.value, ast.Name) and function.value.id == "logger"):
            line = call.args[1 if limited or function.attr == "log" else 0]
            assert isinstance(line, ast.Constant)
            level = "WARNING" if limited else levels.get(function.attr, function.attr.upper())
            expected.add((f"`{loggers[path]}`", level, f"`{line.value}`"))
    assert len(expected) > 10
    assert {tuple(row[:3]) for row in rows(section("Log lines"))[1:]} == expected


def counter_names(call: ast.Call) -> set[str]:
    """The constant names that a call counts; none if it does not count."""
    function = call.func
    if isinstance(function, ast.Name) and function.id == "Counters":
        counts = True
    else:
        counts = (
            isinstance(function, ast.Attribute)
            and function.attr in ("add", "add_all")
            and ast.unparse(function.value).endswith("_counters")
        )
    if not counts:
        return set()
    constants: list[ast.AST] = list(call.args)
    formatted = {id(part) for node in ast.walk(call) if isinstance(node, ast.JoinedStr) for part in node.values}
    nodes = [node for argument in constants for node in ast.walk(argument)]
    return {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in formatted
    }


def test_retries_after_every_transport_error_have_a_counter() -> None:
    data_plane = {each for each in TransportError.__subclasses__() if each.__module__.startswith("dray.")}
    assert set(client_statistics.RETRY_CAUSES) == data_plane


def test_every_counter_is_explained() -> None:
    tables = re.split(r"\n(\w+)[^|\n]*:\n\n", section("Counters"))[1:]
    documented = {
        title: {name for row in rows(table)[1:] for name in re.findall(r"`(\w+)`", row[0])}
        for title, table in zip(tables[::2], tables[1::2], strict=True)
    }
    counted: dict[str, set[str]] = {"Server": set(COUNTED), "Client": {"quarantined"}}
    counted["Ring"] = {field.name for field in dataclasses.fields(RingStatistics)}
    counted["Client"] = {field.name for field in dataclasses.fields(client_statistics.ClientStatistics)}
    counted["Batches"] = {field.name for field in dataclasses.fields(BatchReaderStatistics)}
    counted["Episodes"] = {field.name for field in dataclasses.fields(CompletionReaderStatistics)}
    counted["Episodes"] -= {"batches", "client"}
    assert documented == counted
