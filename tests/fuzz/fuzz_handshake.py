"""The handshake of both sides: the peer is accepted, refused by a verdict, or a `ProtocolError`; nothing else.

Input: one byte of options, then either the messages themselves, or changes to a valid handshake: pairs of position
and byte.
"""

from contextlib import suppress

from fuzz.cursor import Cursor

from dray.errors import ProtocolError
from dray.protocol.frames import MIN_VERSION, VERSION
from dray.protocol.handshake import (
    CHALLENGE,
    HELLO,
    NO_PROOF,
    PROOF,
    WELCOME,
    ClientHandshake,
    ServerHandshake,
    ServerIdentity,
    Verdict,
)
from dray.transport.lanes import TCP, UCX

SERVER, VALID, CLIENT_SECRET, SERVER_SECRET, OLD_CLIENT = 1, 2, 4, 8, 16
SECRET = b"the job's secret"
PRODUCER = bytes(range(16))
IDENTITY = ServerIdentity(PRODUCER, 4, 4096, 8, 1)
SEEDS = [
    bytes([SERVER]) + HELLO.pack(b"DRAY", 1, TCP.number, 0, PRODUCER, bytes(32)) + NO_PROOF,
    bytes([SERVER | SERVER_SECRET]) + HELLO.pack(b"DRAY", 1, TCP.number, 1, bytes(16), bytes(32)) + NO_PROOF,
    bytes([SERVER]) + HELLO.pack(b"DRAY", 2, UCX.number, 3, bytes(16), bytes(32)),
    bytes([0])
    + CHALLENGE.pack(b"DRAY", VERSION, 0, 0, PRODUCER, bytes(32), bytes(32), 4, 4096, 8, 1)
    + WELCOME.pack(b"DRAY", 0),
    bytes([0]) + CHALLENGE.pack(b"DRAY", VERSION, 3, 0, PRODUCER, bytes(32), bytes(32), 4, 4096, 8, 1),
    bytes([CLIENT_SECRET]) + CHALLENGE.pack(b"DRAY", VERSION, 0, 1, PRODUCER, bytes(32), bytes(32), 4, 4096, 8, 1),
    bytes([VALID]),
    bytes([VALID | OLD_CLIENT | CLIENT_SECRET | SERVER_SECRET]),
    bytes([VALID | OLD_CLIENT, 4, 2, 68, 1]),
    bytes([VALID | CLIENT_SECRET | SERVER_SECRET]),
    bytes([VALID | CLIENT_SECRET | SERVER_SECRET, 200, 1]),
    bytes([VALID | SERVER | CLIENT_SECRET | SERVER_SECRET, 7, 0]),
]


def run(data: bytes) -> None:
    cursor = Cursor(data)
    options = cursor.byte()
    version = MIN_VERSION if options & OLD_CLIENT else VERSION
    client = ClientHandshake(TCP, PRODUCER, SECRET if options & CLIENT_SECRET else None, version)
    server = ServerHandshake(TCP, IDENTITY, SECRET if options & SERVER_SECRET else None)
    if options & VALID:
        with suppress(ProtocolError):
            _exchange_with_changes(cursor, client, server, options)
    elif options & SERVER:
        answers = [
            server.receive(cursor.read(size).ljust(size, b"\0"))
            for size in (HELLO.size, PROOF.size)
            if server.verdict is Verdict.WELCOME
        ]
        assert [len(answer) for answer in answers] in ([CHALLENGE.size], [CHALLENGE.size, WELCOME.size])
        # Without the secret, the proof cannot be right.
        assert not (server.done and options & SERVER_SECRET)
    else:
        with suppress(ProtocolError):
            while not client.done:
                answer = client.receive(cursor.read(client.expects).ljust(client.expects, b"\0"))
                if answer is None:
                    break
                assert len(answer) == PROOF.size
        assert not (client.done and options & CLIENT_SECRET)


def _exchange_with_changes(cursor: Cursor, client: ClientHandshake, server: ServerHandshake, options: int) -> None:
    """A handshake between both sides in which bytes are changed on their way."""
    changes = {cursor.byte(): cursor.byte() for _ in range(4) if cursor}
    at, changed = 0, False

    def across(message: bytes) -> bytes:
        nonlocal at, changed
        arrived = bytearray(message)
        for index in range(len(arrived)):
            if at + index in changes:
                arrived[index] = changes[at + index]
        at += len(message)
        changed = changed or arrived != message
        return bytes(arrived)

    hello = across(client.hello())
    challenge = across(server.receive(hello))
    if server.verdict is not Verdict.WELCOME:
        assert changed
        return
    answer = client.receive(challenge)
    if answer is None:
        assert changed
        return
    welcome = server.receive(across(answer))
    client.receive(across(welcome))
    assert client.done
    if options & CLIENT_SECRET and options & SERVER_SECRET:
        # The proofs vouch for the producer, in either direction. WELCOME itself is not signed: a changed one makes
        # the client send to a server that has closed the connection.
        assert client.server is not None
        assert client.server.producer == PRODUCER
        assert server.done or welcome != WELCOME.pack(b"DRAY", 0)
