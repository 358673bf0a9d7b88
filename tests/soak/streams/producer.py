"""A producer's process: it puts payloads until it is asked to end, then closes and waits for consumers."""

from __future__ import annotations

import logging
import random
import select
import signal
import socket
import time
from typing import Any, Final

from soak.streams import content
from soak.streams.journal import Journal
from soak.streams.plan import BLOCKED, SECRET, ProducerPlan

from dray.errors import BufferFullError, UndeliveredError
from dray.streams import Producer

DRAIN_SECONDS: Final = 40.0
"""How long a producer waits for consumers at its end. All of them live then, so that this time is never needed."""

PAUSE, RESUME, PAUSED = b"p", b"r", b"d"


class Interrupted(Exception):
    """A signal handler has raised in ``put``."""


class _Signals:
    """SIGTERM asks for the end; SIGUSR1 raises `Interrupted`, if that is allowed."""

    def __init__(self) -> None:
        self.ended = self.armed = False
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGUSR1, self._interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)

    def _end(self, *_: object) -> None:
        self.ended = True

    def _interrupt(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise Interrupted


def run(plan: ProducerPlan, journal: Journal, control: socket.socket | None = None) -> None:
    """Put payloads until SIGTERM.

    Args:
        plan: what to put.
        journal: where to write it down.
        control: `PAUSE` and `RESUME` come from there; `PAUSED` answers.
    """
    rng = random.Random(plan.seed)
    signals = _Signals()
    arguments: dict[str, Any] = {"listen": plan.listen, "secret": SECRET} if plan.listen else {}
    overwrites = not plan.steady and rng.random() < 0.25
    slots = rng.choice((2, 3, 8, 16, 64))
    producer = Producer(
        plan.stream, scope=plan.scope, slots=slots, on_full="overwrite" if overwrites else "block",
        groups=plan.groups, drain_timeout=DRAIN_SECONDS, **arguments,
    )  # fmt: skip
    journal.write("B", producer.id.hex(), slots, int(overwrites), plan.listen)
    pause = rng.choice((0.0005, 0.002, 0.01, 0.05))
    number = 0
    while not signals.ended:
        if control is not None and select.select([control], [], [], 0)[0]:
            _pause(producer, control, signals)
            continue
        _put(producer, plan.key, number, content.draw_size(rng), journal=journal, signals=signals)
        number += 1
        if rng.random() < 0.2:  # some in a row
            time.sleep(rng.expovariate(1 / pause) if pause else 0.0)
    journal.write("C")
    try:
        producer.close()
    except UndeliveredError as error:
        journal.write("E", error.lost, error)
    else:
        journal.write("E", 0)


def _put(producer: Producer, key: int, number: int, size: int, *, journal: Journal, signals: _Signals) -> None:
    arrays = content.make(key, number, size)
    journal.write("?", number, size)
    try:
        try:
            signals.armed = True
            payload = producer.put(arrays, timeout=0.5)
        finally:
            signals.armed = False
    except BufferFullError:
        journal.write("F", number)
    except Interrupted:
        logging.info("put of payload %d was interrupted", number)
    else:
        journal.write("P", number, payload.sequence)


def _pause(producer: Producer, control: socket.socket, signals: _Signals) -> None:
    if control.recv(1) == PAUSE:
        left = producer.drain(DRAIN_SECONDS)
        control.sendall(PAUSED if not left else b"%d" % min(left, 9))
        while not signals.ended:
            if select.select([control], [], [], 0.2)[0]:
                control.recv(1)
                return
