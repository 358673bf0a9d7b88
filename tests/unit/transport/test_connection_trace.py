"""A connection reports its requests, answers, payloads and acknowledgements to a trace."""

from typing import Any

from transport_fixtures import serving

from dray.clock import Deadline
from dray.protocol.frames import Kind
from dray.protocol.frames import Status as Code
from dray.transport.connection import Connection, ReceivedPayload
from dray.transport.lanes.ucx_worker import UcxWorker
from dray.transport.trace import Acknowledgement, Payload, Request, Status, TraceEvent


def test_each_step_of_a_request_is_reported_in_order(lane: Any) -> None:
    events: list[TraceEvent] = []
    with serving(lane) as server:
        refs = [server.put_bytes(bytes(nbytes)) for nbytes in (10, 40_000)]
        deadline = Deadline.after(20)
        endpoint = refs[0].endpoints[0]
        worker = UcxWorker(True) if lane == "ucx" else None
        connection = Connection.open(
            endpoint, refs[0].producer, None, deadline, worker=worker, report=events.append
        )
        for ref in refs:
            received = connection.read(ref, 0, deadline, deadline, copy=True)
            assert isinstance(received, ReceivedPayload)
            connection.finish(received, True, deadline)
        refused = connection.read(refs[0], 0, deadline, deadline, copy=True)
        assert not isinstance(refused, ReceivedPayload)
        connection.stat(deadline)
        connection.close()
        if worker is not None:
            worker.close()
    expected: list[tuple[Any, ...]] = []
    for ref in refs:
        expected += [
            (Request, Kind.READ, ref.slot, ref.sequence, 0),
            (Status, Kind.READ, ref.slot, ref.sequence, Code.OK),
            (Payload, ref.slot, ref.sequence, ref.nbytes),
            (Acknowledgement, ref.slot, ref.sequence, 0, True),
        ]
    expected += [
        (Request, Kind.READ, refs[0].slot, refs[0].sequence, 0),
        (Status, Kind.READ, refs[0].slot, refs[0].sequence, Code.STALE),
        (Request, Kind.STAT, 0, 0, 0),
        (Status, Kind.STAT, 0, 0, Code.OK),
    ]
    assert [(type(event), *event[2:-1]) for event in events] == expected
    assert len({event[-1] for event in events}) == 1  # the connection
    assert {event.endpoint for event in events} == {endpoint}
    assert [event.at for event in events] == sorted(event.at for event in events)
