"""What a consumer wants, and what it reports while it waits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from dray.clock import Clock
from dray.errors import ProtocolError, SchemaError
from dray.payload import Selection

logger = logging.getLogger("dray.streams")

FIRST_REPORT_SECONDS: Final = 5.0
REPORT_SECONDS: Final = 30.0
"""A wait without a producer is reported after the first, any other wait after the second, and so on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a consumer wants.

    Attributes:
        name, scope: the stream; the name is empty where producers are found by address.
        endpoints: the endpoints of producers on other hosts.
        group: the name of its group.
        prefetch: payloads that it may have been given and has not begun.
        schema: the text of the schema that payloads must have; None accepts any.
        secret: the secret of producers on other hosts.
        direct: lease payloads in place where that is possible.
        selection: the part of each payload that is wanted; None for all.
    """

    name: str = ""
    scope: str = ""
    endpoints: tuple[str, ...] = ()
    group: str = "default"
    prefetch: int = 2
    schema: str | None = None
    secret: bytes | None = field(default=None, repr=False)
    direct: bool = True
    selection: Selection | None = None

    def __str__(self) -> str:
        if self.name:
            return f"stream {self.name!r} in scope {self.scope!r}"
        return f"stream at {_first(self.endpoints)}"

    def explain(self, producers: Sequence[str], late: Sequence[str]) -> str:
        """What a consumer waits for that is attached to producers, and for the bytes of `late` payloads."""
        if late:
            return f"{self}: the bytes have not come of payload {', '.join(late[:3])}"
        return f"{self}: no payload has come from {_first(producers)}"

    def reader_of(self, groups: Sequence[str], who: object, schema: object) -> int:
        """The reader id of the group at a producer.

        Raises:
            ProtocolError: the producer has no such group.
            SchemaError: it has another schema.
        """
        if self.group not in groups:
            names = ", ".join(map(repr, groups))
            raise ProtocolError(f"{self}: {who} has no group {self.group!r}, only {names}")
        if schema is not None and self.schema is not None and schema != self.schema:
            raise SchemaError(f"{self}: {who} has another schema: {schema}, not {self.schema}")
        return groups.index(self.group)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


class Waiting(Protocol):
    """A consumer that waits."""

    @property
    def producers(self) -> list[str]: ...
    def explain(self) -> str: ...


class Report:
    """Logs every 30 s what a consumer waits for.

    Args:
        clock: where time comes from.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.now()
        self._reported = 0

    def remaining(self, attached: bool) -> float:
        """Seconds until the next line."""
        return max(0.0, self._due(attached) - self._clock.now())

    def log(self, inbox: Waiting) -> None:
        """Log the line if it is due."""
        attached = bool(inbox.producers)
        now = self._clock.now()
        if now >= self._due(attached):
            self._reported = int((now - self._began) // REPORT_SECONDS) + 1
            logger.warning("waiting for %.0f s: %s", now - self._began, inbox.explain())

    def _due(self, attached: bool) -> float:
        if not self._reported and not attached:
            return self._began + FIRST_REPORT_SECONDS
        return self._began + REPORT_SECONDS * max(1, self._reported)
