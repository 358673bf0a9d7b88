"""The head's end of connections between nodes, over real sockets."""

import json
import select
import selectors
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
from forbidding import no_more_descriptors
from waiting import wait_until

from dray.admission import MAX_UNPROVEN, Unproven
from dray.clock import Deadline
from dray.errors import AuthenticationError, TransportError
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import parse_job
from dray.jobs.launch.processes import JobProcess
from dray.jobs.messages import auth
from dray.jobs.messages.auth import ConnectionInfo, connect
from dray.jobs.messages.channel import MessageChannel, framed
from dray.jobs.messages.models import (
    KillReplica,
    ReplicaEnded,
    ReplicasRunning,
    ReplicaStarted,
    Role,
    SendSignal,
    Shutdown,
    StartReplica,
)
from dray.jobs.slurm.head import NodeConnections
from dray.jobs.slurm.placement import Placement

SECRET = bytes(range(32))
PLACED = [
    Placement(Role.POLICY, 1, ("b",), ()),
    Placement(Role.ROLLOUT, 0, ("c",), ()),
    Placement(Role.ROLLOUT, 1, ("c",), ()),
]
CONFIG = parse_job(
    {
        "job": {"name": "small", "max_steps": 10},
        "rollout": {"worker": "small.py:Worker"},
        "policy": {"trainer": "small.py:Trainer", "batch_size": 8},
    }
)


class Head:
    """`NodeConnections`, and a loop as the supervisor has one."""

    def __init__(self, folder: Path) -> None:
        (folder / ".run").mkdir()
        self.folder = JobFolder(folder, "001.1")
        self.nodes = NodeConnections(self.folder, "001.1", SECRET, PLACED, "127.0.0.1", 10.0)
        self.host = self.nodes.hosts["c"]
        self.selector = selectors.DefaultSelector()
        self.nodes.open(
            self.selector, JobSpec(CONFIG, folder / "job.toml", self.folder, SECRET, "", "small-1", False, 0)
        )
        for index in (0, 1):
            self.host.start(Role.ROLLOUT, index)
        self.pool = ThreadPoolExecutor(8)
        self.ended: list[JobProcess] = []

    @property
    def address(self) -> tuple[str, int]:
        document = json.loads(self.folder.head_address.read_text())
        return document["host"], document["port"]

    def guest(
        self, node: str, rank: int | None = None, attempt: str = "001.1", secret: bytes = SECRET
    ) -> Future[socket.socket]:
        purpose = ConnectionInfo(node=node, attempt=attempt, rank=rank)
        return self.pool.submit(connect, self.address, secret, purpose, Deadline.after(10.0), 10.0)

    def until(self, condition: Callable[[], object], awaited: str) -> None:
        wait_until(lambda: condition() or self._turn(), awaited, pause=0.0)

    def _turn(self) -> None:
        for key, _ in self.selector.select(0.05):
            key.data()
        self.nodes.apply_timeouts()
        self.ended += self.host.collect()

    def taken(self, guest: Future[socket.socket]) -> socket.socket:
        self.until(guest.done, "the guest")
        return guest.result()

    def channel(self, node: str = "c") -> MessageChannel:
        return MessageChannel(self.taken(self.guest(node)), "the head")


@contextmanager
def head_of(folder: Path) -> Iterator[Head]:
    head = Head(folder)
    try:
        yield head
    finally:
        with head.selector, head.pool:
            head.nodes.close()
            head.host.close(Deadline.after(0))


def test_address_is_for_the_owner_only_and_holds_no_secret(tmp_path: Path) -> None:
    with head_of(tmp_path) as head:
        path = head.folder.head_address
        assert path.stat().st_mode & 0o777 == 0o600
        assert SECRET.hex() not in path.read_text()


def started(channel: MessageChannel, **pids: int) -> None:
    for name, pid in pids.items():
        channel.post(ReplicaStarted(name=name.replace("_", "-"), pid=pid))


def test_node_receives_what_to_start_once_it_has_connected_and_afterwards(tmp_path: Path) -> None:
    with head_of(tmp_path) as head, closing(head.channel()) as channel:
        head.host.start(Role.ROLLOUT, 7)
        received: list[object] = []
        head.until(lambda: received.extend(channel.poll()) or len(received) == 3, "all commands")
        assert received == [StartReplica(name=f"rollout-{index}") for index in (0, 1, 7)]


def test_replicas_of_a_node_run_from_the_report_of_their_start_to_that_of_their_end(tmp_path: Path) -> None:
    with head_of(tmp_path) as head, closing(head.channel()) as channel:
        assert head.host.processes == []
        started(channel, rollout_0=70, rollout_1=71)
        head.until(lambda: len(head.host.processes) == 2, "the reports of their start")
        first, second = head.host.processes
        assert (first.name, first.pid, first.running, head.ended) == ("rollout-0", 70, True, [])
        second.signal(signal.SIGTERM)
        first.kill_group()
        received: list[object] = []
        head.until(lambda: received.extend(channel.poll()) or len(received) == 4, "all commands")
        assert received[2:] == [SendSignal(name="rollout-1", number=signal.SIGTERM), KillReplica(name="rollout-0")]
        channel.post(ReplicaEnded(name="rollout-0", code=10))
        head.until(lambda: head.ended, "the report of its end")
        assert head.ended == [first]
        assert (first.exit_code, first.ending, second.running) == (10, "the user's class raised", True)


def test_replica_that_was_restarted_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    with head_of(tmp_path) as head, closing(head.channel()) as channel:
        started(channel, rollout_0=70)
        channel.post(ReplicaEnded(name="rollout-0", code=10))
        head.until(lambda: head.ended, "the report of its end")
        head.host.start(Role.ROLLOUT, 0)
        started(channel, rollout_0=72)
        head.until(lambda: [each.pid for each in head.host.processes] == [72], "the report of the new one")
        assert [each.running for each in head.host.processes] == [True]


def test_replica_that_was_not_asked_for_is_none_of_the_job(tmp_path: Path) -> None:
    with head_of(tmp_path) as head, closing(head.channel()) as channel:
        started(channel, rollout_5=75, rollout_0=70)
        head.until(lambda: head.host.processes, "the report of the start")
        assert [each.name for each in head.host.processes] == ["rollout-0"]


def test_replica_of_a_node_is_seen_as_long_as_the_node_reports_that_it_runs(tmp_path: Path) -> None:
    with head_of(tmp_path) as head, closing(head.channel()) as channel:
        started(channel, rollout_0=70, rollout_1=71)
        head.until(lambda: len(head.host.processes) == 2, "the reports of their start")
        first, second = head.host.processes
        head.until(lambda: min(first.seconds_unseen(), second.seconds_unseen()) > 0.1, "some time")
        channel.post(ReplicasRunning(names=["rollout-1", "policy-1"]))
        head.until(lambda: second.seconds_unseen() < first.seconds_unseen() - 0.05, "the report that one runs")
        channel.post(ReplicasRunning(names=["rollout-0"]))
        head.until(lambda: first.seconds_unseen() < second.seconds_unseen(), "the report that the other runs")


@pytest.mark.parametrize(
    ("code", "asked", "ending"),
    [
        (143, signal.SIGTERM, "its node c was asked to end and sent it SIGTERM"),
        (-signal.SIGKILL, signal.SIGKILL, "its node c was asked to end and sent it SIGKILL"),
        (10, signal.SIGTERM, "the user's class raised"),
        (143, 0, "interrupted by SIGTERM"),
    ],
)
def test_z8_replica_that_its_own_node_has_asked_to_end_is_not_called_interrupted(
    tmp_path: Path, code: int, asked: int, ending: str
) -> None:
    with head_of(tmp_path) as head, closing(head.channel()) as channel:
        started(channel, rollout_0=70)
        channel.post(ReplicaEnded(name="rollout-0", code=code, request=asked))
        head.until(lambda: [each.exit_code for each in head.ended] == [code], "the report of its end")
        assert [each.ending for each in head.host.processes] == [ending]


def test_node_that_is_gone_takes_its_replicas_with_it(tmp_path: Path) -> None:
    with head_of(tmp_path) as head, closing(head.channel()) as channel:
        started(channel, rollout_0=70, rollout_1=71)
        channel.post(ReplicaEnded(name="rollout-0", code=0))
        channel.close()
        head.until(lambda: len(head.ended) == 2, "the end of both")
        assert [each.ending for each in head.host.processes] == ["finished", "its node c is gone"]
        with pytest.raises(TransportError, match="rejected the connection"):
            head.taken(head.guest("c"))


def test_ranks_are_given_out_in_order_once_all_are_there(tmp_path: Path) -> None:
    with head_of(tmp_path) as head:
        assert head.nodes.rank_connections() is None
        with head.taken(head.guest("b", rank=1)) as ours:
            (theirs,) = head.nodes.rank_connections() or []
            with theirs:
                ours.send(b"x")
                theirs.settimeout(5.0)
                assert theirs.recv(1) == b"x"
        assert head.nodes.rank_connections() == []


@pytest.mark.parametrize(
    ("node", "rank", "attempt"),
    [("a", None, "001.1"), ("c", None, "001.2"), ("c", 1, "001.1"), ("b", 2, "001.1")],
)
def test_connection_that_does_not_belong_to_the_attempt_is_refused(
    tmp_path: Path, node: str, rank: int | None, attempt: str
) -> None:
    with head_of(tmp_path) as head, pytest.raises(TransportError, match="rejected the connection"):
        head.taken(head.guest(node, rank, attempt))


def test_node_with_another_secret_is_refused(tmp_path: Path) -> None:
    with head_of(tmp_path) as head, pytest.raises((TransportError, AuthenticationError)):
        head.taken(head.guest("c", secret=b"another" * 5))


def test_strangers_that_send_nothing_keep_no_node_out_and_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "Unproven", partial(Unproven, seconds=0.3))
    with head_of(tmp_path) as head:
        strangers = [socket.create_connection(head.address) for _ in range(3)]
        try:
            head.channel().close()
            for stranger in strangers:
                stranger.settimeout(0)
                assert len(stranger.recv(64)) == 36
            gone = []

            def drop() -> bool:
                for stranger in [each for each in strangers if each not in gone]:
                    try:
                        if stranger.recv(1) == b"":
                            gone.append(stranger)
                    except BlockingIOError:
                        pass
                return len(gone) == len(strangers)

            head.until(drop, "the end of all connections")
        finally:
            for stranger in strangers:
                stranger.close()


def test_more_strangers_than_are_listened_to_push_out_the_oldest(tmp_path: Path) -> None:
    def is_open(stranger: socket.socket) -> bool:
        stranger.settimeout(5.0)
        assert len(stranger.recv(64)) == 36
        stranger.settimeout(0)
        try:
            return stranger.recv(1) != b""
        except BlockingIOError:
            return True

    with head_of(tmp_path) as head, ExitStack() as opened:
        strangers = [
            opened.enter_context(socket.create_connection(head.address)) for _ in range(MAX_UNPROVEN + 10)
        ]
        head.channel().close()  # has come in after all of them, and pushed out one more
        assert [is_open(stranger) for stranger in strangers] == [False] * 11 + [True] * (MAX_UNPROVEN - 1)


def test_strangers_make_few_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with head_of(tmp_path) as head:
        for _ in range(20):
            with socket.create_connection(head.address) as stranger:
                stranger.settimeout(5.0)
                head.until(lambda: select.select([stranger], [], [], 0)[0], "the nonce")
                stranger.sendall(framed(bytes(64)))
                stranger.recv(64)
                head.until(lambda: select.select([stranger], [], [], 0)[0], "the end of the connection")
                assert stranger.recv(1) == b""
        lines = [each.message for each in caplog.records if each.levelname == "WARNING"]
        assert lines == ["rejected a connection: the other end of a connection does not know the job's secret"]


def test_head_without_descriptors_accepts_later_and_does_not_spin(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def failures() -> list[str]:
        return [message for message in caplog.messages if "could not be accepted" in message]

    with head_of(tmp_path) as head, socket.socket() as early:
        address = head.address
        with no_more_descriptors():
            early.connect(address)
            head.until(failures, "the failure to accept")
            assert head.selector.select(0) == []
        head.until(lambda: select.select([early], [], [], 0)[0], "the nonce")
        assert len(failures()) == 1
        head.channel().close()


def test_shutdown_is_requested_and_its_confirmation_awaited(tmp_path: Path) -> None:
    with head_of(tmp_path) as head:
        channel = head.channel()

        def leave() -> list[object]:
            received: list[object] = []
            with closing(channel), selectors.DefaultSelector() as selector:
                selector.register(channel, selectors.EVENT_READ)
                while not channel.lost and selector.select(10.0):
                    received += channel.poll()
            return received

        left = head.pool.submit(leave)
        deadline = Deadline.after(30.0)
        head.host.request_shutdown()
        head.host.close(deadline)
        assert not deadline.expired
        assert left.result(10.0)[2:] == [Shutdown()]


def test_node_that_does_not_confirm_its_shutdown_is_left_in_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with head_of(tmp_path) as head, closing(head.channel()):
        head.host.request_shutdown()
        head.host.close(Deadline.after(0.2))
        head.host.close(Deadline.after(0.2))
        assert "node c did not confirm shutdown within 0.2 s" in caplog.text


def test_nodes_are_not_accepted_once_the_job_ends(tmp_path: Path) -> None:
    with head_of(tmp_path) as head:
        head.nodes.stop_accepting()
        with pytest.raises(TransportError, match="cannot be reached"):
            head.taken(head.guest("c"))
