"""C9, in the transport: closing a client ends what waits in other threads."""

import select
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from dray import BufferClosedError, PayloadClient, PayloadRef
from dray.clock import Deadline
from dray.transport.waiting import Wake


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
def test_c9_closing_a_client_ends_a_read_that_hangs(lane: Any, many: bool, tmp_path: Path) -> None:
    listener, endpoint = silent(lane, tmp_path)
    with listener:
        ref = PayloadRef(b"p" * 16, 0, 0, 10, (endpoint,))
        client = PayloadClient(lanes=lane)
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


def test_a_closed_wake_refuses_new_waits_and_may_be_closed_twice() -> None:
    wake = Wake()
    wake.close()
    wake.close()

    with pytest.raises(BufferClosedError):
        wake.wait(select.poll(), Deadline.after(10))
