"""What an agent accepts, what it refuses, and what it counts."""

import array
import contextlib
import functools
import logging
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_fixtures import answer_to, client_of, owner, put, running_agent
from forbidding import no_more_descriptors
from transport_fixtures import Child, pattern, reference
from waiting import wait_until

from dray import SharedRingBuffer
from dray.admission import MAX_UNPROVEN, Unproven
from dray.agent import Agent, Registration, agent
from dray.agent.messages import MAX_MESSAGE, Request
from dray.errors import ConfigError, ProducerLostError
from dray.ring.direct import direct_problem

pytestmark = pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")

REQUEST = Request("owner", 1, 8, ("shm",), "127.0.0.1").encode()


@contextlib.contextmanager
def connected(to: Agent) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.settimeout(20)
        raw.connect(str(to.path))
        yield raw


# --- limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "value"), [("memory", 0), ("keep", 0.0), ("keep", float("inf")), ("keep", float("nan"))]
)
def test_a_limit_that_is_none_is_refused_by_its_name(tmp_path: Path, limit: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{limit} = ") as caught:
        Agent(tmp_path, **{limit: value})  # type: ignore[arg-type]
    assert "more than 0" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_path_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        Agent(tmp_path / ("x" * 100))


def test_rings_above_the_limit_of_their_number_are_refused_until_one_is_withdrawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent, "MAX_RINGS", 1)
    with running_agent() as running, SharedRingBuffer(4, 100) as first, SharedRingBuffer(4, 100) as second:
        with Registration(first, running.path, name="first"):
            assert repr(running) == f"<Agent at {running.path}, 1 rings>"
            with pytest.raises(ConfigError, match="the agent holds 1 rings already"):
                Registration(second, running.path, name="second")
        wait_until(lambda: running.statistics().registered == 0, "the first to be withdrawn")
        with Registration(second, running.path, name="second"):
            assert running.statistics().refused == 1
        running.close()
        assert repr(running) == f"<Agent at {running.path}, closed>"


def test_a_ring_of_more_memory_than_all_may_have_is_dropped_at_once() -> None:
    with running_agent(memory=1) as running, owner(running) as child, client_of("shm") as client:
        child.receive()
        refs = put(child, 1, 2)
        child.kill()
        wait_until(lambda: running.statistics().dropped == 2, "the payloads to be dropped")
        with pytest.raises(ProducerLostError):
            client.read_bytes(refs[0], timeout=20)
        assert running.statistics().consumed == 0


def test_a_payload_that_is_never_consumed_holds_the_memory_of_its_ring_until_its_time_has_passed() -> None:
    with running_agent(keep=6.0) as running, owner(running) as child, client_of("shm") as client:
        child.receive()
        refs = put(child, 1, 2, 3)
        child.kill()
        assert client.consume(refs[1:], timeout=20) == 2
        wait_until(lambda: running.statistics().left == 1, "two payloads to be consumed")
        found = running.statistics()
        assert (found.inherited_payloads, found.consumed, found.dropped) == (3, 2, 0)
        assert found.memory > 0
        wait_until(lambda: running.statistics().inheritances == 0, "the end of the time", 30.0)
        found = running.statistics()
        assert (found.consumed, found.dropped, found.left, found.memory) == (2, 1, 0, 0)


def test_what_is_left_when_an_agent_ends_counts_as_dropped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dray.agent")
    with running_agent() as running, owner(running) as child, client_of("shm") as client:
        child.receive()
        refs = put(child, 1, 2, 3)
        child.kill()
        client.read_bytes(refs[0], timeout=20)
        wait_until(lambda: running.statistics().left == 2, "a payload to be consumed")
        running.close()
        found = running.statistics()
        assert (found.inherited_payloads, found.consumed, found.dropped, found.left) == (3, 1, 2, 0)
        assert (found.inheritances, found.memory) == (0, 0)
        (line,) = [each for each in caplog.messages if "dropped" in each]
        assert line == f"dropped 2 of 3 payloads of owner (pid {child.pid}): the agent has ended"


# --- connections ------------------------------------------------------------------------------------------------


def test_silent_connections_are_displaced_by_newer_ones() -> None:
    with running_agent() as running, contextlib.ExitStack() as opened, SharedRingBuffer(4, 100) as ring:
        first = opened.enter_context(connected(running))
        for _ in range(MAX_UNPROVEN):
            opened.enter_context(connected(running))
        assert first.recv(MAX_MESSAGE) == b""
        with Registration(ring, running.path, name="owner"):
            assert running.statistics().registered == 1
        newest = opened.enter_context(connected(running))
        assert answer_to(running, b"{}", []).refused
        running.close()
        assert newest.recv(MAX_MESSAGE) == b"", "an agent that ends closes them"


def test_a_silent_connection_is_closed_when_its_time_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "Unproven", functools.partial(Unproven, seconds=0.1))
    with running_agent() as running, connected(running) as silent:
        assert silent.recv(MAX_MESSAGE) == b""
        assert running.statistics().refused == 0


CONNECT = """
import os, socket, sys
os.setuid(12345)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
    raw.connect(sys.argv[1])
    sys.exit(len(raw.recv(4096)))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_process_of_another_user_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o711)  # with the mode that it should have, another user does not come as far as this
        with Agent(Path(folder)) as running:
            running.path.chmod(0o777)
            command = [sys.executable, "-S", "-c", CONNECT, str(running.path)]
            assert subprocess.run(command, timeout=30).returncode == 0
    assert any("belongs to user 12345, not to this one" in line for line in caplog.messages)


SILENT_OWNER = """
import array, socket
from dray.agent.messages import MAX_MESSAGE, Answer, Request
ring = SharedRingBuffer(4, 1 << 16)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
    raw.connect(arguments["agent"])
    descriptors = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", ring.for_heir()))]
    raw.sendmsg([Request("owner", 1, 8, ("shm",), "127.0.0.1").encode()], descriptors)
    heirs = Answer.decode(raw.recv(MAX_MESSAGE)).endpoints
    raw.send(b"what is no message")
server = PayloadServer(ring, lane="shm", heirs=heirs, threads=1)
send(json.loads(server.put_bytes(pattern(1, 40000)).to_json()))
receive()
server.close()
ring.close()
send()
receive()
"""


def test_an_owner_whose_connection_has_ended_has_its_heir_all_the_same() -> None:
    with running_agent() as running, Child(SILENT_OWNER, agent=str(running.path)) as child:
        ref = reference(child.receive())
        child.kill()
        with client_of("shm") as client:
            assert client.read_bytes(ref, timeout=20).tobytes() == pattern(1, 40_000)


def test_an_owner_whose_connection_has_ended_leaves_nothing_once_it_has_closed_its_ring() -> None:
    with running_agent() as running, Child(SILENT_OWNER, agent=str(running.path)) as child:
        child.receive()
        child.ask()
        child.kill()
        wait_until(lambda: running.statistics().registered == 0, "the end of the owner")
        assert running.statistics().inherited_rings == 0


def test_an_owner_that_does_not_read_the_answer_has_registered() -> None:
    with running_agent() as running, SharedRingBuffer(4, 100) as ring:
        with connected(running) as raw:
            descriptors = array.array("i", ring.for_heir())
            raw.sendmsg([REQUEST], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
            assert select.select([raw], [], [], 20)[0]
        assert answer_to(running, b"{}", []).refused == "version None is not 1"
        assert running.statistics().registered == 1


# --- owners -----------------------------------------------------------------------------------------------------


def test_an_owner_that_is_killed_after_it_has_closed_its_ring_leaves_nothing() -> None:
    with running_agent() as running, owner(running) as child:
        child.receive()
        put(child, 1)
        child.ask("close ring")
        child.kill()
        wait_until(lambda: running.statistics().registered == 0, "the end of the owner")
        assert running.statistics().inherited_rings == 0


def test_a_forked_child_of_an_agents_process_leaves_the_agent_alone() -> None:
    with running_agent() as running, SharedRingBuffer(4, 100) as ring:
        with Registration(ring, running.path, name="owner") as registration:
            child = os.fork()
            if not child:
                registration.close()
                running.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert running.statistics().registered == 1
            assert repr(registration) == f"<Registration {registration.endpoints[0]}>"
        registration.close()
        wait_until(lambda: running.statistics().registered == 0, "the ring to be withdrawn")


def test_an_agent_without_descriptors_loses_what_an_owner_leaves_and_continues(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running_agent() as running, owner(running) as child, SharedRingBuffer(4, 100) as ring:
        child.receive()
        put(child, 1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as waiting:
            waiting.settimeout(20)
            with no_more_descriptors():
                waiting.connect(str(running.path))
                wait_until(lambda: "could not be accepted" in caplog.text, "the connection to be noticed")
                child.kill()
                wait_until(lambda: running.statistics().registered == 0, "the end of the owner")
            waiting.send(b"{}")
            assert waiting.recv(MAX_MESSAGE), "the agent accepts connections again"
        assert f"the payloads of owner (pid {child.pid}) are lost" in caplog.text
        with Registration(ring, running.path, name="owner"):
            assert running.statistics().registered == 1
