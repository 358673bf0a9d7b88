import pytest

from dray.runtime.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("loss", "loss"),
        ("a b", "a b"),
        ("größe 大", "größe 大"),
        ("\x1b[2Jx", "\\x1b[2Jx"),
        ("one\ntwo\r", "one\\ntwo\\r"),
        ("\u202eabc", "\\u202eabc"),
        ("\ud800", "\\ud800"),
        ("", ""),
    ],
)
def test_text_is_one_line_without_control_characters(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_text_is_no_longer_than_its_limit() -> None:
    assert printable("x" * 10, 10) == "x" * 10
    assert printable("x" * 11, 10) == "x" * 9 + "…"
    assert printable("\n" * 11, 10) == "\\n\\n\\n\\n\\…"
    assert len(printable("\x1b" * 100_000)) == 4000
