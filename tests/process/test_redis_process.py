"""A started Redis server as a process: how it begins, ends, is restarted, and what stays of it."""

import logging
import os
import random
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from forked_child import run_in_child
from waiting import ends_within, wait_until

from dray.clock import Deadline
from dray.errors import ConfigError, ControlPlaneError
from dray.jobs.queue import (
    JobKeys,
    RedisAddress,
    RedisConnection,
    RedisServer,
    RedisUnavailableError,
    RolloutConsumer,
    RolloutEntry,
    RolloutProducer,
    StreamLostError,
    WeightsChannel,
    configured_redis,
    start_redis,
)
from dray.jobs.queue import redis_server as embedded_module

KEYS = JobKeys("process")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with start_redis(tmp_path / "redis") as started:
        yield started


def entry(sequence: int) -> RolloutEntry:
    return RolloutEntry("cd" * 16, sequence, 0, "rollout-0", 0, reference="{}")


# --- beginning and ending --------------------------------------------------------------------------


def test_close_leaves_no_process_socket_or_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("DRAY_RUNTIME_DIR", str(run))
    server = start_redis(tmp_path / "redis", host="127.0.0.1")
    pid = server.pid
    assert pid is not None
    assert server.address.options()["path"].startswith(str(run))
    server.close()
    server.close()
    assert server.pid is None
    assert not psutil.pid_exists(pid)
    assert list(run.iterdir()) == list((tmp_path / "redis").iterdir()) == []
    with pytest.raises(ControlPlaneError):
        server.restart()


def test_password_is_in_no_command_line_environment_log_or_repr(server: RedisServer, tmp_path: Path) -> None:
    password = server.address.options()["password"]
    process = psutil.Process(server.pid)
    everything = [
        " ".join(process.cmdline()),
        str(process.environ()),
        repr(server),
        repr(server.address),
        str(server.address),
        *(path.read_text() for path in tmp_path.rglob("*") if path.is_file()),
    ]
    assert len(password) == 64
    assert not [text for text in everything if password in text]
    assert password in server.address.url


def test_no_client_gets_in_without_the_password(tmp_path: Path) -> None:
    with start_redis(tmp_path, host="127.0.0.1") as server:
        assert server.tcp_address is not None
        options = server.tcp_address.options()
        with pytest.raises(ConfigError, match=r"redis\.url") as caught:
            configured_redis(f"redis://:wrong@127.0.0.1:{options['port']}/0", KEYS)
        assert "wrong" not in str(caught.value).partition("(")[0]
        with pytest.raises(ConfigError, match=r"redis\.url"):
            configured_redis(f"redis://127.0.0.1:{options['port']}/0", KEYS)
        assert stat.S_IMODE(Path(server.address.options()["path"]).stat().st_mode) == 0o600


def test_unreachable_url_is_a_config_error_within_its_bound() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        url = f"redis://:sesame@127.0.0.1:{listener.getsockname()[1]}/0"
        before = time.monotonic()
        with pytest.raises(ConfigError) as caught:
            configured_redis(url, KEYS, timeout=0.5)
    assert time.monotonic() - before < 5
    assert caught.value.key == "redis.url"
    assert "sesame" not in str(caught.value)


def test_server_program_that_is_broken_is_a_typed_error_that_quotes_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "redis-server"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no memory today\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    with pytest.raises(ControlPlaneError, match="no memory today"):
        start_redis(tmp_path / "redis")
    assert [path.name for path in (tmp_path / "redis").iterdir()] == ["redis.log"]


def test_server_that_never_answers_is_killed_at_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "redis-server"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    with pytest.raises(ControlPlaneError, match="does not answer"):
        start_redis(tmp_path / "redis", timeout=0.5)
    assert not [child for child in psutil.Process().children() if child.name() == "sleep"]


def test_no_server_program_at_all_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"redis\.url.*embedded"):
        start_redis(tmp_path)


def test_taken_port_is_left_alone_and_another_one_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        class TakenFirst(random.Random):
            def sample(self, population: range, k: int) -> list[int]:
                return [port, *super().sample(population, k - 1)]

        monkeypatch.setattr(embedded_module.random, "SystemRandom", TakenFirst)
        with start_redis(tmp_path, host="127.0.0.1") as server:
            assert server.tcp_address is not None
            assert server.tcp_address.options()["port"] != port
            with RedisConnection(server.tcp_address) as connection:
                assert connection.call("PING", lambda client: client.do("PING"), Deadline.after(5))


def test_server_is_started_from_the_main_thread_only(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def start() -> None:
        try:
            start_redis(tmp_path)
        except ControlPlaneError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(10)
    assert "main thread" in str(caught[0])
    assert list(tmp_path.iterdir()) == []


def test_odd_and_long_directory_names_work(tmp_path: Path) -> None:
    for name in ('with space "quote" \\ ü', "d" * 120):
        with start_redis(tmp_path / name) as server, RedisConnection(server.address) as connection:
            assert connection.call("PING", lambda client: client.do("PING"), Deadline.after(5))
        assert list((tmp_path / name).iterdir()) == []


def test_stopped_server_is_killed_within_the_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = start_redis(tmp_path)
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    before = time.monotonic()
    server.close()
    assert time.monotonic() - before < 15
    assert not psutil.pid_exists(pid)
    assert "killing" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["redis.log"]


PARENT = """
import os, signal, sys
from pathlib import Path
from dray.jobs.queue import start_redis
signal.signal(signal.SIGINT, signal.default_int_handler)  # who started the tests may ignore it
server = start_redis(Path(sys.argv[1]))
print(server.pid, flush=True)
sys.stdin.read()
server.close()
"""


def test_server_has_its_own_group_and_dies_with_a_killed_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("DRAY_RUNTIME_DIR", str(run))
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert os.getpgid(pid) == pid != os.getpgid(parent.pid)
        parent.kill()
        parent.wait(10)
        assert ends_within(10, pid)
    assert len(list(run.iterdir())) == 1
    with start_redis(tmp_path):
        assert len(list(run.iterdir())) == 1, "what the dead parent left is swept"


def test_interrupt_at_the_terminal_does_not_reach_the_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.killpg(parent.pid, signal.SIGINT)
        parent.communicate(timeout=10)
        # Had the interrupt reached it, it would have ended by itself; it ended because its parent did.
        assert ends_within(10, pid)
    assert "SIGINT" not in (tmp_path / "redis.log").read_text()


def test_child_of_a_fork_does_not_stop_the_server(server: RedisServer) -> None:
    assert run_in_child(server.close) == ""
    assert server.pid is not None


# --- strangers ------------------------------------------------------------------------------------


@contextmanager
def idle_connections(address: RedisAddress, count: int) -> Iterator[None]:
    place = address.options()
    with ExitStack() as opened:
        for _ in range(count):
            opened.enter_context(socket.create_connection((place["host"], place["port"]), 10))
        yield


def test_idle_connections_do_not_keep_new_ones_of_the_job_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedded_module, "MAX_CLIENTS", 60)
    with start_redis(tmp_path / "redis", host="127.0.0.1") as server:
        assert server.tcp_address is not None
        with RedisConnection(server.tcp_address) as before:
            producer = RolloutProducer(before, KEYS)
            producer.publish(entry(0))
            for sequence in (1, 2):
                with (
                    idle_connections(server.tcp_address, 200),
                    RedisConnection(server.tcp_address) as new,
                    RedisConnection(server.address) as local,
                ):
                    for connection in (new, local):
                        RolloutProducer(connection, KEYS).publish(entry(sequence), timeout=30)
            producer.publish(entry(3))
            assert producer.statistics().backlog == 4
            assert before.away_for == 0
    assert "connections that had not authenticated" in caplog.text


def test_a_started_server_admits_as_many_clients_as_it_has_descriptors_for(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with (
        start_redis(tmp_path / "redis", host="127.0.0.1") as server,
        RedisConnection(server.address) as connection,
    ):
        for name, expected in (("maxclients", min(20_000, limit - 32)), ("timeout", 60)):
            found = connection.call(
                "ask", lambda client, name=name: client.do("CONFIG", "GET", name), Deadline.after(5)
            )
            assert int(found[1]) == expected, name


FEW_DESCRIPTORS = """
import resource, sys
from pathlib import Path
from dray.clock import Deadline
from dray.jobs.queue import RedisConnection, start_redis
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with start_redis(Path(sys.argv[1])) as server, RedisConnection(server.address) as connection:
    found = connection.call("ask", lambda client: client.do("CONFIG", "GET", "maxclients"), Deadline.after(5))
    print(int(found[1]))
"""


def test_a_started_server_has_room_for_a_job_with_64_descriptors(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FEW_DESCRIPTORS, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("32\n", "")


def test_an_idle_connection_that_the_server_closes_is_made_again_without_an_outage(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisConnection(server.address) as idle, RedisConnection(server.address) as other:
        producer = RolloutProducer(idle, KEYS)
        producer.publish(entry(0))
        # What the server's `timeout` does to a connection that has been idle for long.
        assert (
            other.call("kill", lambda client: client.do("CLIENT", "KILL", "SKIPME", "yes"), Deadline.after(5)) >= 1
        )
        assert producer.publish(entry(1), timeout=0)
    assert "does not answer" not in caplog.text


# --- outages ---------------------------------------------------------------------------------------


def test_redis_restarted_empty_loses_no_ready_payload(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dray.jobs.queue")
    with RedisConnection(server.address) as one, RedisConnection(server.address) as two:
        producer, consumer = RolloutProducer(one, KEYS), RolloutConsumer(two, KEYS, "policy-0")
        weights = WeightsChannel(two, KEYS)
        weights.publish("w", 1)
        for sequence in range(3):
            producer.publish(entry(sequence))
        (held,) = consumer.receive(1, timeout=5)
        server.restart()
        with pytest.raises(StreamLostError):
            producer.publish(entry(3))
        assert producer.attach()
        for sequence in range(4):
            producer.publish(entry(sequence))
        received = consumer.receive(10, timeout=5)
        assert [delivery.entry.sequence for delivery in received] == [1, 2, 3]
        assert len(consumer.commit([held, *received]).ended) == 4
        assert weights.restore()
        assert (consumer.statistics().backlog, consumer.statistics().counters["trained"]) == (0, 4)
    assert caplog.text.count("does not answer") <= 2, "once per outage and connection"


def test_every_payload_is_handed_out_once_through_three_restarts(server: RedisServer) -> None:
    count = 400
    with RedisConnection(server.address) as one, RedisConnection(server.address) as two:
        producer, consumer = RolloutProducer(one, KEYS), RolloutConsumer(two, KEYS, "policy-0")
        ready: dict[int, RolloutEntry] = {}  # what a ring knows: committed by its writer and not consumed

        def publish_all() -> None:
            for sequence in range(count):
                ready[sequence] = entry(sequence)
                to_publish = [ready[sequence]]
                while to_publish:
                    try:
                        producer.publish(to_publish[-1])
                        to_publish.pop()
                    except StreamLostError:
                        producer.attach()
                        to_publish = list(ready.values())

        thread = threading.Thread(target=publish_all)
        thread.start()
        handed_out: list[int] = []
        deadline = Deadline.after(60)
        restarts = 0
        while len(handed_out) < count and not deadline.expired:
            deliveries = consumer.receive(7, timeout=0.2)
            handed_out += [delivery.entry.sequence for delivery in deliveries]
            if len(handed_out) > 100 * (restarts + 1) and restarts < 3:
                restarts += 1
                server.restart()
            consumer.commit(deliveries)
            for delivery in deliveries:
                ready.pop(delivery.entry.sequence, None)
            if not deliveries and not thread.is_alive() and producer.attach():
                for again in list(ready.values()):  # a restart after the last publication
                    producer.publish(again)
        thread.join(10)
    assert restarts == 3
    assert sorted(handed_out) == list(range(count))


def test_calls_and_polls_sit_out_an_outage(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dray.jobs.queue")
    received: list[int] = []
    with RedisConnection(server.address) as one, RedisConnection(server.address) as two:
        producer, consumer = RolloutProducer(one, KEYS), RolloutConsumer(two, KEYS, "policy-0")
        producer.publish(entry(0))
        consumer.receive(1, timeout=5)

        def receive() -> None:
            received.extend(delivery.entry.sequence for delivery in consumer.receive(5, timeout=60))

        thread = threading.Thread(target=receive)
        thread.start()
        assert server.pid is not None
        psutil.Process(server.pid).kill()
        wait_until(lambda: two.away_for > 0, "the waiting consumer to notice")
        assert two.poll("peek", lambda client: client.do("PING"), Deadline.after(0), None) is None
        server.restart()
        producer.attach()
        producer.publish(entry(1))
        thread.join(20)
        assert received == [1]
        assert two.away_for == 0
    assert "answers again after" in caplog.text
    messages = [record.getMessage() for record in caplog.records if "does not answer" in record.getMessage()]
    assert len(messages) <= 2, "one per outage and connection"


def test_redis_that_does_not_come_back_is_an_error_that_states_for_how_long(tmp_path: Path) -> None:
    server = start_redis(tmp_path)
    with RedisConnection(server.address, patience=0.5) as connection:
        producer, consumer = RolloutProducer(connection, KEYS), RolloutConsumer(connection, KEYS, "policy-0")
        producer.publish(entry(0))
        server.close()
        with pytest.raises(RedisUnavailableError, match=r"has not answered for 0\.\d s"):
            consumer.receive(1, timeout=None)
        with pytest.raises(RedisUnavailableError):
            producer.publish(entry(1), timeout=None)
        with pytest.raises(RedisUnavailableError):
            WeightsChannel(connection, KEYS).newest(timeout=0)


def test_shutdown_ends_the_wait_for_an_absent_redis_at_once(tmp_path: Path) -> None:
    server = start_redis(tmp_path)
    with RedisConnection(server.address) as connection:
        consumer = RolloutConsumer(connection, KEYS, "policy-0")
        consumer.attach()
        server.close()
        results: list[object] = []
        thread = threading.Thread(target=lambda: results.append(consumer.receive(1, timeout=60)))
        thread.start()
        wait_until(lambda: connection.away_for > 0, "the waiting consumer to notice")
        connection.shutdown.set()
        thread.join(5)
        assert results == [[]]
        with pytest.raises(RedisUnavailableError):
            consumer.attach(timeout=60)


def test_stopped_redis_is_noticed_by_its_answer_timeout(server: RedisServer) -> None:
    with RedisConnection(server.address, answer_timeout=0.3) as connection:
        producer = RolloutProducer(connection, KEYS)
        producer.publish(entry(0))
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(RedisUnavailableError):
            producer.publish(entry(1), timeout=0.5)
        os.kill(server.pid, signal.SIGCONT)
        producer.publish(entry(1))
        assert producer.statistics().backlog == 2, "what was sent twice is there once"


def test_a_closed_connection_reports_it(server: RedisServer) -> None:
    connection = RedisConnection(server.address)
    producer = RolloutProducer(connection, KEYS)
    producer.publish(entry(0))
    connection.close()
    connection.close()
    with pytest.raises(ControlPlaneError, match="closed"):
        producer.publish(entry(1))
    assert repr(connection).endswith("closed>")
