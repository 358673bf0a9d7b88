"""The scenarios: small configurations that together cover what consumers and the owner can do at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, NamedTuple


class Policy(Enum):
    """What the owner does with payloads that are not consumed."""

    WAIT = auto()
    """A claim waits until every reader id has consumed a payload."""
    OVERWRITE = auto()
    """A claim drops the oldest payload that no consumer has leased."""
    NEWEST = auto()
    """A commit retires the payloads before it; the board is not used."""


class End(Enum):
    """What the owner does after its last payload."""

    STOP = auto()
    DRAIN = auto()
    """It waits until every payload is consumed."""
    CLOSE = auto()
    """It closes the ring."""


class Kind(Enum):
    """What a consumer's thread does."""

    LEASE = auto()
    """A direct lease."""
    ASK = auto()
    """A lease over the socket, as network lanes do."""
    READ = auto()
    """Read the payload under the lease."""
    END = auto()
    """End the lease."""
    ACKNOWLEDGE = auto()
    """Consume a payload without reading it."""
    REGISTER = auto()
    """Register the process with membarrier."""
    ATTACH = auto()
    """Attach to the producer."""
    CLOSE = auto()
    """Begin no more leases, and end the attachment."""


class Operation(NamedTuple):
    """One operation of a thread.

    Attributes:
        kind: what it does.
        payload: the sequence number of the payload.
        consumed: the lease ends consumed.
        thread: the thread whose lease is ended; None: this one.
    """

    kind: Kind
    payload: int = 0
    consumed: bool = False
    thread: int | None = None


Program = tuple[Operation, ...]


def consume(*payloads: int) -> Program:
    """Lease, read and consume payloads, one after the other."""
    return tuple(
        operation
        for payload in payloads
        for operation in (
            Operation(Kind.LEASE, payload),
            Operation(Kind.READ, payload),
            Operation(Kind.END, payload, consumed=True),
        )
    )


def release(payload: int) -> Program:
    """Lease and read a payload, and end the lease without consuming it."""
    return (Operation(Kind.LEASE, payload), Operation(Kind.READ, payload), Operation(Kind.END, payload))


def ask(payload: int) -> Program:
    """Lease a payload over the socket, read it and consume it."""
    return (
        Operation(Kind.ASK, payload),
        Operation(Kind.READ, payload),
        Operation(Kind.END, payload, consumed=True),
    )


def acknowledge(payload: int) -> Program:
    """Consume a payload without reading it."""
    return (Operation(Kind.ACKNOWLEDGE, payload),)


def lease(payload: int) -> Program:
    """Lease a payload and read it."""
    return (Operation(Kind.LEASE, payload), Operation(Kind.READ, payload))


def end(payload: int, thread: int | None = None) -> Program:
    """Consume a payload: end the lease of this thread, or of another one."""
    return (Operation(Kind.END, payload, consumed=True, thread=thread),)


CLOSE: Final[Program] = (Operation(Kind.CLOSE),)
ATTACH: Final[Program] = (Operation(Kind.REGISTER), Operation(Kind.ATTACH))


@dataclass(frozen=True)
class Thread:
    """A consumer's thread, on a processor of its own.

    Attributes:
        process: the number of its process, which has one attachment and one lease page.
        reader: its reader id.
        program: what it does.
    """

    process: int
    reader: int
    program: Program


@dataclass(frozen=True)
class Scenario:
    """One configuration.

    Attributes:
        name: how commands and defects refer to it.
        covers: what can happen at the same time.
        threads: the consumers' threads.
        payloads: how many payloads the owner puts.
        slots: how many slots the ring has.
        readers: how many reader ids must consume a payload.
        policy: what the owner does with payloads that are not consumed.
        end: what the owner does after its last payload.
        putting: how many threads of the owner put payloads; each puts `payloads / putting` of them.
        words: how many lease words a page has. With more than one, threads take indices from a list.
        crashes: processes that may be killed between any two steps.
        sockets: processes whose socket may be closed between any two steps.
        barrier_fails: one barrier may fail.
        interrupted: an exception may end one observation, and the claim that it is for.
        server_stops: the server may stop, once; another one starts after it.
        reaches: events that must occur in the search, so that a scenario cannot pass without them.
        quick: `make test` searches it too.
    """

    name: str
    covers: str
    threads: tuple[Thread, ...]
    payloads: int = 3
    slots: int = 1
    readers: int = 1
    policy: Policy = Policy.WAIT
    end: End = End.STOP
    putting: int = 1
    words: int = 1
    crashes: tuple[int, ...] = ()
    sockets: tuple[int, ...] = ()
    barrier_fails: bool = False
    interrupted: bool = False
    server_stops: bool = False
    reaches: tuple[str, ...] = ()
    quick: bool = True

    @property
    def processes(self) -> int:
        """How many processes of consumers there are."""
        return max(thread.process for thread in self.threads) + 1

    @property
    def closing_processes(self) -> tuple[int, ...]:
        """Processes that end their attachment."""
        closing = {
            thread.process for thread in self.threads if any(each.kind is Kind.CLOSE for each in thread.program)
        }
        return tuple(sorted(closing))


_STALE: Final = "STALE reported"
_WAIT: Final = ("owner woken", "server woken", "doorbell rung", "retired slot is named")
_DROP: Final = (
    "dropped",
    "drop given back",
    "consumed during a drop",
    "lease over the socket",
    "lease over the socket during a drop",
)

SCENARIOS: Final = (
    # --- retire and wait ---------------------------------------------------------------------------------------
    Scenario(
        "reuse", "one slot is used three times, one consumer", (Thread(0, 0, consume(0, 1, 2)),), reaches=_WAIT
    ),
    Scenario(
        "drain",
        "the owner waits until everything is consumed",
        (Thread(0, 0, consume(0, 1)),),
        payloads=2,
        end=End.DRAIN,
        reaches=_WAIT,
    ),
    Scenario(
        "batch",
        "two slots are retired together",
        (Thread(0, 0, consume(0, 1, 2)),),
        payloads=4,
        slots=2,
        reaches=(*_WAIT, "slots retired together"),
        quick=False,
    ),
    Scenario(
        "two-leases",
        "a consumer has two leases at once, in two words of its page",
        (Thread(0, 0, lease(0) + lease(1) + end(0) + end(1) + consume(2)),),
        slots=2,
        words=2,
        reaches=(*_WAIT, "slots retired together"),
    ),
    Scenario(
        "two-reader-ids",
        "two reader ids must consume each payload",
        (Thread(0, 0, consume(0, 1)), Thread(1, 1, consume(0, 1))),
        readers=2,
        reaches=_WAIT,
        quick=False,
    ),
    Scenario(
        "two-attachments",
        "two attachments of one reader id lease the same payload",
        (Thread(0, 0, consume(0)), Thread(1, 0, consume(0))),
        payloads=2,
        reaches=(*_WAIT, _STALE),
    ),
    Scenario(
        "due-again",
        "a slot is due, free, used and due again while an observation that began before is in its barrier",
        (Thread(0, 0, consume(0, 1)), Thread(1, 0, consume(1)[:2])),
        reaches=(*_WAIT, _STALE),
        quick=False,
    ),
    Scenario(
        "release",
        "a lease ends without consuming, and the payload is leased again",
        (Thread(0, 0, release(0) + consume(0)), Thread(1, 0, consume(0))),
        payloads=2,
        reaches=(*_WAIT, _STALE),
        quick=False,
    ),
    Scenario(
        "acknowledge",
        "a consumer consumes without reading while another one consumes two payloads",
        (Thread(0, 0, acknowledge(0)), Thread(1, 0, consume(0, 1))),
        reaches=(*_WAIT, _STALE),
        quick=False,
    ),
    Scenario(
        "attach",
        "a consumer attaches while the owner retires",
        (Thread(0, 0, consume(0)), Thread(1, 0, ATTACH + consume(0))),
        payloads=2,
        reaches=(*_WAIT, _STALE, "attached while the owner is at work"),
    ),
    Scenario(
        "two-putting",
        "two threads of the owner claim, retire and wait",
        (Thread(0, 0, consume(0, 1)),),
        payloads=4,
        slots=2,
        putting=2,
        reaches=_WAIT,
        quick=False,
    ),
    Scenario(
        "two-putting-drop",
        "two threads of the owner claim, drop and wait",
        (Thread(0, 0, consume(1)),),
        payloads=4,
        putting=2,
        policy=Policy.OVERWRITE,
        reaches=(*_DROP, "owner woken", _STALE),
        quick=False,
    ),
    # --- processes that are killed, sockets that are closed ----------------------------------------------------
    Scenario(
        "kill",
        "one of two attachments of a reader id is killed",
        (Thread(0, 0, consume(0)), Thread(1, 0, consume(0))),
        payloads=2,
        crashes=(0,),
        reaches=(*_WAIT, _STALE, "killed under a lease"),
        quick=False,
    ),
    Scenario(
        "kill-both",
        "two reader ids, either process is killed",
        (Thread(0, 0, consume(0)), Thread(1, 1, consume(0))),
        payloads=2,
        readers=2,
        crashes=(0, 1),
        reaches=(*_WAIT, "killed under a lease"),
        quick=False,
    ),
    Scenario(
        "attach-kill",
        "one of two attachments is made while the owner retires; either process is killed",
        (Thread(0, 0, consume(0)), Thread(1, 0, ATTACH + consume(0))),
        payloads=2,
        crashes=(0, 1),
        reaches=(*_WAIT, _STALE, "attached while the owner is at work", "killed under a lease"),
        quick=False,
    ),
    Scenario(
        "socket",
        "the socket of an attachment is closed while its process is alive",
        (Thread(0, 0, release(0) + consume(1)),),
        policy=Policy.OVERWRITE,
        sockets=(0,),
        reaches=(*_WAIT, *_DROP, "socket closed"),
    ),
    # --- ends --------------------------------------------------------------------------------------------------
    Scenario(
        "end-again",
        "a lease is ended a second time while the next one has its word",
        (Thread(0, 0, lease(0) + end(0) + lease(1)[:1] + end(0) + lease(1)[1:] + end(1)),),
        policy=Policy.OVERWRITE,
        reaches=(*_WAIT, *_DROP, "second end"),
    ),
    Scenario(
        "threads",
        "two threads share an attachment, and one ends a lease of the other",
        (Thread(0, 0, consume(0, 1)), Thread(0, 0, end(0, thread=0) + consume(1))),
        payloads=2,
        words=2,
        reaches=(*_WAIT, _STALE, "second end"),
    ),
    # --- drop --------------------------------------------------------------------------------------------------
    Scenario(
        "drop",
        "payloads are dropped or given back, one consumer, one slot is used three times",
        (Thread(0, 0, release(0) + consume(0, 1)),),
        policy=Policy.OVERWRITE,
        reaches=(*_WAIT, *_DROP, _STALE),
    ),
    Scenario(
        "drop-two-slots",
        "payloads are dropped or given back, two slots",
        (Thread(0, 0, consume(0, 1)),),
        payloads=4,
        slots=2,
        policy=Policy.OVERWRITE,
        reaches=(*_WAIT, *_DROP, _STALE),
        quick=False,
    ),
    Scenario(
        "drop-two-attachments",
        "payloads are dropped or given back, two attachments of one reader id",
        (Thread(0, 0, consume(0)), Thread(1, 0, consume(0))),
        payloads=2,
        policy=Policy.OVERWRITE,
        reaches=(*_WAIT, *_DROP, _STALE),
        quick=False,
    ),
    Scenario(
        "drop-two-reader-ids",
        "payloads are dropped or given back, two reader ids",
        (Thread(0, 0, consume(0)), Thread(1, 1, consume(0))),
        payloads=2,
        readers=2,
        policy=Policy.OVERWRITE,
        reaches=(*_WAIT, *_DROP, _STALE),
        quick=False,
    ),
    Scenario(
        "drop-attach",
        "a consumer attaches while a drop is undecided",
        (Thread(0, 0, ATTACH + release(0) + consume(0)),),
        payloads=2,
        policy=Policy.OVERWRITE,
        reaches=(*_DROP, _STALE, "attached while the owner is at work"),
    ),
    Scenario(
        "drop-kill",
        "either process is killed while a drop is undecided",
        (Thread(0, 0, consume(0)), Thread(1, 0, consume(0))),
        payloads=2,
        policy=Policy.OVERWRITE,
        crashes=(0, 1),
        reaches=(*_WAIT, *_DROP, _STALE, "killed under a lease"),
        quick=False,
    ),
    Scenario(
        "barrier-fails",
        "a barrier fails, in a retirement, a drop or a wait",
        (Thread(0, 0, release(0) + consume(1)),),
        policy=Policy.OVERWRITE,
        barrier_fails=True,
        reaches=(*_WAIT, *_DROP, _STALE, "barrier failed"),
    ),
    Scenario(
        "barrier-fails-two-putting",
        "a barrier of one of two threads of the owner fails",
        (Thread(0, 0, consume(0)),),
        payloads=4,
        putting=2,
        barrier_fails=True,
        reaches=(*_WAIT, "barrier failed"),
        quick=False,
    ),
    # --- newest, network lanes, close --------------------------------------------------------------------------
    Scenario(
        "newest",
        "payloads are replaced while two consumers lease them",
        (Thread(0, 0, consume(0, 1)), Thread(1, 0, consume(1))),
        slots=2,
        policy=Policy.NEWEST,
        reaches=(*_WAIT, _STALE),
        quick=False,
    ),
    Scenario(
        "newest-attach",
        "a consumer attaches while a payload is replaced",
        (Thread(0, 0, ATTACH + consume(0, 1)),),
        slots=2,
        policy=Policy.NEWEST,
        reaches=(*_WAIT, _STALE, "attached while the owner is at work"),
    ),
    Scenario(
        "newest-two-putting",
        "two threads of the owner replace payloads",
        (Thread(0, 0, consume(1)),),
        payloads=4,
        slots=2,
        putting=2,
        policy=Policy.NEWEST,
        reaches=(*_WAIT, _STALE),
    ),
    Scenario(
        "network",
        "a direct lease and a lease over the socket, one reader id",
        (Thread(0, 0, consume(0)), Thread(1, 0, ask(0))),
        payloads=2,
        reaches=(*_WAIT, _STALE, "lease over the socket"),
    ),
    Scenario(
        "network-drop",
        "a direct lease and a lease over the socket, one reader id, payloads are dropped",
        (Thread(0, 0, consume(0)), Thread(1, 0, ask(0))),
        payloads=2,
        policy=Policy.OVERWRITE,
        reaches=(*_WAIT, *_DROP, _STALE),
    ),
    Scenario(
        "network-kill",
        "a process with a lease over the socket is killed",
        (Thread(0, 0, consume(0)), Thread(1, 0, ask(0))),
        payloads=2,
        crashes=(1,),
        reaches=(*_WAIT, _STALE, "killed under a lease"),
    ),
    Scenario(
        "close",
        "the owner closes the ring while two attachments lease",
        (Thread(0, 0, consume(0)), Thread(1, 0, consume(0))),
        payloads=1,
        end=End.CLOSE,
        reaches=("closed under a lease", "refused by a closed ring"),
    ),
    # --- attachments that their consumers end, exceptions, servers that stop -----------------------------------
    Scenario(
        "end-attachment",
        "a consumer leases and ends its attachment; another one stays",
        (Thread(0, 0, lease(0) + CLOSE + end(0)), Thread(1, 0, consume(0))),
        payloads=2,
        reaches=(*_WAIT, _STALE, "attachment ended by its consumer", "attachment closed under a lease"),
        quick=False,
    ),
    Scenario(
        "end-attachment-drop",
        "the only consumer ends its attachment while payloads are dropped",
        (Thread(0, 0, lease(0) + CLOSE + end(0)),),
        policy=Policy.OVERWRITE,
        reaches=(*_DROP, "attachment ended by its consumer", "dropped without attachments"),
    ),
    Scenario(
        "end-attachment-threads",
        "one of two threads ends the attachment that both use, payloads are dropped",
        (Thread(0, 0, consume(0)), Thread(0, 0, CLOSE)),
        payloads=2,
        words=2,
        policy=Policy.OVERWRITE,
        reaches=("dropped", "attachment ended by its consumer", "dropped without attachments"),
    ),
    Scenario(
        "exception",
        "an exception ends an observation while a drop is undecided",
        (Thread(0, 0, release(0) + consume(0)),),
        policy=Policy.OVERWRITE,
        interrupted=True,
        reaches=(*_WAIT, *_DROP, _STALE, "observation ended by an exception"),
    ),
    Scenario(
        "server-stops",
        "the server stops, and another one starts, while payloads are dropped",
        (Thread(0, 0, release(0) + consume(0)),),
        payloads=2,
        policy=Policy.OVERWRITE,
        server_stops=True,
        reaches=(*_DROP, _STALE, "server stopped", "no server answers"),
    ),
)
