"""The owner's side of an agent that ends, comes back, or is none."""

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from waiting import wait_until

from dray import SharedRingBuffer
from dray.agent import Agent, Registration
from dray.agent.messages import MAX_MESSAGE, Answer
from dray.errors import BufferClosedError, ConfigError, DrayError, ProtocolError, Unreachable
from dray.ring.direct import direct_problem

pytestmark = pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")

SECRET = bytes(range(32))
WATCHING = "dray-registration"


def test_an_agent_that_is_back_has_the_rings_of_living_owners_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with SharedRingBuffer(4, 100) as ring:
        first = Agent(tmp_path)
        with Registration(ring, first.path, name="sampler") as registration:
            before = registration.endpoints
            first.close()
            wait_until(lambda: "no heir for sampler" in caplog.text, "the end of the agent to be noticed")
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
                listening.bind(str(first.path))
                listening.listen()
                listening.settimeout(20)
                listening.accept()[0].close()  # the owner has come, and comes again
            first.path.unlink()
            with Agent(tmp_path) as second:
                wait_until(lambda: "has an heir again" in caplog.text, "the ring to be registered again")
                assert second.statistics().registered == 1
                assert registration.endpoints == before
                assert caplog.messages[-1] == "sampler has an heir again"


def test_an_owner_reports_addresses_that_an_agent_which_is_back_does_not_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with SharedRingBuffer(4, 100) as ring:
        first = Agent(tmp_path)
        options = {"lanes": ("shm", "tcp"), "secret": SECRET}
        with Registration(ring, first.path, name="sampler", **options) as registration:  # type: ignore[arg-type]
            on_tcp = registration.endpoints[1]
            first.close()
            port = int(on_tcp.rpartition(":")[2])
            with socket.create_server(("127.0.0.1", port)), Agent(tmp_path):  # no agent gets this port now
                wait_until(lambda: "has an heir again" in caplog.text, "the ring to be registered again")
                assert caplog.messages[-1] == f"sampler has an heir again; it does not have the addresses {on_tcp}"


def test_a_ring_that_was_closed_meanwhile_is_not_registered_again(tmp_path: Path) -> None:
    ring = SharedRingBuffer(4, 100)
    first = Agent(tmp_path)
    with Registration(ring, first.path, name="sampler"):
        ring.close()
        first.close()
        wait_until(lambda: WATCHING not in {each.name for each in threading.enumerate()}, "the end of the thread")
        with Agent(tmp_path) as second, SharedRingBuffer(4, 100) as other:
            with Registration(other, second.path, name="other"):
                assert second.statistics().registered == 1
            with pytest.raises(BufferClosedError):
                Registration(ring, second.path, name="sampler")


def test_a_registration_ends_at_once_while_there_is_no_agent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with SharedRingBuffer(4, 100) as ring:
        first = Agent(tmp_path)
        with Registration(ring, first.path, name="sampler") as registration:
            first.close()
            wait_until(lambda: "no heir for sampler" in caplog.text, "the end of the agent to be noticed")
            registration.close()
    assert "again; " not in caplog.messages[-1]


def answered(folder: Path, answer: Callable[[socket.socket], object]) -> DrayError:
    """What an owner raises when its agent answers like this."""
    path = folder / "agent.sock"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening,
        SharedRingBuffer(4, 100) as ring,
        ThreadPoolExecutor(1) as pool,
    ):
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(20)

        def agent() -> None:
            with listening.accept()[0] as connection:
                connection.recv(MAX_MESSAGE)
                answer(connection)

        done = pool.submit(agent)
        with pytest.raises(DrayError) as caught:
            Registration(ring, path, name="sampler", timeout=20)
        done.result(20)
        return caught.value


def test_an_agent_that_closes_the_connection_instead_of_an_answer_is_unreachable(tmp_path: Path) -> None:
    error = answered(tmp_path, lambda connection: None)
    assert isinstance(error, Unreachable)
    assert "the agent has closed the connection" in str(error)
    assert str(tmp_path) in str(error)


def test_an_answer_that_is_none_is_an_error_of_the_protocol(tmp_path: Path) -> None:
    assert isinstance(answered(tmp_path, lambda connection: connection.send(b"welcome")), ProtocolError)


def test_a_refusal_names_the_agent_and_its_reason(tmp_path: Path) -> None:
    refusal = Answer(refused="no room").encode()
    error = answered(tmp_path, lambda connection: connection.send(refusal))
    assert isinstance(error, ConfigError)
    assert f"{tmp_path}/agent.sock does not take the ring (no room)" in str(error)


def test_rings_that_cannot_be_inherited_are_not_registered(tmp_path: Path) -> None:
    with Agent(tmp_path) as agent:
        with SharedRingBuffer(4, 100, retain="newest") as newest, pytest.raises(ConfigError, match="retain"):
            Registration(newest, agent.path, name="sampler")
        with (
            SharedRingBuffer(2048, 8, readers=33) as large,
            pytest.raises(ConfigError, match=r"slots x readers of at most 65536"),
        ):
            Registration(large, agent.path, name="sampler")
        assert (agent.statistics().registered, agent.statistics().refused) == (0, 0)
