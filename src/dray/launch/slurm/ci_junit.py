"""JUnit reports: what pytest wrote for each suite, and one report of all suites for other programs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

# What XML 1.0 cannot hold, not even escaped: most control characters, lone surrogates, two non-characters.
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_LOG_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True)
class Counts:
    """How many tests ended in which way; those that were expected to fail, and did, have passed."""

    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0

    @property
    def wrong(self) -> int:
        return self.failed + self.errors

    def __str__(self) -> str:
        named = (
            ("passed", self.passed),
            ("failed", self.failed),
            ("errors", self.errors),
            ("skipped", self.skipped),
        )
        return ", ".join(f"{count} {name}" for name, count in named if count) or "none"


def read_suite(path: Path) -> ElementTree.Element | None:
    """The `<testsuite>` of a report; None where there is no whole report, as after a crash."""
    try:
        root = ElementTree.parse(path).getroot()
    except (FileNotFoundError, ElementTree.ParseError):
        return None
    return root if root.tag == "testsuite" else root.find("testsuite")


def count(suite: ElementTree.Element) -> Counts:
    """The tests of a `<testsuite>`."""
    passed = failed = errors = skipped = 0
    for case in suite.iter("testcase"):
        reason = case.find("skipped")
        if case.find("failure") is not None:
            failed += 1
        elif case.find("error") is not None:
            errors += 1
        elif reason is not None and reason.get("type") != "pytest.xfail":
            skipped += 1
        else:
            passed += 1
    return Counts(passed, failed, errors, skipped)


def add_error(suite: ElementTree.Element, name: str, what: str, log: Path) -> None:
    """Add to a `<testsuite>` that its process went wrong as a whole, with the end of its log."""
    for attribute in ("tests", "errors"):
        suite.set(attribute, str(int(suite.get(attribute, "0")) + 1))
    case = ElementTree.SubElement(suite, "testcase", classname=name, name="the suite as a whole")
    error = ElementTree.SubElement(case, "error", message=what)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    error.text = _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text[-_LOG_CHARACTERS:])


def write_merged(path: Path, suites: dict[str, ElementTree.Element]) -> None:
    """Write one report with a `<testsuite>` for each name, in order."""
    root = ElementTree.Element("testsuites")
    for name, suite in suites.items():
        suite.set("name", name)
        root.append(suite)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)
