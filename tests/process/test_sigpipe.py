"""Y12: where a program has given SIGPIPE its default action back, a peer that dies does not end it."""

from typing import Any

import pytest
from transport_fixtures import SERVER, Child, reference

from dray.clock import Deadline
from dray.errors import DrayError
from dray.transport.connection import Connection

DEFAULT = "import signal\nsignal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_producer_with_the_default_action_of_sigpipe_survives_the_end_of_its_readers(lane: Any) -> None:
    options = {"lane": [lane], "threads": 1}
    with Child(DEFAULT + SERVER, slots=2, slot_bytes=8 << 20, options=options) as producer:
        producer.receive()
        refs = [reference(producer.ask([0, 8 << 20])) for _ in range(2)]
        for _ in range(10):
            deadline = Deadline.after(10)
            try:
                connection = Connection.open(refs[0].endpoints[0], refs[0].producer, None, deadline)
            except DrayError:
                break  # the producer is gone, as the next statement checks
            # Answers are on their way, and wait for room on tcp, when their reader ends.
            connection.ask(refs * 60, 0, deadline)
            connection.close()
        assert producer.ask("statistics")["server"]["connections"] == 10


PEERS = """
import socket, threading
from dray.jobs.queue.connection import NoSignalSocket
from dray.jobs.messages.controller_client import ControllerClient
from dray.jobs.messages.channel import GroupLostError, MessageChannel
from dray.jobs.messages.models import RankCommand, Shutdown
from dray.jobs.process import StopFlag

found = []
mine, other = socket.socketpair()
with MessageChannel(mine, "rank 1", StopFlag(), 5.0) as channel:
    other.close()
    try:
        channel.send(RankCommand(what="end"))
    except GroupLostError:
        found.append("rank")
mine, other = socket.socketpair()
node = MessageChannel(mine, "node")
other.close()
node.post(Shutdown())
if node.lost:
    found.append("node")
node.close()
mine, other = socket.socketpair()
with NoSignalSocket.of(mine) as connected:
    other.close()
    try:
        connected.sendall(b"PING")
    except BrokenPipeError:
        found.append("redis")
with ControllerClient("http://127.0.0.1:1", "token", 1.0):
    (thread,) = (each for each in threading.enumerate() if each.name == "controller-client")
    while True:
        status = open(f"/proc/self/task/{thread.native_id}/status").read()
        blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
        if blocked >> (signal.SIGPIPE - 1) & 1:
            break
    found.append("controller")
send(found)
"""


def test_sends_to_peers_of_the_runtime_that_are_gone_are_errors() -> None:
    with Child(DEFAULT + PEERS) as child:
        assert child.receive() == ["rank", "node", "redis", "controller"]
