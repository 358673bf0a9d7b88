"""The handshake of both sides: the peer is accepted, refused by a verdict, or a `ProtocolError`; nothing else.

Input: one byte of options, then either the messages themselves, or changes to a valid handshake: pairs of position
and byte.
"""

from contextlib import suppress

from fuzz.cursor import Cursor

from dray.errors import ProtocolError
from dray.protocol.frames import MIN_VERSION, VERSION
from dray.protocol.handshake import (
    ATTACH,
    CHALLENGE,
    HELLO,
    NO_PROOF,
    PROOF,
    WELCOME,
    AttachRequest,
    ClientHandshake,
    ServerHandshake,
    ServerIdentity,
    Verdict,
    WelcomeFlag,
)
from dray.transport.lanes import SHM, TCP, UCX

SERVER, VALID, CLIENT_SECRET, SERVER_SECRET, OLD_CLIENT, DIRECT = 1, 2, 4, 8, 16, 32
SECRET = b"the job's secret"
PRODUCER = bytes(range(16))
IDENTITY = ServerIdentity(PRODUCER, 4, 4096, 8, 1)
SEEDS = [
    bytes([SERVER]) + HELLO.pack(b"DRAY", 1, TCP.number, 0, PRODUCER, bytes(32)) + NO_PROOF,
    bytes([SERVER | SERVER_SECRET]) + HELLO.pack(b"DRAY", 1, TCP.number, 1, bytes(16), bytes(32)) + NO_PROOF,
    bytes([SERVER]) + HELLO.pack(b"DRAY", 2, UCX.number, 3, bytes(16), bytes(32)),
    bytes([0])
    + CHALLENGE.pack(b"DRAY", VERSION, 0, 0, PRODUCER, bytes(32), bytes(32), 4, 4096, 8, 1)
    + WELCOME.pack(b"DRAY", 0, 0),
    bytes([0]) + CHALLENGE.pack(b"DRAY", VERSION, 3, 0, PRODUCER, bytes(32), bytes(32), 4, 4096, 8, 1),
    bytes([CLIENT_SECRET]) + CHALLENGE.pack(b"DRAY", VERSION, 0, 1, PRODUCER, bytes(32), bytes(32), 4, 4096, 8, 1),
    bytes([VALID]),
    bytes([VALID | OLD_CLIENT | CLIENT_SECRET | SERVER_SECRET]),
    bytes([VALID | OLD_CLIENT, 4, 2, 68, 1]),
    bytes([VALID | CLIENT_SECRET | SERVER_SECRET]),
    bytes([VALID | CLIENT_SECRET | SERVER_SECRET, 200, 1]),
    bytes([VALID | SERVER | CLIENT_SECRET | SERVER_SECRET, 7, 0]),
    bytes([VALID | DIRECT]),
    bytes([VALID | DIRECT | CLIENT_SECRET | SERVER_SECRET, 232, 1]),
    bytes([VALID | DIRECT | OLD_CLIENT]),
    bytes([SERVER | DIRECT])
    + HELLO.pack(b"DRAY", VERSION, SHM.number, 2, PRODUCER, bytes(32))
    + NO_PROOF
    + ATTACH.pack(bytes(32), 255),
    bytes([DIRECT])
    + CHALLENGE.pack(b"DRAY", VERSION, 0, 2, PRODUCER, bytes(32), bytes(32), 4, 4096, 8, 1)
    + WELCOME.pack(b"DRAY", 0, 3),
]


def attach_of(options: int) -> AttachRequest | None:
    return AttachRequest(bytes(range(32)), 7) if options & DIRECT else None


def run(data: bytes) -> None:
    cursor = Cursor(data)
    options = cursor.byte()
    version = MIN_VERSION if options & OLD_CLIENT else VERSION
    lane = SHM if options & DIRECT else TCP
    client = ClientHandshake(
        lane, PRODUCER, SECRET if options & CLIENT_SECRET else None, version, attach=attach_of(options)
    )
    server = ServerHandshake(
        lane, IDENTITY, SECRET if options & SERVER_SECRET else None, direct=bool(options & DIRECT)
    )
    if options & VALID:
        with suppress(ProtocolError):
            _exchange_with_changes(cursor, client, server, options)
    elif options & SERVER:
        answers = []
        for _ in range(2):
            if server.verdict is Verdict.WELCOME:
                answers.append(_answer(server, cursor.read(server.expects).ljust(server.expects, b"\0")))
        assert [len(answer) for answer in answers] in ([CHALLENGE.size], [CHALLENGE.size, WELCOME.size])
        assert (server.attach is not None) == (server.attaching and server.done)
        # Without the secret, the proof cannot be right.
        assert not (server.done and options & SERVER_SECRET)
    else:
        with suppress(ProtocolError):
            while not client.done:
                answer = client.receive(cursor.read(client.expects).ljust(client.expects, b"\0"))
                if answer is None:
                    break
                assert len(answer) == PROOF.size + (ATTACH.size if client.attaching else 0)
        assert client.attaching or not client.welcome & WelcomeFlag.ATTACHED
        assert not (client.done and options & CLIENT_SECRET)


def _answer(server: ServerHandshake, message: bytes) -> bytes:
    """The server's answer; what it grants follows from whether the client has asked for direct leases."""
    return server.receive(message) or server.welcome(WelcomeFlag.ATTACHED | WelcomeFlag.NEWEST)


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
    assert changed or client.attaching == server.attaching
    welcome = _answer(server, across(answer).ljust(server.expects, b"\0")[: server.expects])
    client.receive(across(welcome))
    assert client.done
    if options & CLIENT_SECRET and options & SERVER_SECRET:
        # The proofs vouch for the producer, in either direction. WELCOME itself is not signed: a changed one makes
        # the client send to a server that has closed the connection.
        assert client.server is not None
        assert client.server.producer == PRODUCER
        assert server.done or welcome[5] != Verdict.WELCOME
    if not changed and options & DIRECT and not options & OLD_CLIENT:
        assert server.attach == attach_of(options)
        assert client.welcome == WelcomeFlag.ATTACHED | WelcomeFlag.NEWEST
