"""A Redis server that refuses: for a while, in which dray waits, or permanently, which it reports at the start."""

import logging
import subprocess
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from redis_refusals import REFUSALS, administrator, blocked_by_a_script, replica_of_nothing
from waiting import ends_within, wait_until

from dray.clock import Deadline
from dray.errors import ConfigError, ControlPlaneError
from dray.jobs.job_file import parse_job
from dray.jobs.queue import (
    JobKeys,
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
from dray.jobs.queue.connection import RedisClient
from dray.jobs.queue.redis_server import find_redis_binary, job_redis

KEYS = JobKeys("refusals")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with start_redis(tmp_path_factory.mktemp("redis")) as started:
        yield started


@pytest.fixture
def admin(server: RedisServer) -> Iterator[RedisClient]:
    with administrator(server.address) as client:
        yield client
        client.do("FLUSHALL")


def entry(sequence: int) -> RolloutEntry:
    return RolloutEntry("cd" * 16, sequence, 0, "rollout-0", 0, reference="{}")


# --- for a while ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("READONLY You can't write against a read only replica.", "READONLY"),
        ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", "MASTERDOWN"),
        ("LOADING Redis is loading the dataset in memory", "LOADING"),
        ("CLUSTERDOWN Hash slot not served", "CLUSTERDOWN"),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "TRYAGAIN"),
        ("UNBLOCKED force unblock from blocking operation, instance state changed", "UNBLOCKED"),
        ("NOREPLICAS Not enough good replicas to write.", "NOREPLICAS"),
        ("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to", "MISCONF"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "OOM"),
        ("BUSY Redis is busy running a script.", "BUSY"),
        (
            "ERR Error running script (call to f_ab): @user_script:1: @user_script: 1: -READONLY You can't",
            "READONLY",
        ),
        ("ERR Error running script (call to f_ab): @user_script:1: @user_script: 1: -OOM command not", "OOM"),
    ],
)
def test_an_answer_that_means_not_now_is_waited_out_until_the_deadline(
    server: RedisServer, answer: str, code: str
) -> None:
    with RedisConnection(server.address) as connection, pytest.raises(RedisUnavailableError) as caught:
        connection.call("ask", lambda c: c.do("EVAL", "return redis.error_reply(ARGV[1])", 0, answer), now())
    assert code in caught.value.answer
    assert "Redis has refused for" in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        "ERR syntax error",
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "BUSYGROUP Consumer Group name already exists",
        "MOVED 3999 127.0.0.1:6381",
        "NOPERM this user has no permissions to run the command",
        "ERR Error running script (call to f_ab): @user_script:1: @user_script: 1: -WRONGTYPE Operation",
        "ERR a payload that speaks of READONLY and BUSY",
    ],
)
def test_any_other_answer_is_an_error_at_once(server: RedisServer, answer: str) -> None:
    with RedisConnection(server.address) as connection, pytest.raises(ControlPlaneError) as caught:
        connection.call(
            "ask", lambda c: c.do("EVAL", "return redis.error_reply(ARGV[1])", 0, answer), Deadline.after(60)
        )
    assert not isinstance(caught.value, RedisUnavailableError)
    assert answer.removeprefix("ERR ") in str(caught.value)


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_is_waited_out_with_one_line_although_reads_are_answered(
    server: RedisServer, admin: RedisClient, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    caplog.set_level(logging.INFO, "dray.jobs.queue")
    with RedisConnection(server.address) as connection:
        producer, weights = RolloutProducer(connection, KEYS), WeightsChannel(connection, KEYS)
        producer.publish(entry(0))
        published: list[bool] = []
        with REFUSALS[code](admin):
            thread = threading.Thread(target=lambda: published.append(producer.publish(entry(1), timeout=30)))
            thread.start()
            wait_until(lambda: connection.away_for > 0, "the publisher to be refused")
            before = connection.away_for
            if code in ("READONLY", "NOREPLICAS", "OOM"):
                assert producer.statistics().backlog == 1
                assert weights.newest() is None
                assert connection.away_for > before, "what only reads does not end the refusal of writes"
        thread.join(30)
        assert published == [True]
        assert connection.away_for == 0
        assert producer.statistics().backlog == 2
    messages = [record.getMessage() for record in caplog.records if record.name == "dray.jobs.queue"]
    assert [message for message in messages if f"refuses ({code} " in message] == messages[:1]
    assert ["answers again after" in message for message in messages] == [False, True]


def test_an_answer_to_what_was_sent_before_a_refusal_does_not_end_it(
    server: RedisServer, admin: RedisClient
) -> None:
    def write(client: RedisClient) -> object:
        return client.do("SET", KEYS.rollouts, 1)

    with RedisConnection(server.address) as connection:

        def write_before_a_refusal(client: RedisClient) -> object:
            answer = write(client)
            with replica_of_nothing(admin), pytest.raises(RedisUnavailableError, match="READONLY"):
                connection.call("write", write, now())
            return answer

        assert connection.call("write", write_before_a_refusal, Deadline.after(30)) == b"OK"
        assert connection.away_for > 0
        assert connection.call("write", write, Deadline.after(30)) == b"OK"
        assert connection.away_for == 0


def test_a_permanent_refusal_is_an_error_that_states_for_how_long_and_with_which_answer(
    server: RedisServer, admin: RedisClient
) -> None:
    with RedisConnection(server.address, patience=0.3) as connection:
        consumer = RolloutConsumer(connection, KEYS, "policy-0")
        consumer.attach()
        with replica_of_nothing(admin):
            with pytest.raises(RedisUnavailableError, match=r"has refused for 0\.\d s: READONLY"):
                consumer.receive(1, timeout=None)
            with pytest.raises(RedisUnavailableError, match="READONLY"):
                RolloutProducer(connection, KEYS).publish(entry(0), timeout=None)


def test_a_server_that_has_handed_its_place_over_is_resolved_again(
    server: RedisServer, admin: RedisClient, tmp_path: Path
) -> None:
    """Both servers know the same user; the address is a symbolic link to one of their sockets."""
    place = tmp_path / "s"
    place.symlink_to(server.address.options()["path"])
    with start_redis(tmp_path / "other") as other, administrator(other.address) as successor:
        user, password = (server.address.options()[name] for name in ("username", "password"))
        successor.do("ACL", "SETUSER", user, "on", f">{password}", "~*", "&*", "+@all")
        address = server.address.of_socket(str(place), password, user)
        with RedisConnection(address) as connection:
            producer = RolloutProducer(connection, KEYS)
            producer.publish(entry(0))
            place.unlink()
            place.symlink_to(other.address.options()["path"])
            with replica_of_nothing(admin), pytest.raises(StreamLostError):
                producer.publish(entry(1), timeout=30)
            assert producer.attach()
            assert producer.publish(entry(1))
        assert successor.do("XLEN", KEYS.rollouts) == 1


def test_a_started_server_that_a_script_blocks_ends_as_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with start_redis(tmp_path) as server, administrator(server.address) as admin:
        pid = server.pid
        assert pid is not None
        with blocked_by_a_script(admin):
            server.close()
            assert ends_within(0, pid)
    assert "killing it" not in caplog.text


def test_an_answer_that_quotes_the_password_is_shown_without_it_also_in_the_traceback(server: RedisServer) -> None:
    password = server.address.options()["password"]
    answer = f"ERR unknown command 'AUTH', with args beginning with: '{password}'"
    with RedisConnection(server.address) as connection, pytest.raises(ControlPlaneError) as caught:
        connection.call("ask", lambda c: c.do("EVAL", "return redis.error_reply(ARGV[1])", 0, answer), now())
    assert "with args beginning with: '***'" in str(caught.value)
    assert password not in "".join(traceback.format_exception(caught.value))


# --- permanently ------------------------------------------------------------------------------------------------


def test_a_server_that_refuses_writes_is_of_no_use_and_the_error_states_why(
    server: RedisServer, admin: RedisClient
) -> None:
    for code in ("READONLY", "NOREPLICAS", "OOM"):
        with REFUSALS[code](admin):
            error = refusal_of(server.address.url)
        assert isinstance(error.__cause__, RedisUnavailableError)
        assert f"{code} " in str(error)
    assert configured_redis(server.address.url, KEYS) == server.address
    assert admin.do("KEYS", "*") == [], "nothing stays of the trials"


def test_a_server_whose_user_may_not_do_what_a_job_does_is_of_no_use(
    server: RedisServer, admin: RedisClient
) -> None:
    place = server.address.options()["path"]
    for missing in ("-eval", "-xadd", "-xreadgroup", "-expire", "-unlink", "resetkeys ~other:*"):
        admin.do("ACL", "SETUSER", "weak", "reset", "on", ">sesame", "~*", "+@all", *missing.split())
        error = refusal_of(f"unix://weak:sesame@{place}")
        assert "permission" in str(error)
        assert "sesame" not in str(error)
    admin.do("FLUSHALL")
    admin.do("ACL", "SETUSER", "weak", "reset", "on", ">sesame", "~dray:*", "+@all", "-@dangerous")
    configured_redis(f"unix://weak:sesame@{place}", KEYS)
    assert admin.do("KEYS", "dray:*") == []


def test_a_server_of_a_cluster_without_slots_is_of_no_use(tmp_path: Path) -> None:
    with cluster_node(tmp_path) as place:
        error = refusal_of(f"unix://{place}")
    assert "CLUSTERDOWN" in str(error)


def test_a_job_waits_at_its_start_for_a_server_that_refuses_and_reports_it(
    server: RedisServer, admin: RedisClient, tmp_path: Path
) -> None:
    tables = {
        "job": {"name": "small", "max_steps": 1},
        "rollout": {"worker": "a.py:A"},
        "policy": {"trainer": "a.py:B", "batch_size": 1},
        "redis": {"url": server.address.url},
        "timeouts": {"redis": 60.0},
    }
    lines: list[str] = []
    with ExitStack() as refusing:
        refusing.enter_context(replica_of_nothing(admin))

        def show(line: str) -> None:
            lines.append(line)
            refusing.close()

        with job_redis(parse_job(tables), "small-1", tmp_path, None, show, lines.append) as found:
            assert found == server.address
    (line,) = lines
    assert "refuses (READONLY " in line
    assert "waiting for it, at most 60 s" in line


# --- helpers ----------------------------------------------------------------------------------------------------


def now() -> Deadline:
    return Deadline.after(0)


def refusal_of(url: str) -> ConfigError:
    with pytest.raises(ConfigError, match="must be the URL of a server that answers and lets a job") as caught:
        configured_redis(url, KEYS, timeout=0.2)
    assert caught.value.key == "redis.url"
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


@contextmanager
def cluster_node(folder: Path) -> Iterator[Path]:
    """A server in cluster mode that has no slots, on a Unix socket; the place of that."""
    place = folder / "c.sock"
    options = ["--port", "0", "--unixsocket", str(place), "--save", "", "--cluster-enabled", "yes"]
    command = [str(find_redis_binary()), *options, "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(place.exists, "the socket of the server")
            yield place
        finally:
            process.kill()
