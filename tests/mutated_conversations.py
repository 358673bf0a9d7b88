"""Conversations with a server, nearly as they should be: made, changed, and played over sockets, many at once.

``mutated_conversations.py JSON`` plays a number of them and prints what came of it as one line of JSON. The
conversations are written from docs/reference/protocol.md; nothing here shares code with the server.
"""

import contextlib
import errno
import json
import mmap
import random
import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HELLO = struct.Struct("<4sHBB16s32s8x")
FRAME = struct.Struct("<BBBBIQQQQQQQ")
HELLO_BYTES, PROOF_BYTES, FRAME_BYTES, ANSWER_BYTES = 64, 32, 64, 128 + 8
READ, STATUS, ACK, CONSUME, STAT = 1, 2, 3, 4, 5
LANES = {"shm": 1, "tcp": 2, "ucx": 3}
FLAGS_ALLOWED = {READ: 8, STATUS: 6, ACK: 1, CONSUME: 0, STAT: 0}
AT_ONCE = 16
ROW = struct.Struct("<QQQ")
SECONDS = 30.0


class Table:
    """The payloads that conversations may consume, as they are now: the server's process keeps it up to date."""

    def __init__(self, path: str, rows: int) -> None:
        self._rows = rows
        with Path(path).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), rows * ROW.size)

    def put(self, row: int, slot: int, sequence: int, nbytes: int) -> None:
        ROW.pack_into(self._memory, row * ROW.size, slot, sequence, nbytes)

    def row(self, chance: random.Random) -> tuple[int, int, int]:
        """Slot, sequence and size of one of them."""
        return ROW.unpack_from(self._memory, chance.randrange(self._rows) * ROW.size)

    def close(self) -> None:
        self._memory.close()


class Mutator:
    """Makes conversations and changes them.

    Args:
        seed: determines the conversations, together with the table.
        protected: slot → sequence of payloads that a good client reads; no conversation consumes them.
    """

    def __init__(self, seed: int, lane: str, producer: bytes, table: Table, *, protected: dict[int, int]) -> None:
        self.chance = random.Random(seed)
        self._lane = LANES[lane]
        self._producer = producer
        self.table = table
        self._protected = protected
        self._changes = (
            self._flip, self._flip, self._flip, self._set_byte, self._truncate, self._insert, self._delete,
            self._random_kind, self._random_frame, self._edge, self._random_flags,
        )  # fmt: skip

    def hello(self) -> bytes:
        producer = self._producer if self.chance.random() < 0.7 else bytes(16)
        return HELLO.pack(b"DRAY", 1, self._lane, 0, producer, self.chance.randbytes(32)) + bytes(PROOF_BYTES)

    def requests(self, count: int, first: int = 0) -> list[bytes]:
        """Valid frames, whose ACKs name requests that were really made."""
        frames, made = [], []
        for number in range(first, first + count):
            slot, sequence, nbytes = self.table.row(self.chance)
            what = self.chance.random()
            if what < 0.5 or (what < 0.75 and not made):
                size, inline = self.chance.choice((0, nbytes)), self.chance.choice((0, 8))
                frames.append(self.frame(READ, slot, number, sequence, nbytes=size, flags=inline))
                made.append((slot, number, sequence))
            elif what < 0.75:
                frames.append(self.ack(*self.chance.choice(made)))
            elif what < 0.9:
                frames.append(self.frame(CONSUME, slot, number, sequence))
            else:
                frames.append(self.frame(STAT, 0, number, 0))
        return frames

    def ack(self, slot: int, number: int, sequence: int) -> bytes:
        return self.frame(ACK, slot, number, sequence, flags=self.chance.getrandbits(1))

    def frame(self, kind: int, slot: int, number: int, sequence: int, *, nbytes: int = 0, flags: int = 0) -> bytes:
        tag = self.chance.choice((0, self.chance.getrandbits(16)))
        return FRAME.pack(kind, 0, 0, flags, slot, number, sequence, nbytes, 0, 0, tag, 0)

    def conversation(self) -> bytes:
        """A whole conversation that its server need not answer in between, changed in a place or two."""
        frames = self.requests(self.chance.randrange(6))
        head = self.hello()
        order = self.chance.random()
        if frames and order < 0.1:
            frames.insert(self.chance.randrange(len(frames)), self.chance.choice(frames))
        elif order < 0.2:
            self.chance.shuffle(frames)
        elif order < 0.25:
            frames.insert(0, head)
            head = b""
        return self.changed(head + b"".join(frames), 0)

    def changed(self, whole: bytes, start: int) -> bytes:
        """`whole`, changed behind `start` once or twice, and none that would consume what is protected."""
        while True:
            now = bytearray(whole)
            for _ in range(self.chance.choice((1, 1, 2))):
                now = self.chance.choice(self._changes)(now, start)
            if self._harmless(now):
                return bytes(now)

    def expected(self, sent: bytes) -> str:
        """How the server ends a conversation of which it sees every byte: "malformed", "denied", "either", ""."""
        if len(sent) < HELLO_BYTES:
            return ""
        magic, version, lane, flags, producer, _ = HELLO.unpack_from(sent)
        if magic != b"DRAY" or version != 1 or lane != self._lane:
            return "malformed"
        if len(sent) < HELLO_BYTES + PROOF_BYTES:
            return "denied" if flags & 1 and producer in (bytes(16), self._producer) else ""
        if any(sent[HELLO_BYTES : HELLO_BYTES + PROOF_BYTES]):
            return "denied"
        seen, either = set(), False
        for fields in frames_of(sent):
            kind, status, _, flags, _, number = fields[:6]
            if kind == STATUS or status > 4 or flags & ~FLAGS_ALLOWED.get(kind, -256):
                return "malformed"
            if kind not in FLAGS_ALLOWED:
                return "malformed"
            either = either or kind == ACK or (kind == READ and number in seen)
            seen.add(number)
        return "either" if either else ""

    def _harmless(self, sent: bytearray) -> bool:
        for kind, _, reader, flags, slot, _, sequence, *_ in frames_of(sent):
            consumes = kind == CONSUME or (kind == ACK and flags & 1)
            if consumes and reader == 0 and self._protected.get(slot) == sequence:
                return False
        return True

    def _place(self, now: bytearray, start: int) -> int:
        return self.chance.randrange(start, len(now)) if len(now) > start else len(now)

    def _frame_place(self, now: bytearray, start: int) -> int:
        """Where a frame begins, or could."""
        first = max(start, HELLO_BYTES + PROOF_BYTES)
        return first + FRAME_BYTES * self.chance.randrange(max(1, (len(now) - first) // FRAME_BYTES))

    def _flip(self, now: bytearray, start: int) -> bytearray:
        for _ in range(self.chance.choice((1, 1, 3))):
            if len(now) > start:
                now[self._place(now, start)] ^= 1 << self.chance.randrange(8)
        return now

    def _set_byte(self, now: bytearray, start: int) -> bytearray:
        if len(now) > start:
            now[self._place(now, start)] = self.chance.choice((0, 1, 127, 128, 255))
        return now

    def _truncate(self, now: bytearray, start: int) -> bytearray:
        return now[: self._place(now, start)]

    def _insert(self, now: bytearray, start: int) -> bytearray:
        at = self._place(now, start)
        now[at:at] = self.chance.randbytes(self.chance.choice((1, 7, 64, 200)))
        return now

    def _delete(self, now: bytearray, start: int) -> bytearray:
        at = self._place(now, start)
        del now[at : at + self.chance.choice((1, 8, 64))]
        return now

    def _random_kind(self, now: bytearray, start: int) -> bytearray:
        at = self._frame_place(now, start)
        if at < len(now):
            now[at] = self.chance.randrange(256)
        return now

    def _random_flags(self, now: bytearray, start: int) -> bytearray:
        at = self._frame_place(now, start)
        if at + 3 < len(now):
            now[at + 3] = self.chance.randrange(8)
        return now

    def _random_frame(self, now: bytearray, start: int) -> bytearray:
        at = self._frame_place(now, start)
        now[at:at] = bytes([self.chance.randrange(1, 6), 0]) + self.chance.randbytes(FRAME_BYTES - 2)
        return now

    def _edge(self, now: bytearray, start: int) -> bytearray:
        """A field that is larger than anything."""
        at = self._frame_place(now, start) + self.chance.choice((4, 8, 16, 24, 48))
        if at + 8 <= len(now):
            now[at : at + 8] = self.chance.choice((b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\0\1\0\0\0"))
        return now


def frames_of(sent: bytes | bytearray) -> Iterator[tuple[int, ...]]:
    """The frames that a server takes `sent` for."""
    return FRAME.iter_unpack(
        memoryview(sent)[HELLO_BYTES + PROOF_BYTES :][: max(0, len(sent) - 96) // FRAME_BYTES * FRAME_BYTES]
    )


# --- playing ----------------------------------------------------------------------------------------------------


class Sockets:
    """Plays conversations over Unix sockets or TCP.

    Outcomes are counted by name; if the server reads every byte of a conversation, by the end that it must have.
    """

    def __init__(self, mutator: Mutator, address: str) -> None:
        self.counts: Counter[str] = Counter()
        self._mutator = mutator
        self._chance = mutator.chance
        scheme, _, rest = address.partition(":")
        host, _, port = rest.rpartition(":")
        self._unix = scheme == "unix"
        self._address = rest if self._unix else (host, int(port))

    def play(self, conversations: int) -> None:
        left = conversations
        while left > 0:
            count = min(left, AT_ONCE)
            self._play_together(count)
            left -= count

    def _play_together(self, count: int) -> None:
        waiting = []
        for _ in range(count):
            sock = self._connect()
            manner = self._chance.random()
            if manner < 0.6:
                self._send_all(sock, waiting)
            elif manner < 0.75:
                self._in_steps(sock, waiting)
            elif manner < 0.85:
                self._drip(sock, waiting)
            else:
                self._leave(sock)
        for sock in waiting:
            self._until_the_end(sock)

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX if self._unix else socket.AF_INET)
        sock.settimeout(SECONDS)
        sock.connect(self._address)
        if not self._unix:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.counts["connections"] += 1
        return sock

    def _send_all(self, sock: socket.socket, waiting: list[socket.socket]) -> None:
        """Send all of it and nothing more, and wait for the end."""
        sent = self._mutator.conversation()
        self.counts[self._mutator.expected(sent)] += 1
        with contextlib.suppress(ConnectionError):
            if self._unix and self._chance.random() < 0.05 and sent:
                socket.send_fds(sock, [sent], [sock.fileno()])  # unexpected
            else:
                sock.sendall(sent)
            _shut(sock)
        waiting.append(sock)

    def _in_steps(self, sock: socket.socket, waiting: list[socket.socket]) -> None:
        """A valid handshake and READ; the frames after the answers are changed."""
        hello = self._mutator.hello()
        slot, sequence, nbytes = self._mutator.table.row(self._chance)
        sock.sendall(hello + self._mutator.frame(READ, slot, 0, sequence))
        if not self._answered(sock, nbytes):
            self.counts["either"] += 1
            sock.close()
            return
        frames = [self._mutator.ack(slot, 0, sequence), *self._mutator.requests(self._chance.randrange(4), 1)]
        if self._chance.random() < 0.2:
            frames[0] = self._mutator.frame(READ, slot, 0, sequence)
        before = hello + self._mutator.frame(STAT, 0, 0, 0)
        sent = self._mutator.changed(before + b"".join(frames), len(before))
        self.counts["either"] += 1
        with contextlib.suppress(ConnectionError):
            sock.sendall(sent[len(before) :])
            _shut(sock)
        waiting.append(sock)

    def _answered(self, sock: socket.socket, nbytes: int) -> bool:
        """Read the handshake's answers, STATUS and on TCP the payload; False if another HELLO was meant."""
        got = self._receive(sock, ANSWER_BYTES + FRAME_BYTES)
        kind, status, *_ = FRAME.unpack_from(got, ANSWER_BYTES)
        assert (got[:4], got[128:133], kind) == (b"DRAY", b"DRAY\0", STATUS), got
        if status == 0 and not self._unix:
            payload = self._receive(sock, nbytes)
            assert payload == bytes([nbytes % 251]) * nbytes
            self.counts["payloads"] += 1
        return True

    def _receive(self, sock: socket.socket, size: int) -> bytes:
        got = b""
        while len(got) < size:
            part = sock.recv(size - len(got))
            assert part, f"the connection ended after {len(got)} of {size} bytes"
            got += part
        return got

    def _drip(self, sock: socket.socket, waiting: list[socket.socket]) -> None:
        """Send it in small pieces; some wait for others in between."""
        sent = self._mutator.conversation()
        self.counts[self._mutator.expected(sent)] += 1
        with contextlib.suppress(ConnectionError):
            at = 0
            while at < len(sent):
                size = self._chance.randrange(1, 90)
                sock.sendall(sent[at : at + size])
                at += size
                if waiting and self._chance.random() < 0.3:
                    self._until_the_end(waiting.pop(0))
            _shut(sock)
        waiting.append(sock)

    def _leave(self, sock: socket.socket) -> None:
        """Close or reset the connection in the middle of a conversation."""
        self.counts["left"] += 1
        if not self._unix and self._chance.random() < 0.5:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(ConnectionError):
            sock.sendall(self._mutator.conversation())
        sock.close()

    def _until_the_end(self, sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            while sock.recv(1 << 17):
                pass
        sock.close()


def _shut(sock: socket.socket) -> None:
    """End the sending direction, unless the peer has already closed."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise


def main() -> None:
    task = json.loads(sys.argv[1])
    table = Table(task["table"], task["rows"])
    protected = {int(slot): sequence for slot, sequence in task["protected"].items()}
    mutator = Mutator(task["seed"], task["lane"], bytes.fromhex(task["producer"]), table, protected=protected)
    if task["lane"] == "ucx":
        from mutated_ucx import UcxConversations

        with UcxConversations(mutator, task["address"]) as player:
            player.play(task["conversations"])
    else:
        player = Sockets(mutator, task["address"])
        player.play(task["conversations"])
    table.close()
    print(json.dumps(player.counts), flush=True)


if __name__ == "__main__":
    main()
