"""A client for the ``tcp`` lane, written from docs/protocol.md alone: it shares no code with dray.

``protocol_client.py [--secret HEX] [--reader N] ACTIONS REFERENCE...`` opens one connection to the first
reference's ``tcp`` endpoint and carries out the actions, joined with commas, one after the other: ``take``
(read and consume), ``read`` (read and return), ``consume``, ``stat``. Each sends its requests for all
references at once and prints one line of JSON for each. Exit status 3: authentication failed; 4: another
producer listens there; 5: the server does not keep to the protocol.
"""

import argparse
import contextlib
import hashlib
import hmac
import json
import os
import socket
import struct
import sys

try:
    import xxhash
except ImportError:
    xxhash = None

TCP = 2
HELLO = struct.Struct("<4s H B B 16s 32s 8x")
CHALLENGE = struct.Struct("<4s H B B 16s 32s 32s Q Q I B 19x")
WELCOME = struct.Struct("<4s B 3x")
FRAME = struct.Struct("<B B B B I Q Q Q Q Q Q Q")
READ, STATUS, ACK, CONSUME, STAT = 1, 2, 3, 4, 5
NAMES = {0: "OK", 1: "STALE", 2: "ERROR", 3: "BUSY", 4: "DENIED"}
CONSUMED, CHECKSUM, TEXT = 1, 2, 4
FORMATS = {"U8": "B", "I32": "i", "I64": "q", "F32": "f", "F64": "d"}


class Refused(Exception):
    """The connection cannot be used; `code` is the exit status."""

    def __init__(self, code, why):
        super().__init__(why)
        self.code = code


def hello(producer, nonce, secret):
    return HELLO.pack(b"DRAY", 1, TCP, 1 if secret else 0, producer, nonce)


def proof(secret, role, client_nonce, server_nonce, producer):
    if not secret:
        return bytes(32)
    return hmac.new(
        secret, role + bytes([1, TCP]) + client_nonce + server_nonce + producer, hashlib.sha256
    ).digest()


def answer_challenge(challenge, expected, nonce, secret):
    """The client's proof, and the server's max_leases."""
    magic, version, verdict, flags, producer, theirs, server_proof, _, _, max_leases, _ = CHALLENGE.unpack(
        challenge
    )
    if magic != b"DRAY" or version != 1 or verdict != 0:
        raise Refused(5, f"CHALLENGE: {magic!r}, version {version}, verdict {verdict}")
    if expected != bytes(16) and producer != expected:
        raise Refused(4, "another producer listens there")
    if bool(flags & 1) != bool(secret):
        raise Refused(3, "one side has no secret")
    if not hmac.compare_digest(server_proof, proof(secret, b"server", nonce, theirs, producer)):
        raise Refused(3, "the server does not know the secret")
    return proof(secret, b"client", nonce, theirs, producer), max_leases


def request(kind, number, slot=0, sequence=0, nbytes=0, reader=0, flags=0):
    return FRAME.pack(kind, 0, reader, flags, slot, number, sequence, nbytes, 0, 0, 0, 0)


class Client:
    def __init__(self, address, producer, secret=b"", reader=0):
        _, rest = address.split(":", 1)
        host, _, port = rest.rpartition(":")
        self.sock = socket.create_connection((host.strip("[]"), int(port)), timeout=20)
        self.reader = reader
        self.number = self.acks = self.confirmed = 0
        self.acked = None
        try:
            self.shake(producer, secret)
        except BaseException:
            self.sock.close()
            raise

    def shake(self, producer, secret):
        nonce = os.urandom(32)
        self.sock.sendall(hello(producer, nonce, secret))
        answer, self.max_leases = answer_challenge(self.receive(CHALLENGE.size), producer, nonce, secret)
        self.sock.sendall(answer)
        magic, verdict = WELCOME.unpack(self.receive(WELCOME.size))
        if magic != b"DRAY" or verdict != 0:
            raise Refused(3 if verdict == 2 else 5, f"WELCOME: {magic!r}, verdict {verdict}")

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
        numbers = range(self.number, self.number + len(wanted))
        self.number = numbers.stop
        self.sock.sendall(
            b"".join(
                request(kind, number, *which, reader=self.reader)
                for number, which in zip(numbers, wanted, strict=True)
            )
        )
        return numbers

    def status(self, number, slot, sequence):
        """(status, flags, nbytes, checksum, acked, text) of the answer that is due."""
        kind, status, _, flags, its_slot, its_number, its_sequence, nbytes, checksum, acked, _, _ = FRAME.unpack(
            self.receive(FRAME.size)
        )
        if (kind, its_number, its_slot, its_sequence) != (STATUS, number, slot, sequence) or flags & ~(
            CHECKSUM | TEXT
        ):
            raise Refused(5, f"frame of kind {kind} for request {its_number} in place of STATUS for {number}")
        self.confirmed = acked
        text = self.receive(nbytes).decode() if flags & TEXT else ""
        return status, flags, nbytes, checksum, acked, text

    def read(self, references, consume):
        for first in range(0, len(references), self.max_leases):
            window = references[first : first + self.max_leases]
            wanted = [(ref["s"], ref["q"], ref["n"]) for ref in window]
            acks = b""
            for ref, which, number in zip(window, wanted, self.ask(READ, wanted), strict=True):
                status, flags, nbytes, checksum, acked, text = self.status(number, *which[:2])
                result = {"status": NAMES[status], "acked": acked}
                if status == 0:
                    if nbytes != ref["n"]:
                        raise Refused(5, f"the payload has {nbytes} bytes, the reference {ref['n']}")
                    payload = self.receive(nbytes)
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

    def consume(self, references):
        wanted = [(ref["s"], ref["q"]) for ref in references]
        for which, number in zip(wanted, self.ask(CONSUME, wanted), strict=True):
            status, _, _, _, acked, _ = self.status(number, *which)
            yield {"status": NAMES[status], "acked": acked}

    def close(self):
        """End; if ACKs are not confirmed, after an answer that confirms them."""
        if self.confirmed < self.acks and self.acked is not None:
            (number,) = self.ask(CONSUME, [self.acked])
            self.status(number, *self.acked)
        self.sock.close()

    def stat(self):
        (number,) = self.ask(STAT, [(0, 0)])
        status, _, _, _, acked, text = self.status(number, 0, 0)
        yield {"status": NAMES[status], "acked": acked, "stat": json.loads(text)}


def tensors(payload):
    """Name → dtype, shape and values of a safetensors image."""
    (length,) = struct.unpack_from("<Q", payload)
    header = json.loads(payload[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, about in header.items():
        begin, end = (8 + length + offset for offset in about["data_offsets"])
        code = FORMATS[about["dtype"]]
        values = struct.unpack(f"<{(end - begin) // struct.calcsize(code)}{code}", payload[begin:end])
        found[name] = {"dtype": about["dtype"], "shape": about["shape"], "values": values}
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--secret", type=bytes.fromhex, default=b"")
    parser.add_argument("--reader", type=int, default=0)
    parser.add_argument("actions")
    parser.add_argument("references", nargs="+", type=json.loads)
    options = parser.parse_args()
    references = options.references
    address = next(each for each in references[0]["e"] if each.startswith("tcp:"))
    try:
        client = Client(address, bytes.fromhex(references[0]["p"]), options.secret, options.reader)
        with contextlib.closing(client):
            for action in options.actions.split(","):
                if action == "stat":
                    results = client.stat()
                elif action == "consume":
                    results = client.consume(references)
                else:
                    results = client.read(references, consume=action == "take")
                for result in results:
                    print(json.dumps(result), flush=True)
    except Refused as refused:
        print(refused, file=sys.stderr)
        sys.exit(refused.code)


if __name__ == "__main__":
    main()
