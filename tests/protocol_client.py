"""A client for the lanes ``tcp`` and ``shm``, written from two pages of docs/reference alone:
protocol.md and memory-layout.md.

It shares no code with dray. ``protocol_client.py [options] ACTIONS REFERENCE...`` opens one connection to an
endpoint of the first reference and carries out the actions, joined with commas, one after the other: ``take``
(read and consume), ``read`` (read and return), ``consume``, ``stat``, and ``disconnect``, which closes the
connection. ``take``, ``read`` and ``consume`` do so for all references and print one line of JSON for each. With
``-`` for the references, they come one a line over the standard input, and each is dealt with before the next.

Options: ``--secret HEX``, ``--reader N``, ``--lane shm``, ``--exchange``, ``--select JSON``. On ``shm`` payloads
are leased directly, unless the server does not offer that or ``--exchange`` is given. With ``--select``, for
``tcp``, ``take`` and ``read`` bring a part of each payload.

Exit status 3: authentication failed; 4: another producer listens there; 5: the server does not keep to the
protocol; 6: the producer has ended.
"""

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import hmac
import itertools
import json
import mmap
import os
import pathlib
import select
import socket
import struct
import sys
import time

try:
    import xxhash
except ImportError:
    xxhash = None

SHM, TCP = 1, 2
HELLO = struct.Struct("<4s H B B 16s 32s 8x")
CHALLENGE = struct.Struct("<4s H B B 16s 32s 32s Q Q I B 19x")
ATTACH = struct.Struct("<32s B 31x")
WELCOME = struct.Struct("<4s B B 2x")
FRAME = struct.Struct("<B B B B I Q Q Q Q Q Q Q")
SECRET, DIRECT, BODIES = 1, 2, 4
ATTACHED, NEWEST = 1, 2
READ, STATUS, ACK, CONSUME, STAT = 1, 2, 3, 4, 5
NAMES = {0: "OK", 1: "STALE", 2: "ERROR", 3: "BUSY", 4: "DENIED", 5: "UNSELECTABLE"}
CONSUMED, CHECKSUM, TEXT, BODY = 1, 2, 4, 128
MAX_ADDED = 4194312
FORMATS = {"U8": "B", "I32": "i", "I64": "q", "F32": "f", "F64": "d"}

SEGMENT_HEADER = struct.Struct("<8s I I Q Q Q Q 16s")
RETIRING = 1 << 63
FIXED_SIZE, READ_ONLY = 0x01 | 0x02 | 0x04, 0x10
F_GET_SEALS = 1034
MEMBARRIER, REGISTER_GLOBAL_EXPEDITED = 324, 1 << 2


class Refused(Exception):
    """The connection cannot be used; `code` is the exit status."""

    def __init__(self, code, why):
        super().__init__(why)
        self.code = code


# --- handshake ----------------------------------------------------------------------------------------------


def hello(producer, nonce, secret, lane=TCP, version=1, direct=False, bodies=False):
    flags = (SECRET if secret else 0) | (DIRECT if direct else 0) | (BODIES if bodies else 0)
    return HELLO.pack(b"DRAY", version, lane, flags, producer, nonce)


def proof(secret, role, client_nonce, server_nonce, producer, lane=TCP, version=1):
    if not secret:
        return bytes(32)
    return hmac.new(
        secret, role + bytes([version, lane]) + client_nonce + server_nonce + producer, hashlib.sha256
    ).digest()


class Ring:
    """What CHALLENGE contains about the ring."""

    def __init__(self, producer, slots, slot_bytes, max_leases, readers, flags):
        self.producer, self.slots, self.slot_bytes = producer, slots, slot_bytes
        self.max_leases, self.readers = max_leases, readers
        self.offers_direct, self.takes_bodies = bool(flags & DIRECT), bool(flags & BODIES)


def answer_challenge(challenge, expected, nonce, secret, lane=TCP, version=1):
    """The client's proof, and the ring."""
    magic, spoken, verdict, flags, producer, theirs, server_proof, *numbers = CHALLENGE.unpack(challenge)
    if magic != b"DRAY" or spoken != version or verdict != 0 or 0 in numbers:
        raise Refused(5, f"CHALLENGE: {magic!r}, version {spoken}, verdict {verdict}, {numbers}")
    if expected != bytes(16) and producer != expected:
        raise Refused(4, "another producer listens there")
    if bool(flags & SECRET) != bool(secret):
        raise Refused(3, "one side has no secret")
    parts = nonce, theirs, producer, lane, version
    if not hmac.compare_digest(server_proof, proof(secret, b"server", *parts)):
        raise Refused(3, "the server does not know the secret")
    return proof(secret, b"client", *parts), Ring(producer, *numbers, flags)


def kernel_digest():
    digest = hashlib.blake2b(digest_size=32)
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/version"):
        with pathlib.Path(path).open("rb") as file:
            digest.update(file.read())
    return digest.digest()


def register():
    """Let the barriers of other processes reach this one; whether that was possible."""
    return ctypes.CDLL(None).syscall(MEMBARRIER, REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0


# --- shared memory ------------------------------------------------------------------------------------------


def mapped(fd, size, seals, writable):
    if os.fstat(fd).st_size != size or fcntl.fcntl(fd, F_GET_SEALS) & seals != seals:
        raise Refused(5, f"a descriptor is no sealed memory of {size} bytes")
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
    memory.madvise(mmap.MADV_DONTFORK)
    return memoryview(memory)


def align(value, unit):
    return -(-value // unit) * unit


class Segment:
    def __init__(self, fd, ring):
        self.first = align(64 + 64 * ring.slots, 4096)
        self.stride = align(ring.slot_bytes, 4096 if ring.slot_bytes >= 4096 else 64)
        size = align(self.first + ring.slots * self.stride, 4096)
        self.memory = mapped(fd, size, FIXED_SIZE | READ_ONLY, writable=False)
        expected = b"DRAYRING", 1, 64, ring.slots, ring.slot_bytes, self.stride, self.first, ring.producer
        if SEGMENT_HEADER.unpack_from(self.memory) != expected:
            raise Refused(5, "the segment is not that of the handshake")

    def payload(self, slot, nbytes):
        begin = self.first + slot * self.stride
        return self.memory[begin : begin + nbytes]

    def nbytes(self, slot):
        return struct.unpack_from("<Q", self.memory, 64 + 64 * slot + 16)[0]


class Stale(Exception):
    """The payload is gone, or this reader has consumed it."""


class Ask(Exception):
    """Only the server knows whether the payload is there."""


class WrongSize(Exception):
    """The reference has another size than the payload."""


class Attachment:
    """The means to lease payloads of one ring without its server."""

    def __init__(self, descriptors, ring, reader, newest):
        segment, control, board, page, self.doorbell, self.owner = descriptors
        self.slots, self.readers, self.reader, self.newest = ring.slots, ring.readers, reader, newest
        self.segment = Segment(segment, ring)
        self.control = mapped(control, 8 * (ring.slots + 2), FIXED_SIZE, writable=False).cast("Q")
        self.board = mapped(board, 8 * ring.slots * ring.readers, FIXED_SIZE, writable=True).cast("Q")
        self.page = mapped(page, 8 * (ring.max_leases + 1), FIXED_SIZE, writable=True).cast("Q")
        self.detached = False
        self.free = list(range(ring.max_leases))
        self.checked = time.monotonic()
        for descriptor in descriptors[:4]:
            os.close(descriptor)

    def lease(self, slot, sequence, nbytes):
        """The lease word of a new lease on a payload, whose size is compared unless it is None."""
        if slot >= self.slots or sequence >= 1 << 62:
            raise Stale
        if self.detached or not self.free or (time.monotonic() - self.checked > 0.05 and self.ended()):
            raise Ask
        word = self.free.pop()
        self.page[word] = slot + 1
        generation = self.control[slot]
        if generation != sequence + 1:
            self.clear(word)
            if generation == sequence + 1 | RETIRING or (generation == 0 and self.ended()):
                raise Ask
            raise Stale
        if not self.newest and self.board[slot * self.readers + self.reader] == sequence + 1:
            self.clear(word)
            raise Stale
        if nbytes is not None and self.segment.nbytes(slot) != nbytes:
            self.clear(word)
            raise WrongSize
        return word

    def end(self, word, slot, sequence, consumed):
        if consumed and not self.newest:
            self.board[slot * self.readers + self.reader] = sequence + 1
        self.clear(word)

    def clear(self, word):
        self.page[word] = 0
        self.free.append(word)
        self.ring_doorbell()
        self.close_descriptors()

    def ring_doorbell(self):
        if self.control[self.slots]:
            os.write(self.doorbell, struct.pack("=Q", 1))

    def ended(self):
        """The owner has closed the ring, or its process has ended."""
        self.checked = time.monotonic()
        return self.control[self.slots + 1] != 0 or bool(select.select([self.owner], [], [], 0)[0])

    def detach(self):
        """End the attachment. Leases stay valid, and none may begin."""
        self.page[-1] = 1
        self.ring_doorbell()
        self.detached = True
        self.close_descriptors()

    def close_descriptors(self):
        """After the last lease no bell is rung."""
        if self.detached and len(self.free) == len(self.page) - 1:
            os.close(self.doorbell)
            os.close(self.owner)


# --- frames -------------------------------------------------------------------------------------------------


def request(kind, number, slot=0, sequence=0, nbytes=0, reader=0, flags=0, body=b""):
    if not body:
        return FRAME.pack(kind, 0, reader, flags, slot, number, sequence, nbytes, 0, 0, 0, 0)
    body += b" " * (-len(body) % 64)
    return FRAME.pack(kind, 0, reader, flags | BODY, slot, number, sequence, nbytes, 0, 0, 0, len(body)) + body


class Client:
    def __init__(self, address, producer, secret=b"", reader=0, direct=True, select=b""):
        self.address, self.producer, self.secret, self.reader = address, producer, secret, reader
        self.direct, self.select = direct, select
        self.lane, self.version = (SHM, 2) if address.startswith("unix:") else (TCP, 2 if select else 1)
        self.attachment = self.segment = self.sock = None
        self.connect()

    def connect(self):
        self.number = self.acks = self.confirmed = 0
        self.acked = None
        kind, rest = self.address.split(":", 1)
        try:
            if kind == "unix":
                self.sock = socket.socket(socket.AF_UNIX)
                self.sock.settimeout(20)
                self.sock.connect(rest)
            else:
                host, _, port = rest.rpartition(":")
                self.sock = socket.create_connection((host.strip("[]"), int(port)), timeout=20)
            self.shake()
        except (ConnectionRefusedError, FileNotFoundError) as error:
            self.disconnect()
            raise Refused(6, f"the producer has ended: {error}") from error
        except BaseException:
            self.disconnect()
            raise

    def shake(self):
        nonce = os.urandom(32)
        wanted = self.lane == SHM and self.direct and self.attachment is None and register()
        bodies = bool(self.select)
        self.sock.sendall(hello(self.producer, nonce, self.secret, self.lane, self.version, wanted, bodies))
        challenge = self.receive(CHALLENGE.size)
        answer, ring = answer_challenge(challenge, self.producer, nonce, self.secret, self.lane, self.version)
        self.max_leases = ring.max_leases
        if bodies and not ring.takes_bodies:
            raise Refused(5, "the server does not take READs with a body")
        if wanted and ring.offers_direct:
            process = os.pidfd_open(os.getpid())
            socket.send_fds(self.sock, [answer + ATTACH.pack(kernel_digest(), self.reader)], [process])
            os.close(process)
        else:
            self.sock.sendall(answer)
        descriptors = []
        if self.lane == SHM:
            welcome, descriptors, _, _ = socket.recv_fds(self.sock, WELCOME.size, 8)
        else:
            welcome = self.receive(WELCOME.size)
        magic, verdict, flags = WELCOME.unpack(welcome)
        if magic != b"DRAY" or verdict != 0:
            raise Refused(3 if verdict == 2 else 5, f"WELCOME: {magic!r}, verdict {verdict}")
        if self.lane != SHM:
            return
        if len(descriptors) != (6 if flags & ATTACHED else 1):
            raise Refused(5, f"{len(descriptors)} descriptors came with the flags {flags}")
        if flags & ATTACHED:
            self.attachment = Attachment(descriptors, ring, self.reader, bool(flags & NEWEST))
            self.segment = self.attachment.segment
        else:
            self.segment = Segment(descriptors[0], ring)
            os.close(descriptors[0])

    def receive(self, size):
        got = bytearray()
        while len(got) < size:
            part = self.sock.recv(size - len(got))
            if not part:
                raise Refused(5, f"the connection ended after {len(got)} of {size} bytes")
            got += part
        return bytes(got)

    def ask(self, kind, wanted):
        """Send one request for each (slot, sequence, nbytes), all at once; their ids."""
        if self.sock is None:
            self.connect()
        numbers = range(self.number, self.number + len(wanted))
        self.number = numbers.stop
        self.sock.sendall(
            b"".join(
                request(kind, number, *which, reader=self.reader, body=self.select if kind == READ else b"")
                for number, which in zip(numbers, wanted, strict=True)
            )
        )
        return numbers

    def status(self, number, slot, sequence):
        """(status, flags, nbytes, checksum, acked, offset, text) of the answer that is due."""
        kind, status, _, flags, its_slot, its_number, its_sequence, nbytes, checksum, acked, _, offset = (
            FRAME.unpack(self.receive(FRAME.size))
        )
        if (kind, its_number, its_slot, its_sequence) != (STATUS, number, slot, sequence) or flags & ~(
            CHECKSUM | TEXT
        ):
            raise Refused(5, f"frame of kind {kind} for request {its_number} in place of STATUS for {number}")
        self.confirmed = acked
        text = self.receive(nbytes).decode() if flags & TEXT else ""
        return status, flags, nbytes, checksum, acked, offset, text

    # --- the actions ------------------------------------------------------------------------------------------

    def read(self, references, consume):
        if self.attachment is None:
            yield from self.read_over_connection(references, consume)
            return
        for ref in references:
            result = self.directly(ref, consume, read=True)
            yield from self.read_over_connection([ref], consume) if result is None else [result]

    def consume(self, references):
        if self.attachment is None:
            yield from self.consume_over_connection(references)
            return
        for ref in references:
            result = self.directly(ref, consume=True, read=False)
            yield from self.consume_over_connection([ref]) if result is None else [result]

    def directly(self, ref, consume, read):
        """The result of a direct lease; None if only the server knows it."""
        attachment, slot, sequence, result = self.attachment, ref["s"], ref["q"], {"direct": True}
        if attachment is None:
            return None
        try:
            word = attachment.lease(slot, sequence, ref["n"] if read else None)
        except Stale:
            return result | {"status": "STALE"}
        except WrongSize:
            return result | {"status": "ERROR"}
        except Ask:
            if attachment.ended():  # only the endpoints know what is left
                attachment.detach()
                self.attachment = None
                self.disconnect()
            return None
        if read:
            result["tensors"] = tensors(attachment.segment.payload(slot, ref["n"]))  # in place
        attachment.end(word, slot, sequence, consume)
        return result | {"status": "OK"}

    def read_over_connection(self, references, consume):
        for first in range(0, len(references), self.max_leases):
            window = references[first : first + self.max_leases]
            wanted = [(ref["s"], ref["q"], ref["n"]) for ref in window]
            acks = b""
            for ref, which, number in zip(window, wanted, self.ask(READ, wanted), strict=True):
                status, flags, nbytes, checksum, acked, offset, text = self.status(number, *which[:2])
                result = {"status": NAMES[status], "acked": acked, "direct": False}
                if status == 0:
                    if nbytes > ref["n"] + MAX_ADDED or (nbytes != ref["n"] and not self.select):
                        raise Refused(5, f"the payload has {nbytes} bytes, the reference {ref['n']}")
                    if self.segment is None:
                        payload = self.receive(nbytes)
                    elif offset == self.segment.first + ref["s"] * self.segment.stride:
                        payload = self.segment.payload(ref["s"], nbytes)
                    else:
                        raise Refused(5, f"slot {ref['s']} is not at offset {offset}")
                    if flags & CHECKSUM and xxhash and xxhash.xxh3_64_intdigest(payload) != checksum:
                        raise Refused(5, "the payload does not match its checksum")
                    result |= {"checked": bool(flags & CHECKSUM and xxhash), "tensors": tensors(payload)}
                    acks += request(ACK, number, *which[:2], reader=self.reader, flags=CONSUMED if consume else 0)
                    self.acks += 1
                    self.acked = which[:2] if consume else self.acked
                elif text:
                    result["text"] = text
                yield result
            self.sock.sendall(acks)

    def consume_over_connection(self, references):
        wanted = [(ref["s"], ref["q"]) for ref in references]
        for which, number in zip(wanted, self.ask(CONSUME, wanted), strict=True):
            status, _, _, _, acked, _, _ = self.status(number, *which)
            yield {"status": NAMES[status], "acked": acked, "direct": False}

    def stat(self):
        (number,) = self.ask(STAT, [(0, 0)])
        status, _, _, _, acked, _, text = self.status(number, 0, 0)
        yield {"status": NAMES[status], "acked": acked, "stat": json.loads(text)}

    def disconnect(self):
        """Close the connection; the attachment stays."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        return ()

    def close(self):
        """End; if ACKs are not confirmed, after an answer that confirms them."""
        if self.sock is not None and self.confirmed < self.acks and self.acked is not None:
            (number,) = self.ask(CONSUME, [self.acked])
            self.status(number, *self.acked)
        self.disconnect()
        if self.attachment is not None:
            self.attachment.detach()
            self.attachment = None


def tensors(payload):
    """Name → dtype, shape and values of a safetensors image."""
    (length,) = struct.unpack_from("<Q", payload)
    header = json.loads(bytes(payload[8 : 8 + length]))
    header.pop("__metadata__", None)
    found = {}
    for name, about in header.items():
        begin, end = (8 + length + offset for offset in about["data_offsets"])
        code = FORMATS[about["dtype"]]
        values = struct.unpack(f"<{(end - begin) // struct.calcsize(code)}{code}", payload[begin:end])
        found[name] = {"dtype": about["dtype"], "shape": about["shape"], "values": values}
    return found


def carry_out(client, action, references):
    if action == "stat":
        return client.stat()
    if action == "disconnect":
        return client.disconnect()
    if action == "consume":
        return client.consume(references)
    return client.read(references, consume=action == "take")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--secret", type=bytes.fromhex, default=b"")
    parser.add_argument("--reader", type=int, default=0)
    parser.add_argument("--lane", choices=["tcp", "shm"], default="tcp")
    parser.add_argument("--exchange", action="store_true")
    parser.add_argument("--select", type=str.encode, default=b"")
    parser.add_argument("actions")
    parser.add_argument("references", nargs="+")
    options = parser.parse_args()
    if options.references == ["-"]:
        groups = ([json.loads(line)] for line in sys.stdin)
    else:
        groups = iter([[json.loads(each) for each in options.references]])
    scheme = {"tcp": "tcp:", "shm": "unix:"}[options.lane]
    try:
        first = next(groups)
        address = next(each for each in first[0]["e"] if each.startswith(scheme))
        producer = bytes.fromhex(first[0]["p"])
        client = Client(
            address, producer, options.secret, options.reader, direct=not options.exchange, select=options.select
        )
        with contextlib.closing(client):
            for references in itertools.chain([first], groups):
                for action in options.actions.split(","):
                    for result in carry_out(client, action, references):
                        print(json.dumps(result), flush=True)
    except Refused as refused:
        print(refused, file=sys.stderr)
        sys.exit(refused.code)


if __name__ == "__main__":
    main()
