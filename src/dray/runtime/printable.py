"""Text that people are shown, made of text that came from user code or from a peer."""

from __future__ import annotations

MAX_SHOWN = 4000
"""Characters of one text that are shown."""


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """`text` in one line without control characters, which are written as escapes, such as ``\\x1b`` and ``\\n``.

    The result can be encoded in UTF-8, and changes neither the state of a terminal nor the order of its text.

    Args:
        limit: the longest result, in characters; a longer one is cut and ends with an ellipsis.
    """
    # An escape is no shorter than its character, so what lies behind the limit need not be looked at.
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text[: limit + 1]
    )
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"
