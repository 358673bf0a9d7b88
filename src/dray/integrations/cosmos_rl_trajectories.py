"""Trajectories of cosmos-rl in shared memory, and the completions that stand for them. Needs no cosmos-rl."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any, Final

from dray.clock import Deadline
from dray.errors import BufferClosedError, ProtocolError
from dray.integrations.cosmos_rl_settings import CosmosSettings
from dray.payload import torch_interop
from dray.payload.trajectory import trim
from dray.protocol import PayloadRef
from dray.resources import Closing
from dray.ring import SharedRingBuffer
from dray.transport import PayloadServer
from dray.transport.server_statistics import ServerStatistics

logger = logging.getLogger("dray.integrations")

PREFIX: Final = "dray:"
"""How the completion of a rollout begins whose trajectory is in dray. A reference as JSON follows."""


class Trajectories(Closing):
    """The trajectories of a rollout worker: a ring and its server, opened with the first one. Thread-safe.

    Args:
        settings: the settings of the job.
    """

    def __init__(self, settings: CosmosSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._server: PayloadServer | None = None
        self._closed = False

    def open(self) -> PayloadServer:
        """Open the ring, if it is not open, and return its server."""
        with self._lock:
            if self._closed:
                raise BufferClosedError("the rollout worker's trajectories are closed")
            if self._server is None:
                self._server = self._start()
            return self._server

    def _start(self) -> PayloadServer:
        of = self._settings
        ring = SharedRingBuffer(of.slots, of.slot_bytes, on_full=of.on_full, readers=of.readers)
        try:
            return PayloadServer(
                ring, lane=of.lanes, host=of.address, port=of.port, threads=of.threads, secret=of.secret
            )
        except BaseException:
            ring.close()
            raise

    def publish(self, trajectory: Mapping[str, Any]) -> str:
        """Put a trajectory and return the completion that stands for it."""
        arrays = {
            name: torch_interop.to_numpy(value) if torch_interop.is_tensor(value) else value
            for name, value in trajectory.items()
        }
        if self._settings.trim:
            arrays = trim(arrays)
        return PREFIX + self.open().put(arrays, timeout=self._settings.write_timeout).to_json()

    def statistics(self) -> ServerStatistics:
        """Return `PayloadServer.statistics`."""
        return self.open().statistics()

    def close(self, timeout: float = 0.0) -> None:
        """Wait up to `timeout` seconds for readers, then end. Unread trajectories are lost, and logged."""
        with self._lock:
            server, self._server, self._closed = self._server, None, True
        if server is None:
            return
        deadline = Deadline.after(timeout)
        with server.ring, server:
            left = server.ring.ready(leased=True)
            unread = [
                each
                for each in left
                if not server.ring.wait_consumed(each.slot, each.sequence, deadline.remaining)
            ]
            if unread:
                logger.warning("the rollout worker ends; %d unread trajectories are lost", len(unread))


def reference_of(rollout_output: Any) -> PayloadRef:
    """Return the reference in a rollout's output.

    Raises:
        ProtocolError: there is none.
    """
    text = text_of(rollout_output)
    if text is None:
        raise ProtocolError(f"a completion of dray begins with {PREFIX!r}, got {type(rollout_output).__name__}")
    return PayloadRef.from_json(json_of(text.removeprefix(PREFIX)))


def is_trajectory(value: object) -> bool:
    """Whether a completion is named arrays, and not text or a reference."""
    return isinstance(value, Mapping) and any(
        torch_interop.is_tensor(each) or hasattr(each, "__array_interface__") for each in value.values()
    )


def text_of(output: Any) -> str | None:
    """The completion in a rollout's output, if it is one of dray: the output itself, or a dict with it."""
    if isinstance(output, Mapping):
        output = output.get("completion")
    return output if isinstance(output, str) and output.startswith(PREFIX) else None


def json_of(text: str) -> str:
    """The reference without what the framework may have added to the completion, such as an end-of-text mark."""
    return text[: text.rfind("}") + 1]


def key_of(ref: PayloadRef) -> str:
    """The identity of a payload as text."""
    return f"{ref.producer.hex()}:{ref.sequence}"
