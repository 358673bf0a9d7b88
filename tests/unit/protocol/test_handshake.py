from typing import Any

import pytest

from dray.errors import AuthenticationError, ConfigError, ProtocolError, VersionMismatch
from dray.protocol import handshake as wire
from dray.protocol.frames import MIN_VERSION, VERSION
from dray.protocol.handshake import (
    ANY_PRODUCER,
    CHALLENGE,
    HELLO,
    MAGIC,
    NO_PROOF,
    PROOF,
    WELCOME,
    ClientHandshake,
    HelloFlag,
    ServerHandshake,
    ServerIdentity,
    Verdict,
)
from dray.transport.lanes import LANES, TCP, UCX
from dray.transport.lanes.base import Lane

IDENTITY = ServerIdentity(b"p" * 16, 8, 4096, 5, 2)
SECRET = b"the job's secret"


def shake(client: ClientHandshake, server: ServerHandshake) -> bytes | None:
    """Run both sides to the end; what the client would send next, which is nothing."""
    challenge = server.receive(client.hello())
    assert len(challenge) == client.expects
    proof = client.receive(challenge)
    assert proof is not None
    assert len(proof) == server.expects
    welcome = server.receive(proof)
    assert len(welcome) == client.expects
    return client.receive(welcome)


def test_message_sizes_are_those_of_the_protocol() -> None:
    assert (HELLO.size, CHALLENGE.size, PROOF.size, WELCOME.size) == (64, 128, 32, 8)


def test_made_secrets_are_long_enough_and_differ() -> None:
    first, second = wire.make_secret(), wire.make_secret()
    assert len(first) >= 2 * wire.MIN_SECRET_BYTES
    assert first != second
    wire.check_secret(first)
    wire.check_secret(bytes(wire.MIN_SECRET_BYTES))
    wire.check_secret(None)


@pytest.mark.parametrize("secret", [b"", b"x", b"hunter2-hunter2", "hunter2-hunter2-hunter2"])
def test_secret_that_can_be_guessed_is_refused_and_not_shown(secret: Any) -> None:
    with pytest.raises(ValueError, match="at least 16 random bytes") as caught:
        wire.check_secret(secret)
    assert isinstance(caught.value, ConfigError)
    assert caught.value.key == "secret"
    assert "hunter" not in str(caught.value) + repr(caught.value.value)


@pytest.mark.parametrize("lane", list(LANES.values()))
@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("producer", [IDENTITY.producer, ANY_PRODUCER])
def test_both_sides_agree(lane: Lane, secret: bytes | None, producer: bytes) -> None:
    client, server = ClientHandshake(lane, producer, secret), ServerHandshake(lane, IDENTITY, secret)
    assert shake(client, server) is None
    assert client.done
    assert server.done
    assert client.server == IDENTITY


def test_largest_identity_fits() -> None:
    identity = ServerIdentity(b"\xff" * 16, 2**64 - 1, 2**64 - 1, 2**32 - 1, 64)
    client = ClientHandshake(TCP, identity.producer)
    shake(client, ServerHandshake(TCP, identity))
    assert client.server == identity


@pytest.mark.parametrize(("mine", "theirs"), [(None, SECRET), (SECRET, None)])
def test_one_side_without_the_secret_is_an_authentication_error(mine: bytes | None, theirs: bytes | None) -> None:
    client, server = (
        ClientHandshake(TCP, IDENTITY.producer, mine),
        ServerHandshake(TCP, IDENTITY, theirs),
    )
    with pytest.raises(AuthenticationError, match="this client" if mine is None else "the server"):
        client.receive(server.receive(client.hello()))
    assert not client.done


def test_wrong_secret_is_found_by_the_client_from_the_servers_proof() -> None:
    client = ClientHandshake(TCP, IDENTITY.producer, b"another")
    server = ServerHandshake(TCP, IDENTITY, SECRET)
    with pytest.raises(AuthenticationError, match="server's proof"):
        client.receive(server.receive(client.hello()))


@pytest.mark.parametrize("forged", [NO_PROOF, b"x" * 32])
@pytest.mark.parametrize("flag", [HelloFlag.NONE, HelloFlag.SECRET])
def test_a_client_that_cannot_prove_the_secret_is_denied(forged: bytes, flag: HelloFlag) -> None:
    server = ServerHandshake(TCP, IDENTITY, SECRET)
    server.receive(HELLO.pack(MAGIC, VERSION, TCP.number, flag, IDENTITY.producer, b"n" * 32))
    assert server.receive(PROOF.pack(forged)) == WELCOME.pack(MAGIC, Verdict.DENIED, 0)
    assert server.verdict is Verdict.DENIED
    assert not server.done


def test_the_servers_proof_reflected_is_denied() -> None:
    client = ClientHandshake(TCP, IDENTITY.producer, SECRET)
    server = ServerHandshake(TCP, IDENTITY, SECRET)
    challenge = CHALLENGE.unpack(server.receive(client.hello()))
    server.receive(PROOF.pack(challenge[6]))
    assert server.verdict is Verdict.DENIED


def test_a_proof_of_another_handshake_is_denied() -> None:
    """Replayed nonces do not help: the server's is fresh."""
    client = ClientHandshake(TCP, IDENTITY.producer, SECRET)
    first, second = (ServerHandshake(TCP, IDENTITY, SECRET) for _ in range(2))
    answer = client.receive(first.receive(client.hello()))
    assert answer is not None
    second.receive(client.hello())
    second.receive(answer)
    assert second.verdict is Verdict.DENIED


@pytest.mark.parametrize("changed", ["role", "version", "lane", "nonces", "producer", "secret"])
def test_a_proof_covers_everything(changed: str) -> None:
    given = {
        "secret": SECRET,
        "role": b"client",
        "version": 1,
        "lane": TCP,
        "nonces": b"n" * 64,
        "producer": b"p" * 16,
    }
    other = {
        "secret": b"x",
        "role": b"server",
        "version": 2,
        "lane": UCX,
        "nonces": b"m" * 64,
        "producer": b"q" * 16,
    }
    assert wire.proof(**given) != wire.proof(**{**given, changed: other[changed]})  # type: ignore[arg-type]


def test_hello_of_another_version_is_answered_and_recognised() -> None:
    server = ServerHandshake(TCP, IDENTITY)
    answer = server.receive(HELLO.pack(MAGIC, VERSION + 1, TCP.number, 0, ANY_PRODUCER, bytes(32)))
    assert server.verdict is Verdict.VERSION
    with pytest.raises(VersionMismatch, match=f"this client version {VERSION}") as caught:
        ClientHandshake(TCP).receive(answer)
    assert caught.value.version == VERSION


@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_server_answers_an_older_client_in_its_version(secret: bytes | None) -> None:
    client = ClientHandshake(TCP, IDENTITY.producer, secret, version=MIN_VERSION)
    server = ServerHandshake(TCP, IDENTITY, secret)
    assert shake(client, server) is None
    assert server.version == MIN_VERSION


@pytest.mark.parametrize("secret", [None, SECRET])
def test_an_older_server_refuses_a_newer_client_with_its_own_version(secret: bytes | None) -> None:
    server = ServerHandshake(TCP, IDENTITY, secret, newest=MIN_VERSION)
    with pytest.raises(VersionMismatch) as caught:
        ClientHandshake(TCP, IDENTITY.producer, secret).receive(
            server.receive(ClientHandshake(TCP, IDENTITY.producer, secret).hello())
        )
    assert caught.value.version == MIN_VERSION
    again = ClientHandshake(TCP, IDENTITY.producer, secret, version=MIN_VERSION)
    assert shake(again, ServerHandshake(TCP, IDENTITY, secret, newest=MIN_VERSION)) is None


def test_a_proof_of_another_version_is_refused() -> None:
    """An attacker who changes the version in both directions changes what the proofs cover."""
    client, server = ClientHandshake(TCP, IDENTITY.producer, SECRET), ServerHandshake(TCP, IDENTITY, SECRET)
    hello = bytearray(client.hello())
    hello[4] = MIN_VERSION
    challenge = bytearray(server.receive(hello))
    challenge[4] = VERSION
    with pytest.raises(AuthenticationError, match="server's proof"):
        client.receive(challenge)


def test_server_of_another_version_is_recognised() -> None:
    answer = bytearray(ServerHandshake(TCP, IDENTITY).receive(ClientHandshake(TCP).hello()))
    answer[4] = 9
    with pytest.raises(VersionMismatch, match="version 9"):
        ClientHandshake(TCP).receive(answer)


@pytest.mark.parametrize("hello", [bytes(64), b"GET / HTTP/1.1\r\n" + b"x" * 48, b"DRAY" + bytes(60)])
def test_hello_that_is_none_is_malformed(hello: bytes) -> None:
    server = ServerHandshake(TCP, IDENTITY)
    server.receive(hello)
    assert server.verdict is not Verdict.WELCOME


def test_hello_for_another_lane_is_malformed() -> None:
    server = ServerHandshake(TCP, IDENTITY)
    answer = server.receive(ClientHandshake(UCX).hello())
    assert server.verdict is Verdict.MALFORMED
    with pytest.raises(ProtocolError, match="malformed"):
        ClientHandshake(UCX).receive(answer)


def test_a_server_that_refused_hello_takes_no_proof_for_it() -> None:
    server = ServerHandshake(TCP, IDENTITY)
    server.receive(bytes(64))
    server.receive(PROOF.pack(NO_PROOF))
    assert not server.done


@pytest.mark.parametrize("verdict", [Verdict.MALFORMED, 200])
def test_refused_welcome_names_the_verdict(verdict: int) -> None:
    client, server = ClientHandshake(TCP), ServerHandshake(TCP, IDENTITY)
    client.receive(server.receive(client.hello()))
    with pytest.raises(ProtocolError, match=str(verdict) if verdict == 200 else "malformed"):
        client.receive(WELCOME.pack(MAGIC, verdict, 0))


def test_denied_welcome_is_an_authentication_error() -> None:
    client, server = ClientHandshake(TCP), ServerHandshake(TCP, IDENTITY)
    client.receive(server.receive(client.hello()))
    with pytest.raises(AuthenticationError):
        client.receive(WELCOME.pack(MAGIC, Verdict.DENIED, 0))


@pytest.mark.parametrize("message", [bytes(128), b"HTTP/1.1 400 Bad Request" + bytes(104)])
def test_a_peer_that_speaks_something_else_is_a_protocol_error(message: bytes) -> None:
    with pytest.raises(ProtocolError, match="does not speak"):
        ClientHandshake(TCP).receive(message)


def test_another_producer_is_recognised_whatever_its_secret() -> None:
    """Another job may listen on the address of a dead producer: it is no failed authentication."""
    client = ClientHandshake(TCP, b"q" * 16, SECRET)
    server = ServerHandshake(TCP, IDENTITY, b"another job's secret")
    assert client.receive(server.receive(client.hello())) is None
    assert not client.done
    assert client.server is not None
    assert client.server.producer == IDENTITY.producer
