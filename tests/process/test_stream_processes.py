"""Streams between real processes: how they find each other, in which scopes, across users and networks."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from soak.network import Network
from stream_fixtures import SECONDS, Route, forked, in_thread, number, wait_for_consumers
from waiting import wait_until

from dray import Consumer, Producer
from dray.errors import ConfigError, StreamTimeout
from dray.streams.registry import Registry, default_scope

PRODUCE = """
    import sys
    import numpy as np
    import dray

    with dray.Producer(sys.argv[1], **eval(sys.argv[2])) as producer:
        for each in range(20):
            producer.put(number=each, data=np.full(100_000, each))
"""
CONSUME = """
    import sys
    import dray

    total = 0
    with dray.Consumer(eval(sys.argv[1]), **eval(sys.argv[2])) as consumer:
        for payload in consumer:
            assert (payload["data"] == payload["number"]).all()
            total += int(payload["number"])
    print(total, payload.in_place)
"""


@contextlib.contextmanager
def running(
    script: str, *arguments: object, before: tuple[str, ...] = (), **environment: str
) -> Iterator["subprocess.Popen[str]"]:
    """A Python process."""
    command = [*before, sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def output_of(process: "subprocess.Popen[str]") -> str:
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out.strip()


@pytest.fixture
def name() -> str:
    return f"test-{secrets.token_hex(4)}"


def test_consumers_may_start_first_and_end_with_the_last_producer(name: str) -> None:
    with running(CONSUME, repr(name), "{}", DRAY_SCOPE=name) as consumer:
        registry = Registry(name, name)
        wait_until(lambda: registry.peers("c"), "the consumer", 30)
        with running(PRODUCE, name, "{}", DRAY_SCOPE=name) as producer:
            output_of(producer)
        assert output_of(consumer) == "190 True"


def test_two_runs_of_one_program_do_not_meet(name: str) -> None:
    with Producer(name, scope="run 1", drain_timeout=SECONDS) as one, Producer(name, scope="run 2") as two:
        with Consumer(name, scope="run 2") as consumer:
            wait_for_consumers(two)
            assert one.statistics()[0].consumers == 0
            two.put(number=2)
            assert number(consumer.get(SECONDS)) == 2


@pytest.mark.parametrize(
    ("variables", "scope"),
    [
        ({"DRAY_SCOPE": "mine", "SLURM_JOB_ID": "7"}, "mine"),
        ({"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "8"}, "slurm job 7"),
        ({"TORCHELASTIC_RUN_ID": "8"}, "torchrun 8"),
    ],
)
def test_the_scope_is_that_of_the_job(
    variables: dict[str, str], scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("DRAY_SCOPE", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(each, raising=False)
    for each, value in variables.items():
        monkeypatch.setenv(each, value)
    assert default_scope() == scope


def test_a_name_that_no_producer_serves_is_waited_for_and_the_error_names_folder_scope_and_what_exists(
    name: str,
) -> None:
    with Producer(name, scope="other", drain_timeout=0), Producer(f"{name}-2", scope="here", drain_timeout=0):
        with Consumer(name, scope="here") as consumer, pytest.raises(StreamTimeout) as caught:
            consumer.get(0.1)
    folder = Registry(name, "here").folder
    for part in (str(folder), "scope 'here'", f"'{name}' in scope 'other'", f"'{name}-2' in scope 'here'"):
        assert part in str(caught.value)


def test_leftovers_of_dead_producers_are_ignored_and_removed(name: str) -> None:
    def die(ready: int) -> None:
        Producer(name, scope=name)
        os.write(ready, b"x")
        os.kill(os.getpid(), signal.SIGKILL)

    registry = Registry(name, name)
    with forked(die) as (_, reading):
        os.read(reading, 1)
        wait_until(lambda: not registry.peers("p"), "the death of the producer")
        with Producer(name, scope=name) as producer, Consumer(name, scope=name) as consumer:
            producer.put(number=1)
            assert number(consumer.get(SECONDS)) == 1
    assert not registry.folder.exists()


def test_folders_of_streams_whose_processes_were_killed_are_removed(name: str) -> None:
    def die(ready: int) -> None:
        Producer(name, scope=name)
        os.write(ready, b"x")
        os.kill(os.getpid(), signal.SIGKILL)

    with forked(die) as (pid, reading):
        os.read(reading, 1)
        os.waitpid(pid, 0)
        assert Registry(name, name).folder.exists()
        with Producer(f"{name}-2", scope=name):
            assert not Registry(name, name).folder.exists()


def test_an_entry_stays_when_a_forked_child_of_its_process_ends(name: str) -> None:
    with Producer(name, scope=name) as producer:
        with forked(lambda _: None) as (pid, _):
            os.waitpid(pid, 0)
        with Consumer(name, scope=name) as consumer:
            wait_for_consumers(producer)
            assert len(consumer.producers) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_two_users_with_one_name_are_apart(name: str) -> None:
    def produce(ready: int) -> None:
        os.environ.pop("DRAY_RUNTIME_DIR", None)
        os.setuid(12345)
        with Producer(name, scope=name, drain_timeout=SECONDS) as producer:
            os.write(ready, b"x")
            producer.put(number=1)

    with forked(produce) as (_, reading):
        assert os.read(reading, 1) == b"x"
        with Consumer(name, scope=name) as consumer, pytest.raises(StreamTimeout, match="no producer is attached"):
            consumer.get(0.3)


def test_a_folder_that_cannot_be_written_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DRAY_RUNTIME_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=str(tmp_path / "file")):
        Producer(name)


def test_a_stopped_consumer_keeps_what_it_has_begun_and_others_get_the_rest(name: str) -> None:
    """Not begun within 30 s is shown with a clock of their own in tests/unit/streams."""

    def consume(ready: int) -> None:
        with Consumer(name, scope=name, ack="manual", prefetch=1) as consumer:
            os.write(ready, bytes([number(consumer.get(SECONDS))]))
            os.kill(os.getpid(), signal.SIGSTOP)

    with Producer(name, scope=name, drain_timeout=None) as producer, forked(consume) as (pid, reading):
        producer.put(number=0)
        assert os.read(reading, 1) == b"\0"
        os.waitpid(pid, os.WUNTRACED)
        with Consumer(name, scope=name) as consumer:
            wait_for_consumers(producer, 2)
            with in_thread(lambda: [number(consumer.get(SECONDS)) for _ in range(3)]) as got:
                for each in range(1, 5):
                    producer.put(number=each)
                others = got()
            assert 0 not in others
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            found = [consumer.get(SECONDS) for _ in range(2)]
            assert sorted([*others, *map(number, found)]) == [0, 1, 2, 3, 4]
            assert next(each for each in found if number(each) == 0).redelivered


def test_ctrl_c_ends_a_wait_at_once_and_leaves_nothing(name: str) -> None:
    script = """
        import signal, sys
        import dray

        with dray.Consumer(sys.argv[1]) as consumer:
            for payload in consumer:
                pass
    """
    registry = Registry(name, name)
    with running(script, name, DRAY_SCOPE=name) as consumer:
        wait_until(lambda: registry.peers("c"), "the consumer", 30)
        consumer.send_signal(signal.SIGINT)
        _, errors = consumer.communicate(timeout=20)
        assert consumer.returncode == -signal.SIGINT, errors
        assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not registry.folder.exists()


@pytest.mark.parametrize("lane", ["tcp", "ucx"])
def test_between_two_network_namespaces_a_secret_is_needed(lane: str, name: str) -> None:
    if lane == "ucx":
        pytest.importorskip("ucxx")
    if reason := Network.unavailable(filters=False):
        pytest.skip(f"no network namespaces: {reason}")
    secret = secrets.token_bytes(32)
    with Network(("far",), filters=False) as network:
        address = f"{lane}://{network.address('far')}:7777"
        options = {"listen": address, "secret": secret, "drain_timeout": 60.0}
        with running(PRODUCE, name, repr(options), before=tuple(network.within("far"))) as producer:
            near = tuple(network.within("hub"))
            with running(CONSUME, repr([address]), repr({"secret": secret[::-1]}), before=near) as stranger:
                _, errors = stranger.communicate(timeout=60)
                assert "AuthenticationError" in errors
            with running(CONSUME, repr([address]), repr({"secret": secret}), before=near) as consumer:
                assert output_of(consumer) == "190 False"
            output_of(producer)


def test_a_producer_that_is_not_on_loopback_needs_a_secret(name: str) -> None:
    with pytest.raises(ConfigError, match="a loopback address, or any with a secret"):
        Producer(name, listen="tcp://0.0.0.0:0")


def test_producers_of_one_name_in_one_process_are_apart(name: str) -> None:
    route = Route("name", name)
    with route.producer() as one, route.producer() as two, route.consumer() as consumer:
        one.put(number=1)
        two.put(number=2)
        assert {number(consumer.get(SECONDS)), number(consumer.get(SECONDS))} == {1, 2}
        assert len(consumer.producers) == 2
