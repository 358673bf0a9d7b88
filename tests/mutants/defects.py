"""The defects that are planted, one at a time, to show that the model or the simulation finds them."""

from dataclasses import dataclass
from enum import Enum


class Search(Enum):
    """What looks for a defect."""

    MODEL = "model"
    SIMULATION = "simulation"


@dataclass(frozen=True)
class Defect:
    """One replacement in one file of `src/dray`.

    Attributes:
        name: what is wrong then.
        file: where.
        old: the text that is replaced; it is in the file once.
        new: what stands there instead.
        search: what must find it.
    """

    name: str
    file: str
    old: str
    new: str
    search: Search = Search.MODEL


TABLE = "ring/slots.py"
RING = "ring/ring.py"
SESSION = "protocol/server_session.py"
SERVED = "transport/served_connections.py"
CONNECTION = "transport/connection.py"
EXCHANGES = "transport/exchanges.py"
BATCH = "prefetch/batch.py"

DEFECTS = (
    # --- slots ----------------------------------------------------------------------------------------------
    Defect(
        "no sequence check in a read",
        TABLE,
        """\
        if slot.sequence != sequence or slot.over or slot.state is _WRITING or slot.consumed_by >> reader & 1:
            self._stale_reads += 1
""",
        """\
        if slot.over or slot.state is _WRITING or slot.consumed_by >> reader & 1:
            self._stale_reads += 1
""",
    ),
    Defect(
        "no sequence check in a copy",
        TABLE,
        """\
            if slot.sequence != sequence or slot.over or slot.state is _WRITING or slot.consumed_by >> reader & 1:
                self._stale_reads += 1
""",
        """\
            if slot.over or slot.state is _WRITING or slot.consumed_by >> reader & 1:
                self._stale_reads += 1
""",
    ),
    Defect(
        "no sequence check in a consume",
        TABLE,
        """\
        if slot.sequence != sequence or slot.over or slot.state is _WRITING or slot.consumed_by >> reader & 1:
            self._stale_consumes += 1
""",
        """\
        if slot.over or slot.state is _WRITING or slot.consumed_by >> reader & 1:
            self._stale_consumes += 1
""",
    ),
    Defect(
        "slot freed at the first finalise while another lease lives",
        TABLE,
        "        if slot.leases == 0 and slot.state is _READING:\n",
        "        if slot.state is _READING:\n",
    ),
    Defect(
        "consumed or retired payload freed under its leases",
        TABLE,
        "        if slot.leases == 0:\n            if slot.state is _READY:\n",
        "        if True:\n            if slot.state is _READY:\n",
    ),
    Defect(
        "overwrite takes a leased payload",
        TABLE,
        "next(slot for slot in self.live.values() if slot.state is _READY)",
        "next(slot for slot in self.live.values() if slot.state is not _WRITING)",
    ),
    Defect(
        "a reader that consumes twice counts twice",
        TABLE,
        "        slot.consumed_by |= 1 << reader\n",
        "        slot.consumed_by += 1 << reader\n",
    ),
    Defect(
        "free slots taken last in, first out",
        TABLE,
        "        self.free.append(slot)\n",
        "        self.free.appendleft(slot)\n",
    ),
    Defect(
        "checksum of the payload before",
        TABLE,
        "        slot.checksum = None\n        slot.consumed_by = 0\n",
        "        slot.consumed_by = 0\n",
    ),
    Defect(
        "waiting for a payload's end not woken",
        TABLE,
        "        slot.over = True\n        slot.wake()\n        if slot.leases",
        "        slot.over = True\n        if slot.leases",
    ),
    Defect(
        "a lease ended twice",
        RING,
        "            if lease.live and lease._core is core and not core.closed:\n",
        "            if lease._core is core and not core.closed:\n",
    ),
    Defect(
        "a lease ended by another ring",
        RING,
        "            if lease.live and lease._core is core and not core.closed:\n",
        "            if lease.live and not core.closed:\n",
    ),
    Defect(
        "waiting claim not woken by the end of a lease",
        RING,
        """\
                self._table.finish(lease._cell, lease.reader, consumed)
                self._table.changing = False
                if core.claimers:
                    core.claimable.notify()
""",
        """\
                self._table.finish(lease._cell, lease.reader, consumed)
                self._table.changing = False
""",
    ),
    Defect(
        "a lease ended while an array lives in its slot",
        "transport/in_place.py",
        "        root = alive() if self._in_place else None\n",
        "        root = None\n",
    ),
    # --- the server's end of a connection -------------------------------------------------------------------
    Defect(
        "consumed on local send completion, without ACK",
        SESSION,
        """\
        self._sending.clear()

    def close(self) -> None:
""",
        """\
        for request in self._sending:
            lease = self._leases[request]
            self._ring.consume(lease.slot, lease.sequence, lease.reader)
        self._sending.clear()

    def close(self) -> None:
""",
        Search.SIMULATION,
    ),
    Defect(
        "leases not returned when their connection closes",
        SESSION,
        """\
        for lease in leases.values():
            self._ring.release_reading(lease)
""",
        "        del leases\n",
        Search.SIMULATION,
    ),
    Defect(
        "leases consumed when their connection closes",
        SESSION,
        """\
        for lease in leases.values():
            self._ring.release_reading(lease)
""",
        """\
        for lease in leases.values():
            self._ring.mark_consumed(lease)
""",
        Search.SIMULATION,
    ),
    Defect(
        "a returned payload counts as consumed",
        SESSION,
        """\
            self._tally["acks_returned"] += 1
            self._ring.release_reading(lease)
""",
        "            self._ring.mark_consumed(lease)\n",
        Search.SIMULATION,
    ),
    Defect(
        "an inline payload that was returned counts as consumed",
        SESSION,
        """\
        if flags & Flag.CONSUMED:
            self._tally["acks_consumed"] += 1
            consumed.append(named)
""",
        "        consumed.append(named)\n        if flags & Flag.CONSUMED:\n            pass\n",
        Search.SIMULATION,
    ),
    Defect(
        "consumed inline payloads are not",
        SESSION,
        "                    self._ring.consume_many(consumed)\n",
        "                    pass\n",
        Search.SIMULATION,
    ),
    Defect(
        "a lease in place ended by a timer",
        SERVED,
        "        return self._settings.lease if connection.network else math.inf\n",
        "        return self._settings.lease\n",
        Search.SIMULATION,
    ),
    Defect(
        "a connection with leases is idle",
        SERVED,
        "        if not connection.session.leases:\n            return self._settings.idle\n",
        "        if connection.session.leases < 100:\n            return self._settings.idle\n",
        Search.SIMULATION,
    ),
    Defect(
        "leases returned while UCX still reads their slots",
        SERVED,
        "            if connection.stream.drained:\n                connection.session.close()\n",
        "            if True:\n                connection.session.close()\n",
        Search.SIMULATION,
    ),
    # --- the client's end -----------------------------------------------------------------------------------
    Defect(
        "a pooled connection returned after a failed exchange",
        EXCHANGES,
        """\
            except TransportError as error:
                self.discard(holder)
                self.failed(attempts, endpoint, ref.producer, error, deadline)
""",
        """\
            except TransportError as error:
                self.checkin(holder)
                self.failed(attempts, endpoint, ref.producer, error, deadline)
""",
        Search.SIMULATION,
    ),
    Defect(
        "deadline per step instead of per read",
        CONNECTION,
        """\
    if stream.idle():
        waiter.wait(stream, deadline, awaited, endpoint)
""",
        """\
    deadline = Deadline.after(deadline.at - deadline._started, deadline._clock)
    if stream.idle():
        waiter.wait(stream, deadline, awaited, endpoint)
""",
        Search.SIMULATION,
    ),
    Defect(
        "deadline per attempt instead of per read",
        EXCHANGES,
        """\
        attempts = self.plan(ref)
        while True:
            endpoint, status_by = self.choose(attempts, deadline)
""",
        """\
        attempts = self.plan(ref)
        while True:
            deadline = Deadline.after(deadline.at - deadline._started, self._clock)
            endpoint, status_by = self.choose(attempts, deadline)
""",
        Search.SIMULATION,
    ),
    Defect(
        "ACKs that may be lost are not sent again",
        EXCHANGES,
        "        lost = connection.unconfirmed\n        if lost:\n",
        "        lost = connection.unconfirmed\n        if not lost:\n",
        Search.SIMULATION,
    ),
    Defect(
        "ACKs of a window are forgotten when the next one fails",
        CONNECTION,
        "        lost = [*self._session.unconfirmed, *(request for request, consumed in ended if consumed)]\n",
        "        lost = self._session.unconfirmed\n",
        Search.SIMULATION,
    ),
    Defect(
        "another producer on the same address is not recognised",
        CONNECTION,
        "        if found.producer != producer:\n            raise OtherProducerError(\n",
        "        if False:\n            raise OtherProducerError(\n",
        Search.SIMULATION,
    ),
    Defect(
        "a copy of a slot is handed out although its lease may have ended",
        CONNECTION,
        """\
            if received.from_slot:
                self._session.forget(received.request)
                raise
""",
        "",
        Search.SIMULATION,
    ),
    Defect(
        "a failed endpoint is not quarantined",
        "transport/health.py",
        "            self._quarantine.failed(endpoint, now)\n",
        "            pass\n",
        Search.SIMULATION,
    ),
    # --- batches --------------------------------------------------------------------------------------------
    Defect(
        "results of a timed-out batch kept",
        BATCH,
        "        if self._closed:\n            return False\n",
        "",
        Search.SIMULATION,
    ),
    Defect(
        "retry of a stale reference in the next round",
        BATCH,
        "        if self._rounds > 1 and (outcome.retryable or refused):\n",
        "        if self._rounds > 1:\n",
        Search.SIMULATION,
    ),
    Defect(
        "retry of a stale reference in the same round",
        BATCH,
        "        return error.retryable and self._left > 0 and now < self._by\n",
        "        return self._left > 0 and now < self._by\n",
        Search.SIMULATION,
    ),
)
