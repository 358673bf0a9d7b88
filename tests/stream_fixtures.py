"""What tests of streams share: producers and consumers over each route."""

import contextlib
import os
import secrets
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from waiting import wait_until

from dray import Consumer, Payload, Producer, make_secret

ROUTES = ("name", "name without direct leases", "tcp", "ucx")
SECONDS = 20.0


@dataclass
class Route:
    """One way from producers to consumers.

    Attributes:
        kind: one of `ROUTES`.
        name: the name of the stream.
    """

    kind: str
    name: str = field(default_factory=lambda: f"test-{secrets.token_hex(4)}")
    secret: bytes = field(default_factory=make_secret)
    addresses: list[str] = field(default_factory=list)

    @property
    def by_name(self) -> bool:
        return self.kind.startswith("name")

    @property
    def in_place(self) -> bool:
        return self.kind == "name"

    def producer(self, **options: Any) -> Producer:
        """A producer of the stream. By address, consumers made later know its address."""
        options = {"slots": 8, "slot_bytes": 1 << 21, "scope": self.name, **options}
        if not self.by_name:
            options |= {"listen": f"{self.kind}://127.0.0.1:0", "secret": self.secret}
        made = Producer(self.name, **options)
        self.addresses += made.addresses
        return made

    def consumer(self, **options: Any) -> Consumer:
        """A consumer of all producers made so far, or by name of those to come as well."""
        if self.by_name:
            return Consumer(self.name, scope=self.name, direct=self.in_place, **options)
        return Consumer(self.addresses, secret=self.secret, **options)


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> Route:
    if request.param == "ucx":
        pytest.importorskip("ucxx")
    return Route(request.param)


def consumers_of(producer: Producer) -> int:
    return sum(group.consumers for group in producer.statistics())


def wait_for_consumers(producer: Producer, count: int = 1) -> None:
    wait_until(lambda: consumers_of(producer) == count, f"{count} consumers")


def number(payload: Payload) -> int:
    return int(payload["number"])


@contextlib.contextmanager
def in_thread(call: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """Call in a thread; the block gets a function that waits for its result."""
    results: list[Any] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(SECONDS)
        assert not thread.is_alive(), "the call has not returned"
        if failures:
            raise failures[0]
        return results[0]

    yield result
    thread.join(SECONDS)
    assert not thread.is_alive(), "the call has not returned"


@contextlib.contextmanager
def forked(call: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    """Run `call` in a forked process, with the end of a pipe to write to; (pid, the other end) for the block.

    If the block fails, the process ends by SIGABRT: Python's fault handler then writes the stacks of its threads.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            call(writing)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    number = signal.SIGABRT
    try:
        yield pid, reading
        number = signal.SIGKILL
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
