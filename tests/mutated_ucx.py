"""Mutated conversations over UCX: also with wrong preambles, wrong tags and messages of wrong sizes."""

import contextlib
import select
from collections import Counter
from collections.abc import Callable
from typing import Any

from mutated_conversations import READ, SECONDS, Mutator

from dray.clock import Deadline
from dray.errors import DrayError
from dray.protocol.frames import Payload
from dray.transport.lanes import UCX, Endpoint
from dray.transport.lanes.ucx import UcxStream
from dray.transport.lanes.ucx_worker import UcxWorker

AT_ONCE = 8
PER_WORKER = 400
"""Conversations until the worker is replaced, because it keeps payloads that no stream receives."""
_END_SECONDS = 2.0
TOO_LONG = 64 * 1024 + 1


class UcxConversations:
    """Plays conversations to a UCX endpoint; counts as `Sockets` does."""

    def __init__(self, mutator: Mutator, address: str) -> None:
        self.counts: Counter[str] = Counter()
        self._mutator = mutator
        self._chance = mutator.chance
        _, self._host, port = address.split(":")
        self._port = int(port)
        self._worker = UcxWorker(True)
        self._manners: tuple[Callable[[UcxStream], None], ...] = (
            *5 * (self._converse,), self._leave, self._wrong_tags, self._too_long, self._empty_messages,
        )  # fmt: skip

    def play(self, conversations: int) -> None:
        left = conversations
        while left > 0:
            for _ in range(0, min(left, PER_WORKER), AT_ONCE):
                self._play_together()
            left -= PER_WORKER
            self._worker.close()
            self._worker = UcxWorker(True)

    def __enter__(self) -> "UcxConversations":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def _play_together(self) -> None:
        streams = []
        for _ in range(AT_ONCE):
            self.counts["connections"] += 1
            if self._chance.random() < 0.1:
                self._wrong_preamble()
            else:
                streams.append(
                    UCX.connect(Endpoint(UCX, self._host, self._port), Deadline.after(20), self._worker)
                )
        for stream in streams:
            try:
                self._chance.choice(self._manners)(stream)
            except DrayError:
                self.counts["ended"] += 1
            stream.close()

    # --- manners ----------------------------------------------------------------------------------------------

    def _wrong_preamble(self) -> None:
        self.counts["left"] += 1
        endpoint = self._worker.connect(self._host, self._port)
        memory = bytearray(self._chance.randbytes(self._chance.choice((1, 7, 9, 16, 200))))
        request = endpoint.stream_send(self._worker.array(memory))
        if self._chance.random() < 0.5:
            self._until(lambda: request.completed)
        self._worker.close_endpoint(endpoint, [(request, memory)])

    def _converse(self, stream: UcxStream) -> None:
        """A changed conversation, in messages of any sizes."""
        sent = self._mutator.conversation()
        expected = self._mutator.expected(sent)
        at = 0
        while at < len(sent):
            size = self._chance.choice((1, 10, 64, 96, 1000))
            stream.send([sent[at : at + size]])
            at += size
        self._flushed(stream)
        if expected == "malformed" and len(sent) >= 160 and sent[:7] == b"DRAY\1\0\3":
            # Closed at once; a refused HELLO is answered, and the connection ends a second later.
            self.counts["malformed"] += 1
            self._ended(stream)
        else:
            self.counts["either"] += 1
            if self._chance.random() < 0.5 and len(sent) >= 64:
                self._until(lambda: stream.receive(1) is not None, stream)

    def _leave(self, stream: UcxStream) -> None:
        """Leave at any time, with messages still on their way."""
        self.counts["left"] += 1
        if self._chance.random() < 0.7:
            stream.send([self._mutator.conversation()])
        if self._chance.random() < 0.5:
            self._worker.progress()

    def _wrong_tags(self, stream: UcxStream) -> None:
        """Messages under unexpected tags, and a payload requested under the tag of frames."""
        self.counts["either"] += 1
        self._shake(stream)
        theirs = stream.peer_tag or 0
        for _ in range(3):
            tag = self._chance.choice((0, theirs ^ 1, theirs + 1, self._chance.getrandbits(64)))
            self._post(stream, self._chance.randbytes(self._chance.choice((1, 64, 5000))), tag % 2**64)
        slot, sequence, nbytes = self._mutator.table.row(self._chance)
        read = bytearray(self._mutator.frame(READ, slot, 0, sequence, nbytes=nbytes))
        read[48:56] = stream.tag.to_bytes(8, "little")
        stream.send([bytes(read)])
        self._flushed(stream)
        self._until(lambda: stream.receive(64) is not None, stream)

    def _too_long(self, stream: UcxStream) -> None:
        self.counts["malformed"] += 1
        self._shake(stream)
        self._post(stream, bytes(TOO_LONG + self._chance.randrange(1 << 17)), stream.peer_tag)
        self._ended(stream)

    def _empty_messages(self, stream: UcxStream) -> None:
        self.counts["either"] += 1
        self._shake(stream)
        for _ in range(self._chance.randrange(1, 4)):
            self._post(stream, b"", stream.peer_tag)
        stream.send(self._mutator.requests(1))
        self._flushed(stream)

    # --- steps ------------------------------------------------------------------------------------------------

    def _shake(self, stream: UcxStream) -> None:
        stream.send([self._mutator.hello()])
        self._flushed(stream)
        self._until(lambda: stream.receive(128 + 8) is not None, stream)

    def _post(self, stream: UcxStream, message: bytes, tag: int | None) -> None:
        assert tag is not None
        stream.send([Payload(memoryview(message), tag)])

    def _flushed(self, stream: UcxStream) -> None:
        self._until(stream.flush, stream)

    def _ended(self, stream: UcxStream) -> None:
        """The server ends the connection; UCX sometimes does not report it while a payload is on its way."""
        deadline = Deadline.after(_END_SECONDS)
        with contextlib.suppress(DrayError):
            while not deadline.expired:
                self._until(lambda: stream.receive(1) is not None or deadline.expired, stream, deadline)
            self.counts["unreported"] += 1

    def _until(
        self, condition: Callable[[], Any], stream: UcxStream | None = None, at_most: Deadline | None = None
    ) -> None:
        deadline = at_most or Deadline.after(SECONDS)
        poll = select.poll()
        poll.register(self._worker.fileno(), select.POLLIN)
        while True:
            self._worker.progress()
            if condition():
                return
            assert at_most or not deadline.expired, "no answer from the server"
            if stream.idle() if stream is not None else self._worker.arm():
                poll.poll(deadline.remaining * 1000)
