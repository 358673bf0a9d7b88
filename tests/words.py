"""Finds words that dray's code, tests and pages do not use, and prints what to write instead.

    python tests/words.py [--count] [FILE ...]

`tests/banned-words.toml` has the files that are checked, `files` without `except`, and two lists of rules:

- A rule in `words` is searched in plain words, whatever their case. Identifiers are split first, so `nobody` is
  found in `test_nobody_waits` and in `NobodyWaits`. A space in a rule also matches a line break.
- A rule in `names` is searched in the text as it is, upper and lower case distinguished.

`find` is a regular expression for whole words, `write` is the replacement that is printed, and `allow` has regular
expressions for places where the word is right. `except_in` has beginnings of the names of files in which a rule
does not apply. Line 0 of a finding is the name of the file.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("banned-words.toml")
PARTS_OF_IDENTIFIERS = re.compile(r"_|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
BREAK = r"\s+(?:[#|>*-]+\s+)?"
"""What may be between two words: spaces, or a line break and the mark that begins a line of a comment."""


class Rule(NamedTuple):
    """What must not be in a file.

    Attributes:
        pattern: what is searched.
        instead: what to write instead.
        allowed: where it is right.
        split: identifiers are split into words before the search.
        except_in: beginnings of the names of files in which the rule does not apply.
    """

    pattern: re.Pattern[str]
    instead: str
    allowed: tuple[re.Pattern[str], ...]
    split: bool
    except_in: tuple[str, ...] = ()


class Finding(NamedTuple):
    """A banned word, the line that it begins in, and what to write instead."""

    line: int
    word: str
    instead: str


class WordList(NamedTuple):
    """The list: which files are checked, and the rules."""

    files: tuple[Path, ...]
    rules: tuple[Rule, ...]


def read_list(file: Path = LIST) -> WordList:
    """The list in a file."""
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    matched = {path for pattern in table["files"] for path in ROOT.glob(pattern)}
    files = sorted(matched - {ROOT / name for name in table["except"]})
    found = [make_rule(**entry, split=kind == "words") for kind in ("words", "names") for entry in table[kind]]
    return WordList(tuple(files), tuple(found))


def make_rule(
    find: str, write: str, split: bool, allow: tuple[str, ...] = (), except_in: tuple[str, ...] = ()
) -> Rule:
    """One rule from its entry in the list."""

    def compiled(pattern: str, bound: str = "") -> re.Pattern[str]:
        spaced = pattern.replace(" ", BREAK)
        return re.compile(f"{bound}(?:{spaced}){bound}", re.IGNORECASE) if split else re.compile(pattern)

    return Rule(compiled(find, r"\b"), write, tuple(compiled(each) for each in allow), split, tuple(except_in))


def findings(text: str, listed: WordList, name: str = "") -> Iterator[Finding]:
    """The banned words in a text, rule by rule; `name` is that of its file."""
    words = PARTS_OF_IDENTIFIERS.sub(" ", text)
    for rule in listed.rules:
        if name and name.startswith(rule.except_in):
            continue
        searched = words if rule.split else text
        allowed = [found.span() for pattern in rule.allowed for found in pattern.finditer(searched)]
        for found in rule.pattern.finditer(searched):
            begin, end = found.span()
            if not any(first <= begin and end <= last for first, last in allowed):
                yield Finding(searched.count("\n", 0, begin) + 1, " ".join(found[0].split()), rule.instead)


def main(arguments: list[str]) -> int:
    """Check files; 1 if a banned word is in one of them."""
    parser = argparse.ArgumentParser(description="Finds words that dray does not use.")
    parser.add_argument("--count", action="store_true", help="print the number of findings in each file")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: the files in the list")
    options = parser.parse_args(arguments)
    listed, total = read_list(), 0
    for path in [each.resolve() for each in options.files] or listed.files:
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
        found = sorted(findings(f"{path.name}\n{path.read_text(encoding='utf-8')}", listed, name))
        total += len(found)
        if options.count and found:
            print(f"{len(found):5} {name}")
        for each in () if options.count else found:
            print(f"{name}:{each.line - 1}: {each.word}: write {each.instead} instead")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
