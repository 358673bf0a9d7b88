"""The defects that are planted, one at a time, to show that the model or the simulation finds them."""

from dataclasses import dataclass
from enum import Enum


class Search(Enum):
    """What searches for a defect."""

    MODEL = "model"
    SIMULATION = "simulation"


@dataclass(frozen=True)
class Defect:
    """Replacements in one file of `src/dray`.

    Attributes:
        name: the defect.
        file: the file.
        old: the text that is replaced; it is in the file once.
        new: the text in its place.
        search: what must find it.
        more: further texts that are replaced, and what stands in their place.
    """

    name: str
    file: str
    old: str
    new: str
    search: Search = Search.MODEL
    more: tuple[tuple[str, str], ...] = ()

    def plant(self, source: str) -> str:
        """The source with the defect in it.

        Raises:
            ValueError: a text that is to be replaced is not in the source once.
        """
        for old, new in ((self.old, self.new), *self.more):
            if source.count(old) != 1:
                raise ValueError(f"{self.name}: a text is in {self.file} {source.count(old)} times: {old}")
            source = source.replace(old, new)
        return source


TABLE = "ring/slots.py"
LEASE = "ring/lease.py"
ATTACHMENT = "ring/attachment.py"
SERVED = "transport/served_connection.py"
LOOP = "transport/served_connections.py"
CONNECTION = "transport/connection.py"
CONNECTIONS = "transport/connections.py"
BATCH = "prefetch/batch.py"
DELIVERY = "streams/delivery.py"

DEFECTS = (
    # --- slots ----------------------------------------------------------------------------------------------
    Defect(
        "no sequence check in a read",
        TABLE,
        """\
        if self.is_stale(slot, sequence, reader):
            self._stale_reads += 1
            raise""",
        """\
        if self.is_stale(slot, slot.sequence, reader):
            self._stale_reads += 1
            raise""",
    ),
    Defect(
        "no sequence check in a copy",
        TABLE,
        """\
            if self.is_stale(slot, sequence, reader):
                self._stale_reads += 1
                found""",
        """\
            if self.is_stale(slot, slot.sequence, reader):
                self._stale_reads += 1
                found""",
    ),
    Defect(
        "no sequence check in a consume",
        TABLE,
        "        stale = self.is_stale(slot, sequence, reader)\n",
        "        stale = self.is_stale(slot, slot.sequence, reader)\n",
    ),
    Defect(
        "slot freed at the end of the first of two leases",
        TABLE,
        "        if slot.leases == 0 and slot.state is _READING:\n",
        "        if slot.state is _READING:\n",
    ),
    Defect(
        "consumed or retired payload freed under its leases",
        TABLE,
        "        if slot.leases == 0:\n            self._vacate(slot)\n",
        "        if True:\n            self._vacate(slot)\n",
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
        "free slots claimed last in, first out",
        TABLE,
        "        self.free.append(slot)\n",
        "        self.free.appendleft(slot)\n",
    ),
    Defect(
        "checksum of the previous payload in the slot",
        TABLE,
        "        slot.checksum = None\n        slot.consumed_by = 0\n",
        "        slot.consumed_by = 0\n",
    ),
    Defect(
        "waiting for the retirement of a payload not woken",
        TABLE,
        "            self.direct.retire(slot.index)\n        slot.wake()\n        if slot.leases",
        "            self.direct.retire(slot.index)\n        if slot.leases",
    ),
    Defect(
        "a lease ended twice",
        LEASE,
        "            if self.live and not table.closed:\n",
        "            if not table.closed:\n",
    ),
    Defect(
        "waiting claim not woken by the end of a lease",
        TABLE,
        """\
                self._refresh(slot)
        self.changing = False
        self.notify_claims()
""",
        """\
                self._refresh(slot)
        self.changing = False
""",
    ),
    Defect(
        "a lease ended while an array in its slot exists",
        "transport/leases.py",
        "        root = alive() if self._in_place else None\n",
        "        root = None\n",
    ),
    # --- direct leases --------------------------------------------------------------------------------------
    Defect(
        "barrier left out",
        "ring/ring.py",
        "                passed = direct.barriers.pass_one()\n",
        "                passed = True\n",
        Search.SIMULATION,
    ),
    Defect(
        "generation cleared after the scan",
        TABLE,
        "            self.direct.retire(slot.index)\n        slot.wake()\n",
        "            pass\n        slot.wake()\n",
        Search.SIMULATION,
        (
            (
                "                del self.due[slot]\n                slot.words = 0\n",
                """\
                del self.due[slot]
                self.direct.retire(slot.index)
                slot.words = 0
""",
            ),
        ),
    ),
    Defect(
        "lease word cleared before the copy",
        "transport/client.py",
        """\
        payload = unpack_as(self._direct.copy(lease, selection))
        self._direct.end(lease, consume)
""",
        """\
        self._direct.end(lease, consume)
        payload = unpack_as(self._direct.copy(lease, selection))
""",
        Search.SIMULATION,
    ),
    Defect(
        "board written after the lease word",
        ATTACHMENT,
        "                self._board[lease.slot * self._readers + self._reader] = lease.sequence + 1\n",
        """\
                self._page[word] = 0
                self._board[lease.slot * self._readers + self._reader] = lease.sequence + 1
""",
        Search.SIMULATION,
    ),
    Defect(
        "board ignored by a network lane",
        TABLE,
        """\
        if self.direct is not None and not slot.consumed_by >> reader & 1:
            self._learn(slot, (reader,))
""",
        "",
        Search.SIMULATION,
    ),
    Defect(
        "generation 0 while a drop is undecided",
        "ring/direct.py",
        "        self._generations[slot] = (sequence + 1) | RETIRING\n",
        "        self._generations[slot] = 0\n",
        Search.SIMULATION,
    ),
    Defect(
        "a direct lease ended twice",
        ATTACHMENT,
        "            if ender.setdefault(0, mine) is not mine:\n                return False\n",
        "            ender[0] = mine\n",
        Search.SIMULATION,
    ),
    Defect(
        "an attachment ended by its socket",
        SERVED,
        "            self._attached.page.close_descriptor()\n            self._attached = None\n",
        """\
            self._attached.page.close_descriptor()
            self._made, self._attached = self._attached, None
""",
        Search.SIMULATION,
        (
            (
                "        self.session.close()\n",
                """\
        self.session.close()
        with contextlib.suppress(BufferClosedError):
            made, direct = getattr(self, "_made", None), self._ring.direct()
            if made is not None and made.process.fileno() in direct.attached:
                direct._remove(made)
""",
            ),
        ),
    ),
    # --- the server's end of a connection -------------------------------------------------------------------
    Defect(
        "consumed on local send completion, without ACK",
        SERVED,
        """\
        self.session.flushed()
        if self._attached is not None:
""",
        """\
        for request in self.session.sending:
            lease = self._leases[request]
            self._ring.consume(lease.slot, lease.sequence, lease.reader)
        self.session.flushed()
        if self._attached is not None:
""",
        Search.SIMULATION,
    ),
    Defect(
        "leases not returned when their connection closes",
        SERVED,
        """\
            lease.release()
            if self._trace is not None:
""",
        "            if self._trace is not None:\n",
        Search.SIMULATION,
    ),
    Defect(
        "leases consumed when their connection closes",
        SERVED,
        """\
            lease.release()
            if self._trace is not None:
""",
        """\
            lease.acknowledge()
            if self._trace is not None:
""",
        Search.SIMULATION,
    ),
    Defect(
        "a returned payload counts as consumed",
        SERVED,
        "                            self._leases.pop(request).release()\n",
        "                            self._leases.pop(request).acknowledge()\n",
        Search.SIMULATION,
    ),
    Defect(
        "an inline payload that was returned counts as consumed",
        SERVED,
        """\
                        counts["acks_returned"] += 1
                        if of == "lease":
""",
        """\
                        if of == "copy":
                            consumed.append(payload)
                        if of == "lease":
""",
        Search.SIMULATION,
    ),
    Defect(
        "consumed inline payloads are not",
        SERVED,
        "                    self._ring.consume_many(consumed)\n",
        "                    pass\n",
        Search.SIMULATION,
    ),
    Defect(
        "a lease in place ended by a timer",
        SERVED,
        "        return math.inf if self.stream.lane.local else self._service.lease_timeout\n",
        "        return self._service.lease_timeout\n",
        Search.SIMULATION,
    ),
    Defect(
        "a connection with leases treated as idle",
        SERVED,
        "        if not self._leases:\n            return self._service.idle_timeout\n",
        "        if len(self._leases) < 100:\n            return self._service.idle_timeout\n",
        Search.SIMULATION,
    ),
    Defect(
        "leases released while UCX still reads their slots",
        LOOP,
        "            if connection.stream.drained:\n                self._forget(connection)\n",
        "            if True:\n                self._forget(connection)\n",
        Search.SIMULATION,
    ),
    # --- the client's end -----------------------------------------------------------------------------------
    Defect(
        "a pooled connection returned after a failed exchange",
        CONNECTIONS,
        """\
                        connection = None
                        self.discard(holder, error)
""",
        """\
                        connection = None
                        self.checkin(holder)
""",
        Search.SIMULATION,
    ),
    Defect(
        "deadline per step instead of per read",
        CONNECTION,
        """\
        self._waiter.wait(self._stream, deadline, awaited, self.endpoint)
""",
        """\
        deadline = Deadline.after(deadline.at - deadline._started, deadline._clock)
        self._waiter.wait(self._stream, deadline, awaited, self.endpoint)
""",
        Search.SIMULATION,
    ),
    Defect(
        "deadline per attempt instead of per read",
        CONNECTIONS,
        """\
                        attempts.begin(now)
""",
        """\
                        whole = attempts.deadline
                        attempts.deadline = Deadline.after(whole.at - whole._started, self._clock)
                        attempts.begin(now)
""",
        Search.SIMULATION,
    ),
    Defect(
        "ACKs that may be lost are not sent again",
        CONNECTIONS,
        "        lost = connection.unconfirmed\n        if lost:\n",
        "        lost = connection.unconfirmed\n        if not lost:\n",
        Search.SIMULATION,
    ),
    Defect(
        "ACKs of a window forgotten when the next one fails",
        CONNECTION,
        "        lost = [*self._session.unconfirmed, *(request for request, consumed in ended if consumed)]\n",
        "        lost = self._session.unconfirmed\n",
        Search.SIMULATION,
    ),
    Defect(
        "another producer at the same address not recognised",
        "transport/connecting.py",
        "        if producer not in (ANY_PRODUCER, identity.producer):\n            raise OtherProducerError(\n",
        "        if False:\n            raise OtherProducerError(\n",
        Search.SIMULATION,
    ),
    Defect(
        "a copy of a slot handed out although its lease may have ended",
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
        "transport/attempts.py",
        "                quarantine = self._quarantine.fail(endpoint, now)\n",
        "                pass\n",
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
        "        return error.retryable and self._left > 0 and now < self._deadline\n",
        "        return self._left > 0 and now < self._deadline\n",
        Search.SIMULATION,
    ),
    # --- streams --------------------------------------------------------------------------------------------
    Defect(
        "credit not read again after the barrier",
        DELIVERY,
        "            # Then read the credit once more.\n",
        "            return\n",
        Search.SIMULATION,
    ),
    Defect(
        "a new consumer does not know that payloads wait",
        DELIVERY,
        "                words.pending = group.marked\n",
        "                words.pending = False\n",
        Search.SIMULATION,
    ),
    Defect(
        "payloads of a consumer that has ended not handed out again",
        DELIVERY,
        "            self._come_back(group, items)\n            self._give(group)\n",
        "            self._give(group)\n",
        Search.SIMULATION,
    ),
    Defect(
        "what comes back waits at the tail",
        DELIVERY,
        """\
            waiting = {item.sequence: item for item in (*back, *group.waiting)}
            group.waiting = deque(sorted(waiting.values(), key=_sequence))
""",
        """\
            waiting = {item.sequence: item for item in (*group.waiting, *back)}
            group.waiting = deque(waiting.values())
""",
        Search.SIMULATION,
    ),
    Defect(
        "deliveries not counted",
        DELIVERY,
        "            item.deliveries += 1\n",
        "            item.deliveries = 1\n",
        Search.SIMULATION,
    ),
    Defect(
        "a payload that is begun taken back",
        DELIVERY,
        "        if item.state is State.GIVEN and words is not None and",
        "        if False and",
        Search.SIMULATION,
    ),
    Defect(
        "credit ignored",
        DELIVERY,
        "    best, most = None, 0\n",
        "    best, most = None, -9\n",
        Search.SIMULATION,
    ),
    Defect(
        "a payload acknowledged when it is handed to the program",
        "streams/source.py",
        "        attachment.count_read(lease)\n",
        "        attachment.count_read(lease)\n        attachment.acknowledge(lease)\n",
        Search.SIMULATION,
    ),
    Defect(
        "nothing received while a payload is being read",
        "streams/inbox.py",
        "        if entry is None:\n            self.receive()\n",
        "        if entry is None:\n",
        Search.SIMULATION,
    ),
    Defect(
        "an old attachment kept after a new connection",
        "streams/inbox.py",
        "        self._reads.forget(source.producer)\n",
        "",
        Search.SIMULATION,
    ),
)
