"""Consumers on the producer's host: what they hold, and what their processes do meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

from benchmarks.exchanges.lanes import READ_SECONDS
from benchmarks.exchanges.spinning import SharedCount, Spinner
from benchmarks.service import Reply
from dray import PayloadClient, PayloadRef


class HoldingService:
    """Clients that hold payloads in place, and a loop of pure Python that runs on request."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._spinner = self._opened.enter_context(closing(Spinner(SharedCount())))

    def do(self, command: str, **arguments: Any) -> Reply:
        if command == "spin":
            return Reply({}, self._spinner.spin)
        if command == "rest":
            self._spinner.rest()
        else:
            self._hold(arguments["refs"])
        return Reply({})

    def close(self) -> None:
        self._opened.close()

    def _hold(self, refs: Sequence[Sequence[str]]) -> None:
        """A client for each sequence of references holds its payloads from now on."""
        for each in refs:
            client = self._opened.enter_context(PayloadClient(lane="shm"))
            for text in each:
                lease = client.lease_bytes(PayloadRef.from_json(text), timeout=READ_SECONDS)
                self._opened.callback(lease.close)
