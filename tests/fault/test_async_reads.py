"""Y3: reads of asyncio that are cancelled, many, or under way when their client is closed."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from transport_fixtures import SERVER, Child, reference, ring_of, serving
from waiting import wait_until

from dray import PayloadClient, PayloadRef
from dray.errors import BufferClosedError, StaleSlotError, TransportTimeout
from dray.transport import async_reads


@contextlib.contextmanager
def silent() -> Iterator[PayloadRef]:
    """A reference to a server that accepts connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield PayloadRef(b"p" * 16, 0, 0, 10, (f"tcp:127.0.0.1:{listener.getsockname()[1]}",))


SECRET = bytes(range(32))


def packed(number: int) -> list[int]:
    return [number, 40_000]


async def cancelled(client: PayloadClient, ref: PayloadRef, steps: int) -> bool:
    """Whether a read that is cancelled after so many steps of the event loop was received all the same."""
    reading = asyncio.ensure_future(client.read_async(ref, timeout=10))
    for _ in range(steps):
        await asyncio.sleep(0)
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading
        return True
    return False


@pytest.mark.parametrize("scheme", ["shm", "tcp"])
def test_no_payload_of_a_cancelled_read_is_lost(scheme: Any) -> None:
    with Child(
        "import numpy as np\n"
        + SERVER.replace(
            "server.put_bytes(pattern(seed, nbytes), timeout=20)",
            'server.put({"a": np.full(nbytes, seed)}, timeout=20)',
        ),
        slots=37,
        slot_bytes=1 << 19,
        secret=SECRET.hex(),
    ) as server:
        server.receive()
        refs = [reference(server.ask(packed(number))) for number in range(37)]
        with PayloadClient(lane=scheme, secret=SECRET) as client:

            async def read_all() -> list[bool]:
                return [await cancelled(client, ref, 3**n % 800) for n, ref in enumerate(refs)]

            received = asyncio.run(read_all())
            lost = 0
            for number, (ref, got) in enumerate(zip(refs, received, strict=True)):
                if not got:
                    try:
                        assert (client.read(ref, timeout=10)["a"] == number).all()
                    except StaleSlotError:
                        lost += 1
        assert lost == 0
        assert not all(received)
        wait_until(lambda: server.ask("statistics")["ring"]["free"] == 37, "all slots to be free")


def test_waiting_reads_leave_the_event_loops_threads_to_the_program() -> None:
    async def main(client: PayloadClient, ref: PayloadRef) -> None:
        reads = [asyncio.ensure_future(client.read_async(ref, timeout=30)) for _ in range(40)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.to_thread(int), 10) == 0
        client.close()
        ends = await asyncio.gather(*reads, return_exceptions=True)
        assert {type(each) for each in ends} == {BufferClosedError}

    with silent() as ref, PayloadClient(lane="tcp") as client:
        asyncio.run(main(client, ref))


def test_a_read_for_which_no_thread_gets_free_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_reads, "MAX_ASYNC_READS", 1)

    async def main(client: PayloadClient, ref: PayloadRef) -> None:
        first = asyncio.ensure_future(client.read_async(ref, timeout=60))
        await asyncio.sleep(0)
        with pytest.raises(TransportTimeout, match="no thread was free"):
            await client.read_async(ref, timeout=0.05)
        assert not first.done()
        client.close()
        with pytest.raises(BufferClosedError):
            await first

    with silent() as ref, PayloadClient(lane="tcp") as client:
        asyncio.run(main(client, ref))


def test_a_received_payload_is_consumed_unless_it_was_not_to_be(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane) as client:
        kept, consumed = (server.put({"a": list(range(3000))}) for _ in range(2))

        async def main() -> None:
            await client.read_async(kept, consume=False)
            found = await asyncio.gather(client.read_async(kept, consume=False), client.read_async(consumed))
            assert [json.dumps(each["a"].tolist()) for each in found] == [json.dumps(list(range(3000)))] * 2
            with pytest.raises(StaleSlotError):
                await client.read_async(consumed)

        asyncio.run(main())
        assert ring_of(server).get_ready_count() == 1
