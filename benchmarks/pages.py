"""The sections of docs/reference/performance.md that the harness writes, so that no figure is typed by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.figures import Row
from benchmarks.machine import busy, summary
from benchmarks.peers.catalog import PEERS
from benchmarks.results import Results
from benchmarks.scenarios import SCENARIOS, beside
from benchmarks.tables import Sheet, detail_sheet, summary_sheet
from benchmarks.texts import size_text, value_text

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "performance.md"
PLOT = PAGE.with_name("performance.png")
SECTIONS = ("machine", "targets", "peers", "peers-times", "rows")


class UnknownSections(Exception):
    """The page does not have the marks that the sections are written between."""


def write(results: Results, page: Path) -> None:
    """Replace what stands between the marks of each section.

    Raises:
        UnknownSections: the page lacks one of them.
    """
    text = page.read_text(encoding="utf-8")
    for name in SECTIONS:
        begin, end = marks(name)
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise UnknownSections(f"{page} has no section between {begin!r} and {end!r}")
        text = f"{before}{begin}\n\n{_section(name, results)}\n\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def marks(section: str) -> tuple[str, str]:
    """The lines before and after a section."""
    return f"<!-- benchmarks: {section} -->", f"<!-- benchmarks: end of {section} -->"


def _section(name: str, results: Results) -> str:
    match name:
        case "machine":
            return "\n".join(_machine(results))
        case "targets":
            return summary_sheet(results.rows).markdown()
        case "peers":
            return peers_sheet(results.rows, beside.THROUGHPUT).markdown()
        case "peers-times":
            return peers_sheet(results.rows, beside.LATENCY).markdown()
        case _:
            return "\n\n".join(_details(results))


def peers_sheet(rows: Sequence[Row], what: str) -> Sheet:
    """A line for each peer, a column for each size; the fastest of a column in bold."""
    found = {(row.subject, row.nbytes): row for row in rows if row.scenario == beside.NAME and row.nbytes}
    sizes = sorted({nbytes for _, nbytes in found if nbytes is not None})
    best = {nbytes: _best(row for (subject, at), row in found.items() if at == nbytes and subject.startswith(what))
            for nbytes in sizes}  # fmt: skip
    lines = []
    for peer in PEERS:
        cells = []
        for nbytes in sizes:
            row = found.get((f"{what}, {peer.name}", nbytes))
            text = "" if row is None else value_text(row.figure.p50, row.unit)
            cells.append(f"**{text}**" if row is not None and row is best[nbytes] else text)
        if any(cells):
            lines.append((peer.name, *cells, peer.copies))
    title = "Throughput" if what == beside.THROUGHPUT else "Time of one payload (p50)"
    return Sheet(title, ("peer", *map(size_text, sizes), "copies of a payload"), tuple(lines))


def _best(rows: Iterator[Row]) -> Row | None:
    candidates = [row for row in rows if row.figure.p50]
    if not candidates:
        return None
    highest = candidates[0].unit == "B/s"
    return (max if highest else min)(candidates, key=lambda row: row.figure.p50)


def _machine(results: Results) -> Iterator[str]:
    versions = ", ".join(f"{name} {found}" for name, found in results.machine["versions"].items())
    yield f"- {summary(results.machine)}"
    yield f"- {versions}"
    quick = " (a quick run: fewer sizes, rounds and operations)" if results.plan["quick"] else ""
    yield f"- {results.plan['rounds']} rounds{quick}; load when the run ended: {results.machine['load']}"
    if busy(results.machine):
        yield "- **The machine was busy with other work: these figures and verdicts are preliminary.**"
    for each in results.skipped:
        yield f"- not measured: {each.what}: {each.why}"


def _details(results: Results) -> Iterator[str]:
    for scenario in SCENARIOS:
        rows = [row for row in results.rows if row.scenario == scenario.name]
        if rows and scenario.name != beside.NAME:
            yield f"### {scenario.title}"
            yield detail_sheet(scenario.title, rows).markdown()
