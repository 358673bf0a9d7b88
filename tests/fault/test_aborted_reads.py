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
import collections, random, select
from dray.transport.lanes import UCX, parse_endpoint
from dray.protocol.handshake import ClientHandshake
from dray.protocol.frames import FRAME_BYTES, Frame, Kind, Status, parse

rng = random.Random(1)
expected = {}
aborted = collections.Counter()
worker = UcxWorker(True)
client = PayloadClient(lane="ucx")
neighbour = None  # another connection of the worker on which reads are aborted

def same(found, ref):
    return np.array_equal(np.frombuffer(found, np.uint8), np.frombuffer(expected[ref], np.uint8))

def payload(seed, found):
    ref = PayloadRef.from_json(json.dumps(found))
    expected[ref] = pattern(seed, ref.nbytes)
    return ref

class Reader:
    def __init__(self, ref):
        self.requests = 0
        self.stream = UCX.connect(parse_endpoint(ref.endpoints[0]), Deadline.after(20), worker)
        self.handshake = ClientHandshake(UCX, ref.producer)
        self.stream.send([self.handshake.hello()])

    def connect(self):
        while not self.handshake.done:
            answer = self.handshake.receive(self.wait(lambda: self.stream.receive(self.handshake.expects)))
            if answer is not None:
                self.stream.send([answer])

    def wait(self, call):
        deadline = Deadline.after(20)
        while (found := call()) is None or found is False:
            assert not deadline.expired
            self.stream.flush()
            if self.stream.idle():
                select.select([self.stream.fileno()], [], [], 0.05)
        return found

    def request(self, ref):
        self.requests += 1
        self.target = bytearray(ref.nbytes)
        tag = self.stream.expect(memoryview(self.target))
        frame = Frame(Kind.READ, slot=ref.slot, sequence=ref.sequence, request=self.requests, tag=tag)
        self.stream.send([frame.pack()])

    def status(self, ref):
        status = parse(bytes(self.wait(lambda: self.stream.receive(FRAME_BYTES))))
        assert (status.status, status.nbytes) == (Status.OK, ref.nbytes)

    def payload(self, ref):
        self.wait(lambda: self.stream.payload_arrived(ref.nbytes))
        assert same(self.target, ref)

    def release(self, ref):
        ack = Frame(Kind.ACK, slot=ref.slot, sequence=ref.sequence, request=self.requests)
        self.stream.send([ack.pack()])

def abort(ref, point):
    reader = Reader(ref)
    stream = reader.stream
    try:
        if point == "hello":
            for _ in range(rng.randrange(3)):
                stream.flush()
                stream.idle()
            return point
        reader.connect()
        reader.request(ref)
        if point != "read":
            reader.status(ref)
        if point == "payload":
            for _ in range(rng.randrange(30)):
                worker.progress(1)
            if stream.payload_arrived(ref.nbytes):
                point = "payload, arrived"
        if point == "ack":
            reader.payload(ref)
    finally:
        stream.close()
    return point

def read_beside(ref):
    '''On the worker of the aborted reads, and on one of its own.'''
    neighbour.request(ref)
    neighbour.status(ref)
    neighbour.payload(ref)
    neighbour.release(ref)
    if rng.random() < 0.2:
        assert same(client.read_bytes(ref, timeout=20, consume=False), ref)

lasting = [payload(*each) for each in receive()]
neighbour = Reader(lasting[0])
neighbour.connect()
send()
while (wanted := receive()) is not None:
    if wanted == "progress":
        worker.progress()
        send()
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
    send(aborted)
for ref in lasting:
    assert same(client.read_bytes(ref, timeout=20), ref)
neighbour.stream.close()
worker.close()
client.close()
send()
"""


@pytest.mark.parametrize("count", COUNTS)
def test_w10_aborted_ucx_reads_leave_no_memory_and_reach_no_other_connection(count: int) -> None:
    """Aborted before READ, within the payload, before the ACK; every byte of the reads between is compared."""
    began = time.monotonic()
    options = {"lane": "ucx", "threads": 1}
    slots = len(LASTING) + len(PASSING)
    with Child(SERVER, slots=slots, slot_bytes=max(LASTING), options=options) as server, Child(ABORTER) as client:
        server.receive()
        client.ask([[seed, server.ask([seed, nbytes])] for seed, nbytes in enumerate(LASTING)])
        seed = len(LASTING)
        before: dict[str, Footprint] = {}
        aborted: Counter[str] = Counter()
        for number in range(count // ROUND):
            if number == WARM_ROUNDS:
                wait_for_ends(server, client)
                before = {"server": Footprint.of(server.pid), "client": Footprint.of(client.pid)}
            passing = [[seed + each, server.ask([seed + each, nbytes])] for each, nbytes in enumerate(PASSING)]
            seed += len(PASSING)
            aborted = Counter(client.ask({"aborts": ROUND, "passing": passing}, 60))
            if number % 100 == 99:
                report(number, time.monotonic() - began, server, client)
        wait_for_ends(server, client)
        after = {"server": Footprint.of(server.pid), "client": Footprint.of(client.pid)}
        statistics = server.ask("statistics")
        client.send()
        client.receive()
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


def wait_for_ends(server: Child, client: Child) -> None:
    """Wait until both have noticed every end: two connections stay, and no lease.

    The client's worker makes no progress between two rounds, and sockets that the server opened to it for aborted
    connections stay until it does.
    """

    def all_ended() -> bool:
        statistics = server.ask("statistics")
        return statistics["open_connections"] == 2 and not statistics["ring"]["leases"]

    wait_until(all_ended, "the ends of aborted reads to be noticed", 30)
    client.ask("progress")


def report(number: int, seconds: float, *processes: Child) -> None:
    sizes = ", ".join(json.dumps(Footprint.of(process.pid)) for process in processes)
    print(f"{(number + 1) * ROUND} aborted in {seconds:.0f} s: {sizes}", flush=True)
