"""B1 under load: references redeemed late, while other processes read and the writers reuse every slot."""

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transport_fixtures import LANES, Child
from waiting import wait_until

COUNTS = [
    pytest.param(1_000, id="short"),
    pytest.param(50_000, id="long", marks=[pytest.mark.endurance, pytest.mark.timeout(1200)]),
]
"""Redemptions for each lane and each of the two rings: 2,000 and 100,000 for each lane."""

SLOTS = 16
READERS = 2

PAYLOADS = """
import random, socket, struct
from dray.payload.codec import pack, plan
REFERENCE = struct.Struct("<IQQ")
def arrays(sequence):
    '''The payload of a sequence number: every byte of it follows from that number alone.'''
    most = 8000 if sequence % 16 == 0 else 500
    words = np.arange(1, 2 + (sequence * 2654435761 >> 7) % most, dtype=np.uint64)
    words *= np.uint64((2 * sequence + 1) * 0x9E3779B97F4A7C15 % 2**64)
    return {"sequence": np.array([sequence], np.uint64), "words": words}
"""

WRITER = (
    PAYLOADS
    + """
import collections, threading
sys.setswitchinterval(1e-4)  # server threads come to their turn between two payloads, and within one
block = arguments["on_full"] == "block"  # then no reference is lost, else readers begin with the newest ones
ring = SharedRingBuffer(arguments["slots"], 1 << 16, on_full=arguments["on_full"])
server = PayloadServer(ring, lane=arguments["lane"], threads=2, drain_timeout=0.5)
published = threading.Condition()
feeds = [collections.deque(maxlen=None if block else 4) for _ in range(arguments["readers"])]
stopping = False

def write():
    while not stopping:
        try:
            claimed = ring.claim(ring.slot_bytes, 0.1)
        except BufferFullError:
            continue
        with claimed as slot:
            planned = plan(arrays(slot.sequence))
            planned.write(slot.buffer)
            slot.commit(planned.nbytes)
        with published:
            for feed in feeds:
                feed.append((slot.slot, slot.sequence, planned.nbytes))
            published.notify_all()

def announce(connection, feed):
    '''Answers each request with the references that are new, b"w" once there is one.'''
    while (wanted := connection.recv(1)):
        with published:
            if wanted == b"w":
                published.wait_for(lambda: feed, 30)
            new = [feed.popleft() for _ in range(min(len(feed), 64))]
        connection.send(b"+" + b"".join(REFERENCE.pack(*each) for each in new))

listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(arguments["path"])
listener.listen()
send([ring.producer_id.hex(), server.endpoints])
connections = [listener.accept()[0] for _ in feeds]
threads = [threading.Thread(target=announce, args=each) for each in zip(connections, feeds)]
threads += [threading.Thread(target=write) for _ in range(2)]
for thread in threads:
    thread.start()
receive()
stopping = True
for thread in threads:
    thread.join(30)
send()
while receive() == "statistics":
    send(server.statistics().to_dict())
server.close()
"""
)

READER = (
    PAYLOADS
    + """
import collections
rng = random.Random(arguments["seed"])
source = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
source.connect(arguments["path"])
producer, endpoints = bytes.fromhex(arguments["producer"]), tuple(arguments["endpoints"])
held = []
outcomes = collections.Counter()

def ask(wait):
    source.send(b"w" if wait else b"n")
    return [PayloadRef(producer, *each, endpoints) for each in REFERENCE.iter_unpack(source.recv(4096)[1:])]

def check(ref, found):
    expected = arrays(ref.sequence)
    assert found["sequence"].tolist() == [ref.sequence]
    assert np.array_equal(found["words"], expected["words"]), ref

def pick():
    return held.pop(rng.randrange(len(held)))

def redeem(ref):
    how = rng.choices(("read", "keep", "lease", "batch"), (5, 1, 2, 2))[0]
    try:
        if how == "read":
            assert bytes(client.read_bytes(ref, timeout=30)) == pack(arrays(ref.sequence))
        elif how == "keep":
            check(ref, client.read(ref, timeout=30, consume=False))
            held.append(ref)
        elif how == "lease":
            with client.lease(ref, timeout=30) as found:
                check(ref, found)
                for _ in range(rng.randrange(4)):
                    if held:
                        redeem(pick())
                check(ref, found)
        else:
            batch = [ref] + [pick() for _ in range(min(len(held), 3))]
            for result in client.read_many(batch, timeout=30, return_errors=True):
                if isinstance(result.error, StaleSlotError):
                    outcomes["stale"] += 1
                else:
                    check(result.ref, result.payload)
                    outcomes[how] += 1
            return
    except StaleSlotError:
        outcomes["stale"] += 1
    else:
        outcomes[how] += 1

with PayloadClient(lane=arguments["lane"]) as client:
    while outcomes.total() < arguments["count"]:
        new = ask(wait=not held)
        held += new
        hold = rng.randrange(arguments["max_held"])
        while held and (len(held) > hold or not new):
            new = True
            redeem(pick())
    source.close()
    send([outcomes, client.statistics().retries])
    receive()
"""
)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("on_full", ["overwrite", "block"])
@pytest.mark.parametrize("lane", LANES)
def test_b1_a_late_reference_gives_its_own_payload_or_stale(lane: str, on_full: str, count: int) -> None:
    """Readers hold each reference for a random number of others, and compare every byte that they get."""
    path = Path(os.environ["DRAY_RUNTIME_DIR"]) / f"feed-{lane}-{on_full}"
    began = time.monotonic()
    with Child(WRITER, lane=lane, on_full=on_full, slots=SLOTS, readers=READERS, path=str(path)) as writer:
        producer, endpoints = writer.receive()
        common: dict[str, Any] = {"lane": lane, "path": str(path), "producer": producer, "endpoints": endpoints}
        share = {"count": count // READERS, "max_held": SLOTS}
        with Child(READER, seed=1, **common, **share) as one, Child(READER, seed=2, **common, **share) as other:
            found = [reader.receive(1000) for reader in (one, other)]
            for reader in (one, other):
                reader.send()
                reader.process.wait(30)
        writer.ask()
        wait_until(lambda: writer.ask("statistics")["open_connections"] == 0, "the readers' ends to be noticed")
        statistics = writer.ask("statistics")
    path.unlink()
    outcomes = sum((Counter(each) for each, _ in found), Counter())
    ring, server = statistics["ring"], statistics["server"]
    print(f"{lane} {on_full}: {dict(outcomes)} of {ring['committed']} in {time.monotonic() - began:.1f} s")
    assert outcomes.total() >= count
    # Both answers come often enough to mean something.
    read = outcomes.total() - outcomes["stale"]
    assert min(read, outcomes["stale"]) > count // 100
    assert [retries for _, retries in found] == [0, 0]
    assert (server["malformed"], server.get("failed_connections", 0)) == (0, 0)
    assert (ring["leases"], ring["late_finalises"]) == (0, 0)
    dropped = ring["dropped_unread"] + ring["dropped_delivered"]
    assert (dropped > 0) == (on_full == "overwrite")
