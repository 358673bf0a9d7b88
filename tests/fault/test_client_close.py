"""Closing a client ends what waits in other threads, and repeats ACKs that may be lost."""

import contextlib
import dataclasses
import select
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from transport_fixtures import WatchedNetwork, has_ended
from waiting import wait_until

from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer
from dray.clock import Deadline
from dray.errors import BufferClosedError, ProducerLostError
from dray.transport.polling import CloseEvent


def silent(lane: str, folder: Path) -> tuple[socket.socket, str]:
    if lane == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
        return listener, f"tcp:127.0.0.1:{listener.getsockname()[1]}"
    listener = socket.socket(socket.AF_UNIX)
    path = folder / "s"
    listener.bind(str(path))
    listener.listen()
    return listener, f"unix:{path}"


@pytest.mark.parametrize("lane", ["tcp", "shm"])
@pytest.mark.parametrize("many", [False, True])
def test_closing_a_client_ends_a_read_that_hangs(lane: Any, many: bool, tmp_path: Path) -> None:
    listener, endpoint = silent(lane, tmp_path)
    with listener:
        ref = PayloadRef(b"p" * 16, 0, 0, 10, (endpoint,))
        client = PayloadClient(lane=lane)
        ended: list[BaseException] = []

        def read() -> None:
            try:
                if many:
                    list(client.read_many([ref], timeout=60))
                else:
                    client.read_bytes(ref, timeout=60)
            except BufferClosedError as error:
                ended.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(10)
            assert peer.recv(64)  # HELLO: from here on the client waits
            closing = Deadline.after(10)
            client.close()
            thread.join(closing.timeout)
            assert not thread.is_alive()
    assert [type(error) for error in ended] == [BufferClosedError]


class Swallowing:
    """Relays connections to a TCP port; of what each client sends, what follows the first `most` bytes is lost."""

    def __init__(self, port: int, most: int, at: int = 0) -> None:
        self._port = port
        self.most = most
        self.accepted = 0
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", at))
        self.endpoint = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def close(self) -> None:
        self.cut(self._listener)
        for thread in self._threads:
            thread.join()

    def cut(self, *others: socket.socket) -> None:
        """End every connection."""
        ends, self._ends = self._ends, []
        for sock in (*others, *ends):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _start(self, run: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=run, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [client, server]
                self._start(self._copy, client, server, self.most)
                self._start(self._copy, server, client, EVERYTHING)
                self.accepted += 1

    def _copy(self, source: socket.socket, target: socket.socket, most: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if most > 0:
                    target.sendall(data[:most])
                most -= len(data)
            target.shutdown(socket.SHUT_WR)


HELLO_PROOF = 64 + 32
HELLO_PROOF_READ = HELLO_PROOF + 64
EVERYTHING = 1 << 30


def test_an_ack_lost_on_a_connection_that_another_thread_uses_is_repeated_when_the_client_closes() -> None:
    with SharedRingBuffer(4, 1024) as ring, PayloadServer(ring, lane=["tcp"], threads=1) as server:
        port = int(server.endpoints[0].rpartition(":")[2])
        with contextlib.closing(Swallowing(port, HELLO_PROOF_READ)) as relay:
            refs = [dataclasses.replace(server.put_bytes(b"x"), endpoints=(relay.endpoint,)) for _ in range(2)]
            client = PayloadClient(lane="tcp")
            assert bytes(client.read_bytes(refs[0], timeout=10)) == b"x"
            ended: list[BaseException] = []

            def read() -> None:
                try:
                    client.read_bytes(refs[1], timeout=60)
                except BufferClosedError as error:
                    ended.append(error)

            reading = threading.Thread(target=read)
            reading.start()
            wait_until(lambda: client.statistics().idle_connections == 0, "the read to begin")
            client.close()
            reading.join(10)
            assert len(ended) == 1
            assert server.wait_consumed(refs[0], timeout=10)
            assert ring.statistics().ready == 1


def test_an_ack_lost_before_its_server_restarts_is_repeated_after_it() -> None:
    with SharedRingBuffer(4, 1024) as ring, PayloadServer(ring, lane=["tcp"], threads=1) as server:
        port = int(server.endpoints[0].rpartition(":")[2])
        with PayloadClient(lane="tcp", quarantine_seconds=0.001) as client:
            with contextlib.closing(Swallowing(port, HELLO_PROOF_READ)) as relay:
                first, second = (
                    dataclasses.replace(server.put_bytes(b"x"), endpoints=(relay.endpoint,)) for _ in range(2)
                )
                assert bytes(client.read_bytes(first, timeout=10)) == b"x"
            with pytest.raises(ProducerLostError):
                client.read_bytes(second, timeout=10)
            again = int(relay.endpoint.rpartition(":")[2])
            with contextlib.closing(Swallowing(port, EVERYTHING, at=again)):
                assert bytes(client.read_bytes(second, timeout=10)) == b"x"
                assert server.wait_consumed(first, timeout=10)
                client.close()


def test_a_client_that_closes_repeats_what_another_thread_was_about_to() -> None:
    with SharedRingBuffer(4, 1024) as ring, PayloadServer(ring, lane=["tcp"], threads=1) as server:
        port = int(server.endpoints[0].rpartition(":")[2])
        with contextlib.closing(Swallowing(port, HELLO_PROOF_READ)) as relay:
            first, second = (
                dataclasses.replace(server.put_bytes(b"x"), endpoints=(relay.endpoint,)) for _ in range(2)
            )
            network = WatchedNetwork()
            client = PayloadClient(lane="tcp", quarantine_seconds=0.001, network=network)
            assert bytes(client.read_bytes(first, timeout=10)) == b"x"
            relay.cut()
            relay.most = HELLO_PROOF
            wait_until(lambda: has_ended(network.streams[0]), "the end of the connection")

            def read() -> None:
                with contextlib.suppress(BufferClosedError, ConnectionError):
                    client.read_bytes(second, timeout=60)

            reading = threading.Thread(target=read)
            reading.start()
            wait_until(lambda: relay.accepted == 2 and client.statistics().connects == 2, "the CONSUME to hang")
            relay.most = EVERYTHING
            client.close()
            reading.join(10)
            assert not reading.is_alive()
            assert server.wait_consumed(first, timeout=10)
            assert ring.statistics().ready == 1


def test_a_closed_event_refuses_new_waits_and_may_be_closed_twice() -> None:
    event = CloseEvent()
    event.close()
    event.close()

    with pytest.raises(BufferClosedError):
        event.wait(select.poll(), Deadline.after(10))
