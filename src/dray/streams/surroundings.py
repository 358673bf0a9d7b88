"""What a consumer gets from its process and its host. A simulation brings its own."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from typing import Any

from dray.streams.registry import Nudges, Registry
from dray.transport import PayloadClient
from dray.transport.lanes.base import Network
from dray.transport.polling import AdaptivePoller, CloseEvent


class Surroundings:
    """What an `Inbox` gets from its process and its host. A simulation overrides all methods."""

    def network(self, remote: bool) -> Network:
        """Where connections come from; for `remote` ones, its end ends the waits for them."""
        return Network(CloseEvent() if remote else None)

    def epoll(self) -> select.epoll:
        """Waits for connections."""
        return select.epoll()

    def poller(self, epoll: select.epoll) -> Any:
        """A function like `select.epoll.poll` whose waits begin with polls that do not sleep."""
        return AdaptivePoller(epoll.poll)

    def registry(self, name: str, scope: str) -> Registry:
        """Where producers are found by name."""
        return Registry(name, scope)

    def nudges(self) -> Nudges:
        """Learns of new producers."""
        return Nudges()

    def client(self, secret: bytes | None, reader: int) -> PayloadClient:
        """For payloads that are not leased in place."""
        return PayloadClient(secret=secret, reader=reader, direct=False)

    def pause(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)

    def start(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run a function in a thread of its own; returns what waits for its end."""
        thread = threading.Thread(target=run, name="dray-stream-read", daemon=True)
        thread.start()
        return thread.join


SURROUNDINGS = Surroundings()
