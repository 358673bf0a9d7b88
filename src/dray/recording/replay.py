"""`replay`: puts the payloads of a recording into a stream again."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

from dray.clock import MONOTONIC, Deadline
from dray.errors import BufferFullError, ConfigError
from dray.recording.files import RecordedPayload
from dray.streams import Producer

_SLICE: Final = 0.5


def replay(
    recording: Iterable[RecordedPayload],
    producer: Producer,
    *,
    speed: float | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Put the payloads of a recording in their order; returns how many were put.

    Args:
        recording: a `Recording`, or a part of one.
        producer: where to. It waits while consumers are behind.
        speed: 1.0 for the times between payloads as they were recorded, 2.0 for half of them; None for none.
        stop: ends it, also while it waits.

    Raises:
        ConfigError: `speed` is not more than 0.
    """
    if speed is not None and not speed > 0:
        raise ConfigError("speed", speed, "more than 0, or None")
    stop = threading.Event() if stop is None else stop
    began: tuple[float, float] | None = None
    put = 0
    for payload in recording:
        if speed is not None:
            began = (MONOTONIC.now(), payload.time) if began is None else began
            due = Deadline(began[0] + (payload.time - began[1]) / speed)
            stop.wait(due.remaining)
        while not stop.is_set():
            try:
                producer.put(payload.values, timeout=_SLICE)
            except BufferFullError:
                continue
            put += 1
            break
        if stop.is_set():
            break
    return put
