"""Text and tables of others, cut to bounds. What has another type stays as it is: validation follows."""

from __future__ import annotations

from itertools import islice
from typing import Any

from dray.text import printable


class Trimming:
    """Cuts, and counts what was cut.

    Attributes:
        count: how many texts were cut, and how many entries were dropped.
    """

    def __init__(self) -> None:
        self.count = 0

    def text(self, given: Any, most: int) -> Any:
        """`given` with at most so many characters."""
        if not isinstance(given, str) or len(given) <= most:
            return given
        self.count += 1
        return printable(given, most)

    def texts(self, given: Any, most: int, longest: int) -> Any:
        """The first texts of the list `given`."""
        if not isinstance(given, list):
            return given
        self.count += max(0, len(given) - most)
        return [self.text(each, longest) for each in given[:most]]

    def table(self, given: Any, most: int, longest_name: int, longest_text: int | None = None) -> Any:
        """The first entries of the dictionary `given`, with bounded names, and texts where a bound is given."""
        if not isinstance(given, dict):
            return given
        self.count += max(0, len(given) - most)
        return {
            self.text(name, longest_name): value if longest_text is None else self.text(value, longest_text)
            for name, value in islice(given.items(), most)
        }
