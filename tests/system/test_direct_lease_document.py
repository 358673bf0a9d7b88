"""docs/reference/protocol.md and docs/reference/memory-layout.md are enough to lease payloads in shared memory."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import protocol_client
import pytest
from transport_fixtures import Child, ring_of, serving
from waiting import wait_until

from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer
from dray.ring import slots as slots_module

CLIENT = Path(protocol_client.__file__)
SECRET = b"the job's secret"


def run_client(actions: str, *references: PayloadRef, options: tuple[str, ...] = ()) -> tuple[int, list[Any]]:
    """The exit status of a client on the shm lane in a process of its own, and what it printed."""
    lines = (ref.to_json() for ref in references)
    command = [sys.executable, str(CLIENT), "--lane", "shm", *options, actions, *lines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 3, 4, 5, 6), done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def outcomes(printed: list[Any]) -> list[tuple[str, bool]]:
    """Status, and whether the payload was leased directly."""
    return [(each["status"], each["direct"]) for each in printed]


def as_json(ref: PayloadRef) -> Any:
    return json.loads(ref.to_json())


@contextlib.contextmanager
def client_of(server: PayloadServer, **options: Any) -> Iterator[Any]:
    """A stand-alone client in this process."""
    address = next(each for each in server.endpoints if each.startswith("unix:"))
    client = protocol_client.Client(address, server.ring.producer_id, **options)
    with contextlib.closing(client):
        yield client


def read_one(client: Any, ref: PayloadRef, *, consume: bool = True) -> Any:
    (result,) = client.read([as_json(ref)], consume=consume)
    return result


# --- a client from the pages alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("direct", [True, False])
def test_the_client_reads_in_place_and_consumes_once(direct: bool, secret: bytes | None) -> None:
    options = ("--secret", secret.hex()) if secret else ()
    with serving("shm", secret=secret, direct=direct) as server:
        ref = server.put({"rewards": np.array([[1.5, -2.0, 3.25]], np.float32)})
        code, printed = run_client("read,take,take,consume", ref, options=options)
        assert code == 0
        assert outcomes(printed) == [("OK", direct), ("OK", direct), ("STALE", direct), ("STALE", direct)]
        expected = {"rewards": {"dtype": "F32", "shape": [1, 3], "values": [1.5, -2.0, 3.25]}}
        assert [each["tensors"] for each in printed[:2]] == [expected] * 2
        assert server.wait_consumed(ref, timeout=5)
        assert server.statistics().counters.reads == (0 if direct else 2)


def test_a_client_that_does_not_ask_for_direct_leases_gets_none() -> None:
    with serving("shm") as server:
        code, printed = run_client("take", server.put({"a": [1, 2]}), options=("--exchange",))
        assert (code, outcomes(printed)) == (0, [("OK", False)])
        assert ring_of(server).statistics().attachments == 0


@pytest.mark.parametrize("direct", [True, False])
def test_another_process_reads_every_payload_of_a_ring_that_wraps(direct: bool) -> None:
    count = 300
    with serving("shm", slots=4, slot_bytes=1 << 14, direct=direct) as server:
        command = [sys.executable, str(CLIENT), "--lane", "shm", "take", "-"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            lines: list[str] = []
            collecting = threading.Thread(target=lambda out=process.stdout: lines.extend(out))
            collecting.start()
            for number in range(count):  # `put` waits for the client: the ring has room for four
                ref = server.put({"numbers": np.full(1000, number, np.int64)})
                process.stdin.write(ref.to_json() + "\n")
            process.stdin.close()
            collecting.join(60)
            assert process.wait(60) == 0
        printed = [json.loads(line) for line in lines]
        assert outcomes(printed) == [("OK", direct)] * count
        assert [set(each["tensors"]["numbers"]["values"]) for each in printed] == [{n} for n in range(count)]
        wait_until(lambda: ring_of(server).statistics().consumed == count, "the last one to be consumed")
        assert (ring_of(server).statistics().barriers > 0) is direct


def test_leases_need_no_connection_and_an_attachment_outlives_it() -> None:
    with serving("shm") as server, client_of(server) as client:
        assert read_one(client, server.put({"a": [1]}))["direct"]
        client.disconnect()
        wait_until(lambda: server.statistics().open_connections == 0, "the connection to be closed")
        for number in range(10):
            result = read_one(client, server.put({"a": [number]}))
            assert (result["direct"], result["tensors"]["a"]["values"]) == (True, (number,))
        assert server.statistics().counters.connections == 1


def test_a_payload_for_two_readers_is_consumed_by_both_whichever_way_they_read() -> None:
    with (
        serving("shm", readers=2) as server,
        client_of(server, reader=0) as first,
        client_of(server, reader=1, direct=False) as second,
        client_of(server, reader=1) as third,
    ):
        ref = server.put({"a": [1]})
        assert read_one(first, ref)["status"] == "OK"
        assert read_one(first, ref) == {"status": "STALE", "direct": True}
        assert not server.wait_consumed(ref, timeout=0)
        (consumed,) = second.consume([as_json(ref)])
        assert (consumed["status"], consumed["direct"]) == ("OK", False)
        assert read_one(third, ref) == {"status": "STALE", "direct": True}
        assert server.wait_consumed(ref, timeout=5)


def test_a_reader_id_that_the_ring_does_not_have_gets_no_attachment() -> None:
    with serving("shm", readers=2) as server:
        code, printed = run_client("take", server.put({"a": [1]}), options=("--reader", "2"))
        assert (code, outcomes(printed)) == (0, [("DENIED", False)])


def test_a_process_under_another_kernel_gets_no_attachment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol_client, "kernel_digest", lambda: bytes(32))
    with serving("shm") as server, client_of(server) as client:
        assert read_one(client, server.put({"a": [1]}))["direct"] is False
        assert ring_of(server).statistics().attachments == 0


def test_a_process_gets_a_limited_number_of_attachments() -> None:
    with serving("shm") as server, contextlib.ExitStack() as opened:
        clients = [opened.enter_context(client_of(server)) for _ in range(17)]
        found = [read_one(client, server.put({"a": [1]}))["direct"] for client in clients]
        assert found == [True] * 16 + [False]


def test_a_wrong_size_is_an_error_and_what_never_was_is_stale() -> None:
    with serving("shm") as server, client_of(server) as client:
        ref = server.put({"a": [1, 2, 3]})
        assert read_one(client, dataclasses.replace(ref, nbytes=ref.nbytes + 1)) == {
            "status": "ERROR",
            "direct": True,
        }
        for wrong in ({"slot": 4}, {"sequence": 1}, {"sequence": 1 << 62}, {"sequence": (1 << 63) - 1}):
            assert read_one(client, dataclasses.replace(ref, **wrong)) == {"status": "STALE", "direct": True}
        assert read_one(client, ref)["status"] == "OK"


@pytest.mark.parametrize("direct", [True, False])
def test_a_payload_is_consumed_whatever_size_its_reference_has(direct: bool) -> None:
    with serving("shm") as server, client_of(server) as client, PayloadClient(direct=direct) as other:
        other.read(server.put({"a": [1]}), timeout=5)  # from here on it is attached, if it may be
        first, second = server.put({"a": [1]}), server.put({"a": [2]})
        (result,) = client.consume([as_json(dataclasses.replace(first, nbytes=first.nbytes + 1))])
        assert result == {"status": "OK", "direct": True}
        assert other.consume([dataclasses.replace(second, nbytes=second.nbytes + 1)]) == 1
        assert all(server.wait_consumed(ref, timeout=5) for ref in (first, second))


def test_an_overwritten_payload_is_stale_and_a_leased_one_is_not_overwritten() -> None:
    with (
        SharedRingBuffer(3, 4096, on_full="overwrite") as ring,
        PayloadServer(ring, lane="shm", threads=1) as server,
        client_of(server) as client,
    ):
        held, dropped, kept = (server.put({"a": [number]}) for number in range(3))
        attachment = client.attachment
        word = attachment.lease(held.slot, held.sequence, held.nbytes)
        new = server.put({"a": [3]})
        assert new.slot == dropped.slot
        assert read_one(client, dropped) == {"status": "STALE", "direct": True}
        view = attachment.segment.payload(held.slot, held.nbytes)
        assert protocol_client.tensors(view)["a"]["values"] == (0,)
        view.release()
        attachment.end(word, held.slot, held.sequence, consumed=True)
        assert read_one(client, kept)["tensors"]["a"]["values"] == (2,)
        assert read_one(client, new)["tensors"]["a"]["values"] == (3,)


def test_a_newest_value_can_be_read_again_and_an_older_one_is_stale() -> None:
    with (
        SharedRingBuffer(4, 4096, retain="newest") as ring,
        PayloadServer(ring, lane="shm", threads=1) as server,
        client_of(server) as client,
    ):
        old = server.put({"a": [1]})
        assert [read_one(client, old)["status"] for _ in range(3)] == ["OK"] * 3
        new = server.put({"a": [2]})
        assert read_one(client, old) == {"status": "STALE", "direct": True}
        assert read_one(client, new)["tensors"]["a"]["values"] == (2,)
        assert not any(client.attachment.board)


# --- where the server is asked ---------------------------------------------------------------------------------


def test_while_a_drop_is_undecided_the_server_is_asked() -> None:
    with serving("shm") as server, client_of(server) as client:
        read, taken = server.put({"a": [1]}), server.put({"a": [2]})
        direct = ring_of(server).direct()
        for ref in (read, taken):
            direct.suspect(ref.slot, ref.sequence)
        assert (read_one(client, read)["status"], read_one(client, taken)["direct"]) == ("OK", False)
        assert server.wait_consumed(taken, timeout=5)
        assert read_one(client, taken) == {"status": "STALE", "direct": True}


def test_with_all_lease_words_in_use_the_server_is_asked() -> None:
    with serving("shm", slots=8, max_leases=2) as server, client_of(server) as client:
        refs = [server.put({"a": [number]}) for number in range(4)]
        words = [client.attachment.lease(ref.slot, ref.sequence, ref.nbytes) for ref in refs[:2]]
        assert read_one(client, refs[2])["direct"] is False
        for word, ref in zip(words, refs, strict=False):
            client.attachment.end(word, ref.slot, ref.sequence, consumed=True)
        assert read_one(client, refs[3])["direct"] is True
        assert all(server.wait_consumed(ref, timeout=5) for ref in refs)


def test_the_end_of_a_lease_rings_for_a_producer_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "RESCAN_SECONDS", 60.0)  # only the doorbell can wake it in time
    with serving("shm", slots=1) as server, client_of(server) as client:
        ref = server.put({"a": [1]})
        word = client.attachment.lease(ref.slot, ref.sequence, ref.nbytes)
        putting = threading.Thread(target=lambda: server.put({"a": [2]}, timeout=30))
        putting.start()
        wait_until(lambda: client.attachment.control[client.attachment.slots] != 0, "the doorbell to be set")
        client.attachment.end(word, ref.slot, ref.sequence, consumed=True)
        putting.join(20)
        assert not putting.is_alive()
        assert ring_of(server).statistics().late_looks == 0


# --- ends ------------------------------------------------------------------------------------------------------


def test_an_attachment_ends_with_its_end_word_and_its_last_lease() -> None:
    with serving("shm") as server:
        ring = ring_of(server)
        ref = server.put({"a": [1]})
        with client_of(server) as client:
            attachment = client.attachment
            word = attachment.lease(ref.slot, ref.sequence, ref.nbytes)
        statistics = ring.statistics()
        assert (statistics.attachments, statistics.leases, statistics.reading) == (1, 1, 1)
        attachment.end(word, ref.slot, ref.sequence, consumed=True)
        assert server.wait_consumed(ref, timeout=5)
        assert ring.statistics().attachments == 0


def test_leases_of_a_process_end_with_it_and_what_it_consumed_stays_consumed() -> None:
    script = """
sys.path.append(arguments["tests"])
import protocol_client
client = protocol_client.Client(arguments["address"], bytes.fromhex(arguments["producer"]))
for ref in arguments["refs"]:
    word = client.attachment.lease(ref["s"], ref["q"], ref["n"])
client.attachment.board[ref["s"]] = ref["q"] + 1
send()
receive()
"""
    with serving("shm") as server:
        held, consumed = server.put({"a": [1]}), server.put({"a": [2]})
        address = next(each for each in server.endpoints if each.startswith("unix:"))
        refs = [as_json(held), as_json(consumed)]
        tests = str(CLIENT.parent)
        with Child(script, address=address, producer=held.producer.hex(), refs=refs, tests=tests) as child:
            child.receive()
            assert server.wait_consumed(consumed, timeout=5)
            leases = server.statistics().leases
            assert {(each.pid, each.slot) for each in leases} == {(child.pid, 0), (child.pid, 1)}
            child.kill()
            wait_until(lambda: ring_of(server).statistics().leases == 0, "its leases to end")
        statistics = ring_of(server).statistics()
        assert (statistics.ready, statistics.free, statistics.attachments) == (1, 3, 0)
        with PayloadClient() as client:
            assert client.read(held, timeout=5)["a"].tolist() == [1]


PRODUCER = """
from dray.transport import PayloadServer
ring = SharedRingBuffer(4, 4096)
server = PayloadServer(ring, lane="shm", threads=1)
send([server.put({"a": [number]}).to_json() for number in range(3)])
receive()
ring.close()
server.close()
send()
receive()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_after_the_end_of_the_producer_leases_stay_valid_and_none_begins(killed: bool) -> None:
    with Child(PRODUCER) as child:
        refs = [json.loads(text) for text in child.receive()]
        client = protocol_client.Client(refs[0]["e"][0], bytes.fromhex(refs[0]["p"]))
        held = refs[0]
        word = client.attachment.lease(held["s"], held["q"], held["n"])
        attachment = client.attachment
        if killed:
            child.kill()
        else:
            child.ask()
        wait_until(attachment.ended, "the end of the producer to be known")
        attachment.checked -= 1.0  # it is time to look again
        with pytest.raises(protocol_client.Refused) as refused:
            list(client.read([refs[1]], consume=True))
        assert refused.value.code == 6
        assert protocol_client.tensors(bytes(attachment.segment.payload(held["s"], held["n"])))["a"]["values"] == (
            0,
        )
        attachment.end(word, held["s"], held["q"], consumed=True)
        client.close()


def test_a_forked_child_of_the_client_has_none_of_its_memory() -> None:
    with serving("shm") as server, client_of(server) as client:
        assert read_one(client, server.put({"a": [1]}))["direct"]
        child = os.fork()
        if not child:
            maps = Path("/proc/self/maps").read_text(encoding="utf-8")
            os._exit("memfd:dray" in maps)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
