"""Y6: a signal handler raises in the middle of a call; afterwards everything closes, and nothing is held."""

from typing import Any

import numpy as np
import pytest
from transport_fixtures import Child, counted, ring_of, serving
from waiting import wait_until

from dray import PayloadClient
from dray.errors import BufferClosedError

INTERRUPTED = """
import gc, random, signal, threading, time
class Interrupt(BaseException):
    pass
def interrupt(*_):
    raise Interrupt
signal.signal(signal.SIGALRM, interrupt)
sys.unraisablehook = lambda _: None  # exceptions that come while an object dies
rng = random.Random(7)
count = [0]
def interrupted(call, most):
    result = None
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, most))
            result = call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            time.sleep(0)  # gives the interpreter's lock away: CPython may handle a signal no earlier than that
    except Interrupt:
        count[0] += 1
    except (KeyError, RuntimeError):  # the block's own; the interpreter's, where it starts a thread
        pass
    return result
"""
"""Calls that a timer's handler ends at a random point."""

READS = (
    INTERRUPTED
    + """
refs = [PayloadRef.from_json(json.dumps(each)) for each in arguments["refs"]]
lane, most = arguments["lane"], arguments["most"]
def lease(client):
    with client.lease(refs[1], timeout=5) as arrays:
        arrays["a"].sum()
        raise KeyError
def first(client):
    for _ in client.read_many(refs, timeout=5, consume=False):
        break
calls = [
    lambda client: client.read(refs[0], timeout=5, consume=False),
    lambda client: list(client.read_many(refs, timeout=5, consume=False)),
    first,
    lease,
    lambda client: client.lease(refs[2], timeout=5),
]
with PayloadClient(lane=lane) as client:
    client.read(refs[0], consume=False)
def descriptors():
    return len(os.listdir("/proc/self/fd"))
def threads():
    return len(os.listdir("/proc/self/task"))
before, threads_before = descriptors(), threads()
clients = []
for number in range(arguments["rounds"]):
    client = PayloadClient(lane=lane)
    for _ in range(3):
        interrupted(lambda: calls[number % len(calls)](client), most)
    client.close()
    clients.append(client)  # what close() leaves open stays open
limit = Deadline.after(10)  # a lease whose array was in the frames of the exception ends in its thread
while (descriptors() > before or threads() > threads_before) and not limit.expired:
    time.sleep(0.002)
send([count[0], descriptors() - before, threads() - threads_before])
receive()
"""
)


def test_calls_that_a_signal_handler_ends_anywhere_leave_nothing_behind(lane: Any) -> None:
    with serving(lane, slots=8, slot_bytes=1 << 18) as server:
        refs = [server.put({"a": np.full(20_000, n)}) for n in range(6)]
        rounds, most = (12, 0.03) if lane == "ucx" else (120, 0.002)
        arguments = {"refs": [ref.to_json() for ref in refs], "lane": lane, "rounds": rounds, "most": most}
        with Child(READS.replace("json.dumps(each)", "each"), **arguments) as child:
            interrupts, descriptors, threads = child.receive(60)
            assert interrupts >= rounds // 2
            assert (descriptors, threads) == (0, 0)
            wait_until(lambda: server.statistics().open_connections == 0, "the connections to be closed")
            assert server.statistics().leases == ()
            child.send()
        with PayloadClient(lane=lane) as client:
            for n, result in enumerate(client.read_many(refs, timeout=10)):
                assert (result.payload["a"] == n).all()
        for ref in refs:
            assert server.wait_consumed(ref, timeout=5)
        assert ring_of(server).statistics().free == 8


PUTS = (
    INTERRUPTED
    + """
ring = SharedRingBuffer(8, 1 << 17)
server = PayloadServer(ring, lane=["tcp"], threads=1)
with PayloadClient() as client:
    for number in range(600):
        put = server.put_bytes if number % 2 else lambda data, timeout: server.put({"a": data}, timeout=timeout)
        data = pattern(number, 1000) if number % 2 else np.arange(5000)
        ref = interrupted(lambda: put(data, timeout=10), 2e-4)
        if ref is not None:
            client.consume([ref])
    gc.collect()
    found = server.statistics().ring
    send([count[0], found.free, found.claimed - found.aborted - found.committed])
server.close()
ring.close()
"""
)


def test_put_that_a_signal_handler_ends_anywhere_leaves_its_slot_free() -> None:
    with Child(PUTS) as child:
        interrupts, free, writing = child.receive(60)
    assert interrupts > 20
    assert (free, writing) == (8, 0)


def test_lease_that_is_gone_without_having_been_entered_is_released(lane: Any) -> None:
    with serving(lane, slots=1) as server, PayloadClient(lane=lane) as client:
        ref = server.put({"a": np.arange(5000)})
        lease = client.lease(ref, timeout=5)
        assert ring_of(server).statistics().leases == 1
        del lease
        wait_until(lambda: ring_of(server).get_ready_count() == 1, "the lease to end")
        assert client.read(ref, timeout=5)["a"].tolist() == list(range(5000))
        # The thread that ended the lease may not have given its connection back yet.
        assert client.statistics().connects <= 2


def test_closing_a_client_ends_what_no_thread_is_inside(lane: Any) -> None:
    with serving(lane, slots=4) as server:
        refs = [server.put({"a": np.arange(5000)}) for _ in range(4)]
        client = PayloadClient(lane=lane)
        lease = client.lease(refs[0], timeout=5)
        results = client.read_many(refs[1:], timeout=5)
        assert next(results).ref == refs[1]
        assert ring_of(server).statistics().leases >= 2
        client.close()
        wait_until(lambda: server.statistics().open_connections == 0, "the connections to be closed")
        with pytest.raises(BufferClosedError), lease:
            raise AssertionError("the block is not entered")
        with pytest.raises(BufferClosedError):
            next(results)
        # The payload that was handed out is consumed, the others are released.
        assert server.wait_consumed(refs[1], timeout=5)
        assert ring_of(server).get_ready_count() == 3


def test_arrays_that_were_handed_out_keep_their_slot_when_the_client_is_closed() -> None:
    with serving("shm", slots=1) as server:
        ref = server.put({"a": np.arange(5000)})
        client = PayloadClient()
        with client.lease(ref, timeout=5) as arrays:
            client.close()
            assert ring_of(server).statistics().leases == 1
            assert arrays["a"][-1] == 4999
        assert server.wait_consumed(ref, timeout=5)
        wait_until(lambda: server.statistics().open_connections == 0, "the connection to be closed")


def test_batch_that_an_exception_ends_releases_what_was_not_handed_out(lane: Any) -> None:
    with serving(lane, slots=4) as server, PayloadClient(lane=lane) as client:
        refs = [server.put({"a": np.arange(5000)}) for _ in range(4)]
        results = client.read_many(refs, timeout=5)
        next(results)
        with pytest.raises(KeyboardInterrupt):
            results.throw(KeyboardInterrupt())
        assert server.wait_consumed(refs[0], timeout=5)
        wait_until(lambda: ring_of(server).get_ready_count() == 3, "the others to be released")
        assert counted(server, "malformed") == 0
