import dataclasses
import json

import pytest
from transport_fixtures import serving

from dray import PayloadClient
from dray.errors import Unreachable
from dray.protocol.frames import VERSION
from dray.ring.attachment import Attachment
from dray.ring.direct import direct_problem
from dray.transport.direct_reads import DirectReads
from dray.transport.trace import (
    Attempt,
    Checkin,
    Checkout,
    Connect,
    Discard,
    FailedAttempt,
    SuccessfulAttempt,
    TraceEvent,
)

CONNECTIONS = Attempt | Checkin | Checkout | Connect | Discard | FailedAttempt | SuccessfulAttempt


def test_trace_reports_how_two_reads_use_one_connection() -> None:
    events: list[TraceEvent] = []
    with serving("tcp") as server:
        with PayloadClient(lane="tcp", trace=events.append) as client:
            ref = server.put_bytes(b"payload")
            for _ in range(2):
                client.read_bytes(ref, timeout=5, consume=False)
        seen = [event for event in events if isinstance(event, CONNECTIONS)]
        use = [Checkout, SuccessfulAttempt, Checkin]
        assert [type(event) for event in seen] == [Attempt, Connect, *use, Attempt, *use, Discard]
        assert {event.endpoint for event in events} == set(server.endpoints)
    assert [event.at for event in events] == sorted(event.at for event in events)
    assert [event.version for event in seen if isinstance(event, Connect)] == [VERSION]
    assert [event.producer for event in seen if isinstance(event, Attempt)] == [ref.producer] * 2
    first, second = (event.idle for event in seen if isinstance(event, Checkout))
    assert first is None
    assert second is not None
    (discard,) = (event for event in seen if isinstance(event, Discard))
    assert discard.error is None
    assert (
        len({event.connection for event in seen if isinstance(event, Connect | Checkout | Checkin | Discard)}) == 1
    )


def test_trace_and_statistics_report_a_failed_attempt_and_the_one_that_follows() -> None:
    events: list[TraceEvent] = []
    with (
        serving("shm") as server,
        PayloadClient(lane=("shm", "tcp"), quarantine_seconds=7.0, trace=events.append) as client,
    ):
        ref = server.put_bytes(b"payload")
        (endpoint,) = server.endpoints
        folder = endpoint.rpartition("/")[0]
        absent = f"{folder}/absent.sock"
        ref = dataclasses.replace(ref, endpoints=(absent, endpoint))
        for _ in range(2):
            client.read_bytes(ref, timeout=5, consume=False)
        statistics = client.statistics()
    (failed,) = (event for event in events if isinstance(event, FailedAttempt))
    assert (failed.endpoint, failed.quarantine, failed.following) == (absent, 7.0, endpoint)
    assert isinstance(failed.error, Unreachable)
    assert (statistics.retries, statistics.retries_by_cause) == (1, {"unreachable": 1})
    assert (statistics.quarantined, statistics.connects, statistics.idle_connections) == ((absent,), 1, 1)
    assert (statistics.reads, statistics.bytes, statistics.reads_by_lane) == (2, 14, {"shm": 2})
    assert json.loads(json.dumps(dataclasses.asdict(statistics)))["reads"] == 2


@pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")
def test_a_connection_that_an_exception_interrupts_before_its_attachment_is_used_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[TraceEvent] = []

    def interrupted(_: DirectReads, attachment: Attachment) -> None:
        raise KeyboardInterrupt

    with serving("shm") as server, PayloadClient(trace=events.append) as client:
        ref = server.put_bytes(b"payload")
        with monkeypatch.context() as patched:
            patched.setattr(DirectReads, "add", interrupted)
            with pytest.raises(KeyboardInterrupt):
                client.read_bytes(ref)
        seen = [type(event) for event in events if isinstance(event, CONNECTIONS)]
        assert seen == [Attempt, Connect, Discard]
        assert client.read_bytes(ref).tobytes() == b"payload"
