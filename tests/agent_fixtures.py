"""What tests of agents share: agents in this process, and registered owners of rings in others."""

import array
import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from transport_fixtures import Child, reference
from waiting import wait_until

from dray import PayloadClient, PayloadRef
from dray.agent import Agent
from dray.agent.messages import MAX_MESSAGE, Answer
from dray.private_directory import PrivateDirectory

NBYTES = 40_000
SECRET = bytes(range(32))

OWNER = """
from pathlib import Path
from dray.agent import Registration
secret = bytes.fromhex(arguments["secret"]) if arguments["secret"] else None
ring = SharedRingBuffer(arguments["slots"], 1 << 16)
registration = Registration(ring, Path(arguments["agent"]), name="owner", lanes=arguments["lanes"], secret=secret)
server = PayloadServer(
    ring, lane=arguments["lanes"], secret=secret, heirs=registration.endpoints, drain_timeout=0.5, threads=1
)
send(registration.endpoints)
writing = None
while (wanted := receive()) is not None:
    if wanted == "write":
        writing = ring.claim(NBYTES := 1000)
        writing.buffer[:] = b"x" * NBYTES
        send(writing.slot)
    elif wanted == "fork":
        forked = os.fork()
        if not forked:
            import signal
            signal.pause()
        send(forked)
    elif wanted == "close server":
        server.close()
        send()
    elif wanted == "close ring":
        server.close()
        ring.close()
        send()
    elif wanted == "close descriptors":
        os.closerange(3, 1 << 10)
        send()
    else:
        seed, nbytes = wanted
        send(json.loads(server.put_bytes(pattern(seed, nbytes), timeout=20).to_json()))
registration.close()
server.close()
ring.close()
"""
"""Registers a ring with an agent; puts ``[seed, nbytes]``, leaves a slot half written, forks, and more."""


@contextlib.contextmanager
def running_agent(**options: Any) -> Iterator[Agent]:
    with PrivateDirectory() as folder, Agent(folder.path, **options) as agent:
        yield agent


def owner(agent: Agent, *, lanes: Sequence[str] = ("shm",), slots: int = 8) -> Child:
    secret = SECRET.hex() if "tcp" in lanes else ""
    return Child(OWNER, agent=str(agent.path), lanes=lanes, slots=slots, secret=secret)


def put(child: Child, *seeds: int) -> list[PayloadRef]:
    return [reference(child.ask([seed, NBYTES])) for seed in seeds]


def client_of(*lanes: str) -> PayloadClient:
    return PayloadClient(lane=lanes, secret=SECRET if "tcp" in lanes else None)


def wait_inherited(agent: Agent, payloads: int) -> None:
    wait_until(
        lambda: agent.statistics().inherited_payloads == payloads, "the inheritance", story=agent.statistics
    )


def answer_to(agent: Agent, message: bytes, descriptors: Sequence[int]) -> Answer:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.settimeout(10)
        raw.connect(str(agent.path))
        raw.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])
        return Answer.decode(raw.recv(MAX_MESSAGE))
