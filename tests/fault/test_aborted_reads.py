"""W1, W10: clients that abort UCX reads leave nothing behind, and touch no other connection's messages."""

import json
import time
from collections import Counter

import pytest
from transport_fixtures import SERVER, Child, Footprint
from waiting import wait_until

COUNTS = [
    pytest.param(600, id="short"),
    pytest.param(100_000, id="long", marks=[pytest.mark.endurance, pytest.mark.timeout(3600)]),
]
ROUND = 100
WARM_ROUNDS = 4
LASTING = (0, 1_000, 65_536, 1 << 20, 4 << 20)  # bytes of payloads that stay
PASSING = (1_000, 300_000)  # of those that each round puts, aborts reads of, reads and consumes
# UCX (1.21) keeps 336 bytes of every connection that was accepted until its worker ends, however it was closed.
KEPT_BY_UCX = 512 / 2**20

ABORTER = """
import collections, random
from dray.clock import Deadline
from dray.transport.lanes import UCX, Endpoint, parse_endpoint
from dray.protocol.handshake import ClientHandshake
from dray.protocol.frames import FRAME_BYTES

rng = random.Random(1)
expected = {}
aborted = collections.Counter()
worker = UcxWorker(True)
client = PayloadClient(lane="ucx")
neighbour = None  # another connection of the worker on which reads are aborted

def same(found, ref):
    return np.array_equal(found, np.frombuffer(expected[ref], np.uint8))

def payload(seed, found):
    ref = PayloadRef.from_json(json.dumps(found))
    expected[ref] = pattern(seed, ref.nbytes)
    return ref

def abort(ref, point):
    deadline = Deadline.after(20)
    if point == "hello":
        where = parse_endpoint(ref.endpoints[0])
        stream = UCX.connect(where, deadline, worker)
        stream.send([ClientHandshake(UCX, ref.producer).hello()])
        for _ in range(rng.randrange(3)):
            stream.flush()
            stream.idle()
        stream.close()
        return point
    connection = Connection.open(ref.endpoints[0], ref.producer, None, deadline, worker=worker)
    try:
        (target,) = connection.ask([ref], 0, deadline)
        if point in ("status", "payload"):
            while (message := connection._stream.receive(FRAME_BYTES)) is None:
                connection._wait(deadline, "STATUS")
            status = connection._session.receive(message).frame
            assert (status.status, status.nbytes) == (0, ref.nbytes)
        if point == "payload":
            for _ in range(rng.randrange(30)):
                worker._worker.progress_once()
            if connection._stream.payload_arrived(ref.nbytes):
                point = "payload, arrived"
        if point == "ack":
            held = connection.answer(target, deadline, deadline)
            assert same(held.data(), ref)
    finally:
        connection.close()
    return point

def read_beside(ref):
    '''On the worker of the aborted reads, and on one of its own.'''
    deadline = Deadline.after(20)
    (target,) = neighbour.ask([ref], 0, deadline)
    held = neighbour.answer(target, deadline, deadline)
    assert same(held.data(), ref)
    neighbour.acknowledge([(held.request, False)], deadline)
    if rng.random() < 0.2:
        assert same(client.read_bytes(ref, timeout=20, consume=False), ref)

lasting = [payload(*each) for each in hear()]
neighbour = Connection.open(lasting[0].endpoints[0], lasting[0].producer, None, Deadline.after(20), worker=worker)
say()
while (wanted := hear()) is not None:
    if wanted == "progress":
        worker.progress()
        say()
        continue
    passing = [payload(*each) for each in wanted["passing"]]
    for _ in range(wanted["aborts"]):
        point = rng.choice(("hello", "read", "status", "payload", "payload", "ack"))
        aborted[abort(rng.choice(lasting + passing), point)] += 1
        if rng.random() < 0.3:
            read_beside(rng.choice(lasting + passing))
    for ref in passing:
        assert same(client.read_bytes(ref, timeout=20), ref)
        del expected[ref]
        try:
            client.read_bytes(ref, timeout=20)
        except StaleSlotError:
            pass
        else:
            raise AssertionError(f"{ref} was consumed, and came again")
    say(aborted)
for ref in lasting:
    assert same(client.read_bytes(ref, timeout=20), ref)
neighbour.close()
worker.close()
client.close()
say()
"""


@pytest.mark.parametrize("count", COUNTS)
def test_w10_aborted_ucx_reads_leave_no_memory_and_reach_no_other_connection(count: int) -> None:
    """Aborted before READ, within the payload, before the ACK; every byte of the reads between is compared."""
    began = time.monotonic()
    options = {"lane": "ucx", "threads": 1}
    slots = len(LASTING) + len(PASSING)
    with Child(SERVER, slots=slots, slot_bytes=max(LASTING), options=options) as server, Child(ABORTER) as client:
        server.hear()
        client.ask([[seed, server.ask([seed, nbytes])] for seed, nbytes in enumerate(LASTING)])
        seed = len(LASTING)
        before: dict[str, Footprint] = {}
        aborted: Counter[str] = Counter()
        for number in range(count // ROUND):
            if number == WARM_ROUNDS:
                settle(server, client)
                before = {"server": Footprint.of(server.pid), "client": Footprint.of(client.pid)}
            passing = [[seed + each, server.ask([seed + each, nbytes])] for each, nbytes in enumerate(PASSING)]
            seed += len(PASSING)
            aborted = Counter(client.ask({"aborts": ROUND, "passing": passing}, 60))
            if number % 100 == 99:
                report(number, time.monotonic() - began, server, client)
        settle(server, client)
        after = {"server": Footprint.of(server.pid), "client": Footprint.of(client.pid)}
        statistics = server.ask("statistics")
        client.say()
        client.hear()
        client.process.wait(30)
        ended = server.ask("statistics")["ring"]
    print(f"\n{dict(aborted)} in {time.monotonic() - began:.1f} s")
    for name in before:
        print(f"{name}: {before[name]} after warm-up, {after[name]} at the end")
    assert aborted.total() == count
    assert min(aborted[point] for point in ("hello", "read", "status", "payload", "ack")) > count // 20
    for name in before:
        assert after[name].descriptors <= before[name].descriptors
        assert after[name].threads <= before[name].threads
    assert after["client"].megabytes < before["client"].megabytes + 24
    assert after["server"].megabytes < before["server"].megabytes + 24 + count * KEPT_BY_UCX
    assert statistics["ring"]["ready"] == len(LASTING)
    assert (statistics["ring"]["late_finalises"], statistics["server"]["malformed"]) == (0, 0)
    assert (ended["ready"], ended["leases"], ended["free"]) == (0, 0, slots)


def settle(server: Child, client: Child) -> None:
    """Until both have noticed every end: two connections stay, and no lease.

    Nobody drives the client's worker between two rounds, and a socket that the server opened to it for an aborted
    connection stays until somebody does.
    """

    def settled() -> bool:
        statistics = server.ask("statistics")
        return statistics["open_connections"] == 2 and not statistics["ring"]["leases"]

    wait_until(settled, "the ends of aborted reads to be noticed", 30)
    client.ask("progress")


def report(number: int, seconds: float, *processes: Child) -> None:
    sizes = ", ".join(json.dumps(Footprint.of(process.pid)) for process in processes)
    print(f"{(number + 1) * ROUND} aborted in {seconds:.0f} s: {sizes}", flush=True)
