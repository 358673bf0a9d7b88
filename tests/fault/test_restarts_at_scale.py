"""W9 between processes: UCX servers that start, serve and stop, over and over, while they are read from."""

import time
from collections import Counter

import pytest
from transport_fixtures import Child, Footprint

COUNTS = [
    pytest.param(12, id="short"),
    pytest.param(500, id="long", marks=[pytest.mark.endurance, pytest.mark.timeout(1800)]),
]
WARM_CYCLES = 8  # or a fifth of all: the reader's heap takes a while to find its shape
MAX_CLOSE_SECONDS = 5.0

CYCLES = """
import gc, threading
while (number := receive()) is not None:
    with SharedRingBuffer(3, 8 << 20) as ring:
        server = PayloadServer(ring, lane="ucx", threads=2, drain_timeout=0.05)
        sizes = (1000, 1 << 20, 8 << 20)
        send([json.loads(server.put_bytes(pattern(nbytes, nbytes)).to_json()) for nbytes in sizes])
        pause, limit = threading.Event(), Deadline.after(20)
        while server.statistics().counters.reads <= number % 7:
            assert not limit.expired, "no read arrived"
            pause.wait(0.001)
        connections = server.statistics().open_connections
        closing = Stopwatch()
        server.close()
        ended = closing.elapsed, connections, ring.statistics().leases
    gc.collect()
    send(ended)
"""

READERS = """
import collections, gc, threading
expected = {nbytes: np.frombuffer(pattern(nbytes, nbytes), np.uint8) for nbytes in (1000, 1 << 20, 8 << 20)}
while (asked := receive()) is not None:
    attempts, found = asked
    refs = [PayloadRef.from_json(json.dumps(each)) for each in found]
    outcomes = collections.Counter()
    with PayloadClient(lane="ucx", attempts=attempts) as client:

        def read(ref):
            try:
                while True:
                    data = client.read_bytes(ref, timeout=5, consume=False)
                    outcomes["read"] += 1
                    if not np.array_equal(data, expected[ref.nbytes]):
                        outcomes["wrong"] += 1
            except (ProducerLostError, TransportError) as error:
                outcomes[type(error).__name__] += 1

        threads = [threading.Thread(target=read, args=(ref,)) for ref in refs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    gc.collect()  # errors keep what was on the stack where they were raised
    send(outcomes)
"""


@pytest.mark.parametrize("count", COUNTS)
def test_w9_servers_that_stop_repeatedly_under_load_leave_nothing(count: int) -> None:
    began = time.monotonic()
    before: dict[str, Footprint] = {}
    outcomes: Counter[str] = Counter()
    longest = 0.0
    in_flight = 0
    with Child(CYCLES) as server, Child(READERS) as reader:
        processes = {"server": server, "reader": reader}
        for number in range(count):
            if number == max(WARM_CYCLES, count // 5):
                before = {name: Footprint.of(process.pid) for name, process in processes.items()}
            # A second attempt connects while the server stops; it fails after 1 s, when the kernel retries.
            reader.send([2 if number % 5 == 0 else 1, server.ask(number)])
            seconds, connections, leases = server.receive()
            assert seconds < MAX_CLOSE_SECONDS
            assert leases == 0
            longest = max(longest, seconds)
            in_flight += connections > 0
            outcomes += Counter(reader.receive())
            if number % 50 == 49:
                now = {name: Footprint.of(process.pid) for name, process in processes.items()}
                print(f"{number + 1} cycles in {time.monotonic() - began:.0f} s: {now}", flush=True)
        after = {name: Footprint.of(process.pid) for name, process in processes.items()}
        for process in processes.values():
            process.send()
            assert process.process.wait(30) == 0
    print(f"\n{count} cycles in {time.monotonic() - began:.1f} s, longest close {longest:.3f} s: {dict(outcomes)}")
    for name in before:
        print(f"{name}: {before[name]} after warm-up, {after[name]} at the end")
    assert in_flight == count
    assert outcomes["wrong"] == 0
    assert outcomes.total() - outcomes["read"] == 3 * count  # each reading thread has noticed each end
    for name, now in after.items():
        assert now.descriptors <= before[name].descriptors
        assert now.threads <= before[name].threads
        assert now.mappings <= before[name].mappings + 16
    # The reader's memory goes up and down by the payloads of its threads, of 8 MiB and kept by its allocator.
    assert after["server"].megabytes < before["server"].megabytes + 24
    assert after["reader"].megabytes < before["reader"].megabytes + 96
