"""A process that has no descriptor left reads over another lane, or names the limit that it has reached."""

import errno
import pickle
from typing import Any

import pytest
from transport_fixtures import SERVER, Child

from dray import DrayError
from dray.clock import Deadline
from dray.errors import OutOfResources, TransportError
from dray.resources import check_descriptors, needing, out_of_resources
from dray.transport.attempts import Attempts, Latencies, Quarantine

LIMITED = """
import resource
refs = [PayloadRef.from_json(json.dumps(each)) for each in arguments["refs"]]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
def fill(left):
    held = []
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for _ in range(left):
        os.close(held.pop())
    return held
def outcome(call):
    try:
        return call()
    except DrayError as error:
        return [type(error).__name__, isinstance(error, OSError), error.retryable, str(error)]
def attempted(left, call):
    held = fill(left)
    try:
        return outcome(call)
    finally:
        for each in held:
            os.close(each)
def read(client, ref):
    client.read(ref, timeout=10, consume=False)
    return "read"
def make():
    with SharedRingBuffer(2, 1000) as ring, PayloadServer(ring, threads=1, lane=["shm", "tcp"]):
        return "made"
"""

READS = (
    LIMITED
    + """
first, second = refs
found = {}
for left in (0, 1):
    with PayloadClient() as client:
        found[f"read {left}"] = attempted(left, lambda: read(client, first))
        found[f"lanes {left}"] = client.statistics().reads_by_lane
        found[f"quarantined {left}"] = client.statistics().quarantined
with PayloadClient(lane="shm") as client:
    found["shm alone"] = attempted(1, lambda: read(client, first))
    found["shm later"] = read(client, first)
with PayloadClient() as client:
    def many():
        results = client.read_many(refs, timeout=10, consume=False, return_errors=True)
        return [type(each.outcome).__name__ for each in results]
    found["read_many"] = attempted(0, many)
with PayloadClient(lane="tcp") as client:
    read(client, first)
    found["idle"] = attempted(0, lambda: read(client, second))
    found["connects"] = client.statistics().connects
    found["given_up"] = client.statistics().connections_given_up
found["client"] = attempted(0, lambda: PayloadClient().close())
send(found)
"""
)

MAKES = (
    LIMITED
    + """
send([attempted(left, make) for left in range(12)])
"""
)

NAMED = "RLIMIT_NOFILE: soft limit 64, hard limit 64"


@pytest.fixture
def producers() -> Any:
    arguments = {"slots": 2, "slot_bytes": 100_000, "options": {"lane": ["shm", "tcp"], "threads": 1}}
    script = SERVER.replace(
        "server.put_bytes(pattern(seed, nbytes), timeout=20)", 'server.put({"a": np.zeros(nbytes)}, timeout=20)'
    )
    with Child(script, **arguments) as one, Child(script, **arguments) as other:
        for each in (one, other):
            each.receive()
        yield [each.ask([0, 5000]) for each in (one, other)]


def test_reads_without_descriptors_use_another_lane_or_name_the_limit(producers: Any) -> None:
    with Child(READS, refs=producers) as child:
        found = child.receive(60)
    for key in ("read 0", "shm alone", "client"):
        kind, is_os_error, retryable, text = found[key]
        assert (kind, is_os_error, retryable) == ("OutOfResources", True, True)
        assert NAMED in text
    assert (found["read 1"], found["lanes 1"]) == ("read", {"tcp": 1})
    assert found["quarantined 0"] == found["quarantined 1"] == []
    assert found["shm later"] == "read"
    assert found["read_many"] == ["OutOfResources"] * 2
    assert (found["idle"], found["connects"], found["given_up"]) == ("read", 2, 1)


def test_ring_and_server_that_find_no_descriptor_name_the_limit() -> None:
    with Child(MAKES, refs=[]) as child:
        outcomes = child.receive(60)
    made = outcomes.index("made")
    assert 3 < made < 12
    assert set(map(str, outcomes[made:])) == {"made"}
    for kind, _, _, text in outcomes[:made]:
        assert kind == "OutOfResources"
        assert NAMED in text


def test_the_other_lanes_are_tried_without_quarantine_where_one_is_out_of_resources() -> None:
    quarantine = Quarantine()
    attempts = Attempts(
        b"p" * 16,
        (("unix:/a", "unix:/b"), ("ucx:h:1",), ("tcp:h:1", "tcp:h:2")),
        Deadline.after(None),
        quarantine=quarantine,
        latencies=Latencies(),
    )
    error = OutOfResources("no room", errno.EMFILE, "Too many open files")
    tried = []
    for _ in range(3):
        tried.append(attempts.choose(0.0))
        last = attempts.fail(tried[-1], error, 0.0).final
    assert [each.partition(":")[0] for each in tried] == ["unix", "ucx", "tcp"]
    assert last is error
    assert quarantine.empty


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
def test_each_exhausted_resource_is_the_same_error_and_survives_pickling(number: int) -> None:
    with pytest.raises(OutOfResources) as caught, needing("a socket"):
        raise OSError(number, "out of something")
    error = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert isinstance(error, TransportError)
    assert isinstance(error, OSError)
    assert (error.errno, error.retryable, str(error)) == (number, True, str(caught.value))
    assert "a socket" in str(error)


def test_other_errors_of_the_system_stay_as_they_are() -> None:
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    assert out_of_resources(refused, "a socket") is None
    with pytest.raises(ConnectionRefusedError), needing("a socket"):
        raise refused


def test_fewer_descriptors_than_needed_are_named_before_they_are_opened() -> None:
    check_descriptors(1, "a worker")
    with pytest.raises(OutOfResources, match=r"a worker: it needs 1000000000 descriptors, \d+ are free"):
        check_descriptors(10**9, "a worker")
    assert issubclass(OutOfResources, DrayError)
