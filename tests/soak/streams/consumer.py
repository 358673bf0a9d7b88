"""A consumer's process: it takes payloads in every way that there is, until it is asked to end.

A session is the lifetime of one `Consumer`. It ends at random: by ``break``, by an exception in the loop body, by
`close` in another thread, by the end of the stream, or by SIGTERM. Then the next one begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal

from soak.streams import content
from soak.streams.journal import Journal
from soak.streams.plan import BLOCKED, SECRET, ConsumerPlan

from dray.errors import BufferClosedError, StreamEnded, StreamTimeout
from dray.streams import Consumer, Payload

WAIT_SECONDS: Final = 0.5
"""How long a call waits, where it has a limit: the process looks then whether it is to end."""

PAUSE_SECONDS: Final = 0.05


class Style(Enum):
    """How a session asks for payloads."""

    ITERATE = "for"
    GET = "get"
    BATCH = "batch"
    ASYNC = "async for"


class BodyFailed(Exception):
    """The loop body has raised."""


class Terminated(Exception):
    """SIGTERM came while the consumer waited."""


@dataclass(frozen=True, slots=True)
class Session:
    """What a session does.

    Attributes:
        style, ack: how it asks, and when it acknowledges.
        prefetch, direct: arguments of the consumer.
        steps: after so many payloads it breaks out of its loop.
        batch: payloads of a batch.
        kept: of so many payloads it keeps the arrays.
        held: with manual acknowledgement, so many wait for it.
        failing: how often the loop body raises.
        releasing: how often a payload is given back.
        work: seconds in the loop body.
        closed_after: another thread closes the consumer then; 0 for never.
    """

    style: Style
    ack: Literal["next", "manual"]
    prefetch: int
    direct: bool
    steps: int
    batch: int = 1
    kept: int = 0
    held: int = 0
    failing: float = 0.0
    releasing: float = 0.0
    work: float = 0.0
    closed_after: float = 0.0

    @classmethod
    def draw(cls, rng: random.Random, by_address: bool) -> Session:
        """One at random."""
        style = rng.choice(list(Style))
        manual = rng.random() < 0.4
        batch = rng.choice((2, 3, 5, 12)) if style is Style.BATCH else 1
        return cls(
            style, "manual" if manual else "next",
            prefetch=rng.choice((1, 2, 2, 2, 3, 8)), direct=not by_address and rng.random() < 0.85,
            steps=rng.choice((1, 3, 30, 300, 10**9)), batch=batch,
            kept=rng.choice((0, 0, 1, 4, 12)),
            held=rng.choice((0, 0, 1, 5)) if manual and style is not Style.ITERATE else 0,
            failing=rng.choice((0.0, 0.0, 0.02)), releasing=rng.choice((0.0, 0.02, 0.2)) if manual else 0.0,
            work=rng.choice((0.0, 0.0, 0.001, 0.02)),
            closed_after=rng.uniform(0.1, 2.0) if rng.random() < 0.1 else 0.0,
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.style.value},{self.ack},prefetch={self.prefetch},direct={int(self.direct)},"
            f"batch={self.batch},kept={self.kept},held={self.held},closed={self.closed_after:.1f}"
        )


STEADY = Session(Style.GET, "next", prefetch=2, direct=True, steps=10**9)


def run(plan: ConsumerPlan, journal: Journal) -> None:
    """Take payloads until SIGTERM."""
    _Process(plan, journal).run()


class _Process:
    def __init__(self, plan: ConsumerPlan, journal: Journal) -> None:
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._journal = journal
        self._ended = self._armed = self._closed_elsewhere = False
        self._current: list[Payload] = []
        self._pending: list[Payload] = []
        self._kept: deque[dict[str, Any]] = deque()
        signal.signal(signal.SIGTERM, self._end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)

    def run(self) -> None:
        while not self._ended:
            session = STEADY if self._plan.steady else Session.draw(self._rng, self._plan.by_address)
            with contextlib.suppress(BodyFailed, Terminated, StreamEnded, BufferClosedError):
                self._run(session)
            self._check_kept(0)
            if not self._ended:
                time.sleep(PAUSE_SECONDS)

    def _end(self, *_: object) -> None:
        self._ended = True
        if self._armed:
            self._armed = False
            raise Terminated

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """SIGTERM raises an exception meanwhile."""
        try:
            self._armed = True
            if self._ended:
                raise Terminated
            yield
        finally:
            self._armed = False

    # --- a session --------------------------------------------------------------------------------------------

    def _run(self, session: Session) -> None:
        plan, journal = self._plan, self._journal
        self._current, self._pending = [], []
        self._closed_elsewhere = False
        secret = SECRET if plan.by_address else None
        closing: threading.Timer | None = None
        with Consumer(
            plan.stream, group=plan.group, ack=session.ack, prefetch=session.prefetch, secret=secret,
            scope=None if plan.by_address else plan.scope, direct=session.direct,
        ) as consumer:  # fmt: skip
            journal.write("O", plan.group, int(session.direct), session)
            try:
                if session.closed_after:
                    closing = threading.Timer(session.closed_after, self._close, (consumer,))
                    closing.start()
                if session.style is Style.ASYNC:
                    asyncio.run(self._follow_async(consumer, session))
                else:
                    self._follow(consumer, session)
                self._note_all("a", self._current if session.ack == "next" else [])
            except BaseException:
                self._current = []
                raise
            finally:
                journal.write("x")
        journal.write("X")
        if session.ack == "next" and not self._closed_elsewhere:
            self._note_all("A", self._current)
        if closing is not None:
            closing.cancel()
            closing.join()

    def _close(self, consumer: Consumer) -> None:
        self._closed_elsewhere = True  # perhaps without an acknowledgement
        self._journal.write("x")
        consumer.close(acknowledge=False)

    def _follow(self, consumer: Consumer, session: Session) -> None:
        left = session.steps
        while not self._ended and left > 0:
            self._begin_next(session)
            try:
                payloads = self._ask(consumer, session)
            except StreamTimeout:
                if session.style is Style.BATCH:
                    self._end_next(session, [])
                    return  # a producer that closes waits for what lies in an incomplete batch
                payloads = []
            except StopIteration:
                self._end_next(session, [])
                return
            except StreamEnded:
                self._end_next(session, [])
                raise
            self._end_next(session, payloads)
            for payload in payloads:
                self._work(session, payload)
            self._acknowledge(consumer, session, bool(payloads))
            left -= len(payloads)

    def _ask(self, consumer: Consumer, session: Session) -> list[Payload]:
        if session.style is Style.ITERATE:
            with self._interruptible():
                payloads = [next(consumer)]
        elif session.style is Style.GET:
            payloads = [consumer.get(timeout=WAIT_SECONDS)]
        else:
            payloads = consumer.batch(session.batch, timeout=WAIT_SECONDS)
        return self._note(payloads)

    async def _follow_async(self, consumer: Consumer, session: Session) -> None:
        left = session.steps
        while not self._ended and left > 0:
            self._begin_next(session)
            try:
                payloads = self._note([await asyncio.wait_for(anext(consumer), WAIT_SECONDS)])
            except TimeoutError:
                payloads = []
            except StopAsyncIteration:
                self._end_next(session, [])
                return
            self._end_next(session, payloads)
            for payload in payloads:
                self._work(session, payload)
            self._acknowledge(consumer, session, bool(payloads))
            left -= len(payloads)

    # --- payloads ---------------------------------------------------------------------------------------------

    def _note(self, payloads: list[Payload]) -> list[Payload]:
        at = time.monotonic_ns()
        for payload in payloads:
            try:
                key, number = content.identity(payload)
            except content.WrongPayload as error:
                self._journal.write("W", error)
                continue
            name = payload.id.producer.hex(), payload.id.sequence
            self._journal.write("G", *name, payload.deliveries, key, number, at=at)
        return payloads

    def _begin_next(self, session: Session) -> None:
        if session.ack == "next":
            self._note_all("a", self._current)

    def _end_next(self, session: Session, payloads: list[Payload]) -> None:
        if session.ack == "next":
            self._note_all("A", self._current)
            self._current = payloads
        else:
            self._pending += payloads

    def _note_all(self, kind: str, payloads: Sequence[Payload]) -> None:
        for payload in payloads:
            self._journal.write(kind, payload.id.producer.hex(), payload.id.sequence)

    def _work(self, session: Session, payload: Payload) -> None:
        try:
            content.check(payload)
        except content.WrongPayload as error:
            self._journal.write("W", payload.id, error)
        if session.kept:
            self._kept.append(dict(payload))
            self._check_kept(session.kept)
        if session.work:
            time.sleep(session.work)
        if self._rng.random() < session.failing:
            raise BodyFailed

    def _check_kept(self, most: int) -> None:
        """Arrays that were kept have not changed."""
        while len(self._kept) > most:
            try:
                content.check(self._kept.popleft())
            except content.WrongPayload as error:
                self._journal.write("W", "kept:", error)

    def _acknowledge(self, consumer: Consumer, session: Session, new: bool) -> None:
        """With manual acknowledgement: acknowledge or give back in any order; some wait while new ones come."""
        pending, rng = self._pending, self._rng
        while len(pending) > (session.held if new else 0):
            payload = pending.pop(rng.randrange(len(pending)))
            if rng.random() < session.releasing:
                self._note_all("r", [payload])
                payload.release()
                self._note_all("R", [payload])
            else:
                self._note_all("a", [payload])
                consumer.acknowledge(payload if rng.random() < 0.5 else payload.id)
                self._note_all("A", [payload])
