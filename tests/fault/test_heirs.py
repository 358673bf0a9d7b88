"""Faults H1 to H4 of docs/reference/failure-modes.md: owners, agents and consumers that die, in every order."""

import contextlib
import os
import socket
from pathlib import Path

import pytest
from agent_fixtures import NBYTES, OWNER, answer_to, client_of, owner, put, running_agent, wait_inherited
from direct_fixtures import producing
from transport_fixtures import Child, pattern
from waiting import wait_until

from dray import PayloadServer, SharedRingBuffer
from dray.agent import AGENT_VARIABLE, Agent, Registration, find_agent, register
from dray.agent.messages import Request
from dray.errors import (
    ConfigError,
    ProducerLostError,
    StaleSlotError,
    TransportError,
    TransportTimeout,
    Unreachable,
)
from dray.private_directory import PrivateDirectory
from dray.ring.direct import direct_problem

pytestmark = pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")

# --- H1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_h1_payloads_of_a_killed_owner_are_read_and_consumed_at_its_heir(lane: str) -> None:
    with running_agent() as agent, owner(agent, lanes=[lane]) as child, client_of(lane) as client:
        child.receive()
        refs = put(child, *range(5))
        assert client.read_bytes(refs[0]).tobytes() == pattern(0, NBYTES)
        child.ask("write")
        child.kill()
        for seed, ref in enumerate(refs[1:], 1):
            assert client.read_bytes(ref, timeout=20, consume=False).tobytes() == pattern(seed, NBYTES)
        # On tcp the acknowledgement of the first may have been lost: then it was sent again, to the heir.
        wait_until(lambda: agent.statistics().left == 4, "the inheritance", story=agent.statistics)
        with pytest.raises(StaleSlotError):
            client.read_bytes(refs[0], timeout=20)
        with client.lease_bytes(refs[1], timeout=20) as leased:
            assert leased.data.tobytes() == pattern(1, NBYTES)
        assert client.consume(refs[2:], timeout=20) == 3
        wait_until(lambda: agent.statistics().inheritances == 0, "the end of the inheritance")
        assert agent.statistics().dropped == 0
        with pytest.raises(ProducerLostError):
            client.read_bytes(refs[1], timeout=20)


def test_h1_a_client_that_never_met_the_owner_reads_from_its_heir() -> None:
    with running_agent() as agent, owner(agent) as child:
        child.receive()
        refs = put(child, 1, 2)
        child.kill()
        with client_of("shm") as client:
            assert client.read_bytes(refs[0], timeout=20).tobytes() == pattern(1, NBYTES)
            assert client.read_bytes(refs[1], timeout=20).tobytes() == pattern(2, NBYTES)
            assert client.statistics().reads == 2
        wait_until(lambda: agent.statistics().inheritances == 0, "the end of the inheritance")


def test_h1_a_lease_that_began_at_the_owner_ends_at_its_heir() -> None:
    with running_agent() as agent, owner(agent) as child, client_of("shm") as client:
        child.receive()
        first, second = put(child, 1, 2)
        client.read_bytes(first)
        lease = client.lease_bytes(second)
        with lease as leased:
            child.kill()
            wait_inherited(agent, 1)
            assert leased.data.tobytes() == pattern(2, NBYTES)
        wait_until(lambda: agent.statistics().inheritances == 0, "the acknowledgement to reach the heir")


def test_h1_an_owner_that_is_stopped_or_has_lost_its_descriptors_is_not_dead() -> None:
    with running_agent() as agent, owner(agent) as child:
        child.receive()
        refs = put(child, 1, 2)
        child.stop()
        child.resume()
        child.ask("close descriptors")
        with client_of("shm") as client, pytest.raises(TransportError):
            client.read_bytes(refs[0], timeout=5)
        found = agent.statistics()
        assert (found.inherited_rings, found.registered) == (0, 1)
        child.kill()
        with client_of("shm") as client:
            assert client.read_bytes(refs[1], timeout=20).tobytes() == pattern(2, NBYTES)
        wait_inherited(agent, 2)


def test_h1_a_surviving_child_of_the_owner_delays_nothing() -> None:
    with running_agent() as agent, owner(agent) as child:
        child.receive()
        (ref,) = put(child, 1)
        forked = child.ask("fork")
        try:
            child.process.kill()  # not waited for: the child has its standard streams
            with client_of("shm") as client:
                assert client.read_bytes(ref, timeout=20).tobytes() == pattern(1, NBYTES)
        finally:
            os.kill(forked, 9)


def test_h1_a_consumer_that_finds_no_server_of_a_living_owner_is_turned_away() -> None:
    with running_agent() as agent, owner(agent) as child, client_of("shm") as client:
        child.receive()
        (ref,) = put(child, 1)
        child.ask("close server")
        with pytest.raises(TransportError):
            client.read_bytes(ref, timeout=20)
        assert agent.statistics().turned_away >= 1
        child.kill()
        with client_of("shm") as other:
            assert other.read_bytes(ref, timeout=20).tobytes() == pattern(1, NBYTES)


def test_an_owner_that_closes_in_order_leaves_nothing() -> None:
    with running_agent() as agent, owner(agent) as child, client_of("shm") as client:
        child.receive()
        (ref,) = put(child, 1)
        child.send(None)
        assert child.process.wait(30) == 0
        wait_until(lambda: agent.statistics().registered == 0, "the ring to be withdrawn")
        with pytest.raises(ProducerLostError):
            client.read_bytes(ref, timeout=20)
        assert agent.statistics().inherited_rings == 0
        assert [each.name for each in agent.path.parent.iterdir() if each.suffix == ".sock"] == [agent.path.name]


# --- H2 ---------------------------------------------------------------------------------------------------------

AGENT = """
from dray.agent import Agent
from dray.private_directory import PrivateDirectory
with PrivateDirectory() as folder, Agent(folder.path) as agent:
    send(str(agent.path))
    receive()
"""


def test_h2_an_owner_continues_when_the_agent_is_killed_and_its_payloads_end_with_it() -> None:
    with Child(AGENT) as agent:
        path = agent.receive()
        with Child(OWNER, agent=path, lanes=["shm"], slots=4, secret="") as child, client_of("shm") as client:
            child.receive()
            first, second = put(child, 1, 2)
            agent.kill()
            (third,) = put(child, 3)
            for seed, ref in ((1, first), (3, third)):
                assert client.read_bytes(ref, timeout=20).tobytes() == pattern(seed, NBYTES)
            child.kill()
            with client_of("shm") as other, pytest.raises(ProducerLostError):
                other.read_bytes(second, timeout=20)


STANDING_AGENT = """
import dataclasses
from dray.agent import Agent, standing_folder
with standing_folder() as folder, Agent(folder) as agent:
    send(str(agent.path))
    while receive() is not None:
        send(dataclasses.asdict(agent.statistics()))
"""


def test_h2_an_agent_that_restarts_is_the_heir_of_living_owners(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DRAY_RUNTIME_DIR", str(tmp_path))
    with Child(STANDING_AGENT) as first:
        path = first.receive()
        assert find_agent() == Path(path)
        with Child(OWNER, agent=path, lanes=["shm"], slots=4, secret="") as child:
            child.receive()
            refs = put(child, 1, 2)
            first.kill()
            with Child(STANDING_AGENT) as second:
                assert second.receive() == path
                wait_until(lambda: second.ask("statistics")["registered"] == 1, "the owner to register again")
                child.kill()
                with client_of("shm") as client:
                    for seed, ref in enumerate(refs, 1):
                        assert client.read_bytes(ref, timeout=20).tobytes() == pattern(seed, NBYTES)
                second.send(None)
                assert second.process.wait(30) == 0
    assert find_agent() is None


def test_h2_without_an_agent_a_ring_has_no_heir_and_one_line_reports_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with SharedRingBuffer(4, 100) as ring:
        monkeypatch.delenv(AGENT_VARIABLE, raising=False)
        monkeypatch.setenv("DRAY_RUNTIME_DIR", str(tmp_path))
        assert register(ring, find_agent(), name="owner") is None
        assert not caplog.messages
        monkeypatch.setenv(AGENT_VARIABLE, str(tmp_path / "agent.sock"))
        assert register(ring, find_agent(), name="owner") is None
        (line,) = caplog.messages
        assert line.startswith("no heir: ")
        with pytest.raises(Unreachable):
            Registration(ring, tmp_path / "agent.sock", name="owner")


def test_h2_an_agent_that_does_not_answer_is_not_waited_for_without_limit(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent, SharedRingBuffer(4, 100) as ring:
        silent.bind(str(tmp_path / "agent.sock"))
        silent.listen()
        with pytest.raises(TransportTimeout):
            Registration(ring, tmp_path / "agent.sock", name="owner", timeout=0.05)


# --- H3 ---------------------------------------------------------------------------------------------------------


def test_h3_the_oldest_inheritance_is_dropped_above_the_limit_of_memory(caplog: pytest.LogCaptureFixture) -> None:
    with running_agent(memory=200_000) as agent, contextlib.ExitStack() as children:
        refs = []
        for seed in range(3):
            child = children.enter_context(owner(agent))
            child.receive()
            refs.append(put(child, seed, seed + 10))
            child.kill()
            wait_inherited(agent, 2 * seed + 2)
        wait_until(lambda: agent.statistics().inheritances == 2, "the oldest to be dropped")
        assert agent.statistics().dropped == 2
        assert agent.statistics().memory <= 200_000
        assert any("dropped 2 of 2 payloads" in line for line in caplog.messages)
        with client_of("shm") as client:
            with pytest.raises((ProducerLostError, StaleSlotError)):
                client.read_bytes(refs[0][0], timeout=20)
            for seed in (1, 2):
                assert client.read_bytes(refs[seed][0], timeout=20).tobytes() == pattern(seed, NBYTES)


def test_h3_what_is_not_consumed_in_time_is_dropped_and_counted() -> None:
    with running_agent(keep=0.2) as agent, owner(agent) as child, client_of("shm") as client:
        child.receive()
        (ref,) = put(child, 1)
        child.kill()
        wait_until(lambda: agent.statistics().dropped == 1, "the end of the time")
        with pytest.raises(ProducerLostError):
            client.read_bytes(ref, timeout=20)


# --- H4 ---------------------------------------------------------------------------------------------------------


def test_h4_nothing_is_left_of_an_agent_that_is_closed() -> None:
    with PrivateDirectory() as folder:
        with Agent(folder.path) as agent, owner(agent) as dead, owner(agent) as alive, client_of("shm") as client:
            dead.receive()
            alive.receive()
            (ref,) = put(dead, 1)
            put(alive, 2)
            dead.kill()
            with client.lease_bytes(ref, timeout=20) as leased:
                agent.close()
                agent.close()
                assert leased.data.tobytes() == pattern(1, NBYTES)
            with client_of("shm") as other, pytest.raises(ProducerLostError):
                other.read_bytes(ref, timeout=20)
        assert [each.name for each in folder.path.iterdir()] == ["lock"]


def test_h4_inherited_memory_and_threads_end_with_their_payloads() -> None:
    with running_agent() as agent:
        before: set[str] | None = None
        for seed in range(4):
            with owner(agent) as child, client_of("shm") as client:
                child.receive()
                refs = put(child, seed, seed + 1)
                child.kill()
                for ref in refs:
                    client.read_bytes(ref, timeout=20)
            wait_until(lambda: agent.statistics().registered == 0, "the end of the owner to be noticed")
            wait_until(lambda: agent.statistics().inheritances == 0, "the end of the inheritance")
            held = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  (names alone)
            before = held if before is None else before
            assert len(held) <= len(before)
        assert (agent.statistics().left, agent.statistics().memory) == (0, 0)


# --- what is refused --------------------------------------------------------------------------------------------


def test_registrations_that_are_wrong_are_refused_and_the_agent_continues() -> None:
    request = Request("owner", 1, 8, ("shm",), "127.0.0.1").encode()
    with running_agent() as agent, SharedRingBuffer(4, 100) as ring:
        good = ring.for_heir()
        with contextlib.ExitStack() as opened:
            other = os.pidfd_open(1)
            opened.callback(os.close, other)
            for message, descriptors in (
                (b"{}", good),
                (request, good[:4]),
                (request, [good[1], *good[1:]]),
                (request, [*good[:2], good[1], *good[3:]]),
                (request, [*good[:4], good[3]]),
                (request, [*good[:4], other]),
                (Request("owner", 2, 8, ("shm",), "127.0.0.1").encode(), good),
                (Request("owner", 1, 8, ("ucx", "tcp"), "127.0.0.1").encode(), good),
                (Request("owner", 1, 8, ("tcp",), "127.0.0.1", b"short").encode(), good),
            ):
                assert answer_to(agent, message, descriptors).refused
        with pytest.raises(ConfigError, match="does not take the ring"):
            Registration(ring, agent.path, name="owner", lanes=["ucx"])
        assert agent.statistics().refused == 10
        with Registration(ring, agent.path, name="owner") as registration:
            assert agent.statistics().registered == 1
            assert registration.endpoints[0].startswith("heir+unix:")
        wait_until(lambda: agent.statistics().registered == 0, "the ring to be withdrawn")


def test_a_reference_that_an_heir_makes_too_long_does_without(caplog: pytest.LogCaptureFixture) -> None:
    with producing(heirs=["heir+unix:/" + "x" * 500]) as server:
        assert "heir" not in server.put_bytes(b"x").to_json()
        assert "too long" in caplog.text
    with producing(heirs=["heir+unix:/x"]) as server:
        assert server.put_bytes(b"x").endpoints == (*server.endpoints, "heir+unix:/x")


def test_an_owner_in_the_agents_process_is_served_by_its_own_server() -> None:
    with running_agent() as agent, SharedRingBuffer(4, 1 << 16) as ring:
        registration = Registration(ring, agent.path, name="owner")
        with (
            PayloadServer(ring, lane="shm", heirs=registration.endpoints, threads=1) as server,
            registration,
            client_of("shm") as client,
        ):
            assert client.read_bytes(server.put_bytes(b"bytes"), timeout=20).tobytes() == b"bytes"
        assert agent.statistics().turned_away == 0
