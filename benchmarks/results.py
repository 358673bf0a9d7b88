"""What a run gave, and its JSON document."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Row
from benchmarks.scenario import Skipped

SCHEMA = 2


class UnreadableResults(Exception):
    """A file does not hold results of this schema; the text states why."""


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that a run gave.

    Attributes:
        machine: where; see `benchmarks.machine`.
        plan: what was asked for.
        rows: what was measured.
        skipped: what was not, and why.
    """

    machine: dict[str, Any]
    plan: dict[str, Any]
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]

    def save(self, path: Path) -> None:
        """Write the document; times in seconds, rates in bytes or payloads per second."""
        document = {
            "schema": SCHEMA,
            "machine": self.machine,
            "plan": self.plan,
            "rows": [row.as_document() for row in self.rows],
            "skipped": [dataclasses.asdict(each) for each in self.skipped],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `save` wrote.

        Raises:
            UnreadableResults: the file cannot be read, or holds something else.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["schema"] != SCHEMA:
                raise UnreadableResults(f"{path} has schema {found['schema']}, not {SCHEMA}")
            rows = tuple(Row.from_document(row) for row in found["rows"])
            skipped = tuple(Skipped(**each) for each in found["skipped"])
            return cls(found["machine"], found["plan"], rows, skipped)
        except OSError as error:
            raise UnreadableResults(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UnreadableResults(f"{path} holds no results: {error!r}") from error
