import logging
import sys

import pytest

from dray.text import PrintableFormatter, printable, printable_value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\tand\r\nmore \n", "two lines and more"),
        ("  1.5 s  running", "  1.5 s  running"),
        ("red \x1b[31m and bell \x07", "red \\x1b[31m and bell \\x07"),
        ("right to left \u202e", "right to left \\u202e"),
        ("no text \udcc3", "no text \\udcc3"),
        ("größer €", "größer €"),
        ("", ""),
    ],
)
def test_text_becomes_one_line_without_control_characters(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    "text", ["x" * 11, "x" * 10_000_000, "\x1b" * 11, "a " * 50, " " * 50 + "x", "\n" * 39 + "xy"]
)
def test_text_is_never_longer_than_its_limit_and_shows_that_it_was_cut(text: str) -> None:
    shown = printable(text, 10)
    assert len(shown) <= 10
    assert shown.isprintable()
    assert shown.endswith("…") or shown == " ".join(text.split())


def test_value_is_shown_whatever_its_repr_does() -> None:
    class Hidden:
        def __repr__(self) -> str:
            raise RuntimeError("not today")

    assert printable_value("a\nb") == "'a\\nb'"
    assert printable_value(Hidden()) == "(Hidden that has no repr)"
    assert len(printable_value(list(range(1000)), 50)) == 50


def test_a_record_of_a_log_cannot_look_like_two() -> None:
    forged = "2026-01-01 00:00:00,000 supervisor INFO dray: all is well"
    record = logging.LogRecord(
        "a\nlogger", logging.WARNING, __file__, 1, "%s", (f"text\x1b[2J\r\n{forged}",), None
    )
    lines = PrintableFormatter("%(levelname)s %(name)s: %(message)s").format(record).splitlines()
    assert lines == ["WARNING a", "    logger: text\\x1b[2J", f"    {forged}"]


def test_an_exception_in_a_log_cannot_look_like_a_record() -> None:
    forged = "2026-01-01 00:00:00,000 supervisor INFO dray: all is well"
    try:
        raise ValueError(f"\x1b[2J\u2028{forged}")
    except ValueError:
        record = logging.LogRecord("dray", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    first, *rest = PrintableFormatter("%(levelname)s: %(message)s").format(record).splitlines()
    assert first == "ERROR: failed"
    assert rest[-2:] == ["    ValueError: \\x1b[2J", f"    {forged}"]
    assert all(line.startswith("    ") for line in rest)
