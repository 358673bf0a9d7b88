"""Arguments of producers, consumers, publishers and subscribers, and what these show of themselves."""

from __future__ import annotations

import os
import pickle
import re
import secrets
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stream_fixtures import SECONDS

from dray import Consumer, Producer, Publisher, Subscriber
from dray.errors import BufferClosedError, ConfigError, StreamError, StreamTimeout
from dray.integrations.torch_data import PayloadDataset
from dray.streams.addresses import ListenOn, endpoint_of, find_stream
from dray.streams.registry import default_scope

NAME = "arguments"


@pytest.fixture(autouse=True)
def _scope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAY_SCOPE", f"arguments {secrets.token_hex(4)}")


# --- addresses --------------------------------------------------------------------------------------------------


def test_addresses_to_listen_at_are_of_one_host() -> None:
    assert ListenOn.parse(()) == ListenOn("127.0.0.1", {})
    assert ListenOn.parse("tcp://0.0.0.0:7777") == ListenOn("0.0.0.0", {"tcp": 7777})
    assert ListenOn.parse(["tcp://[::1]:0", "ucx://[::1]:0"]) == ListenOn("::1", {"tcp": 0, "ucx": 0})
    assert ListenOn.parse(["tcp://a:1", "ucx://a:2"]) == ListenOn("a", {"tcp": 1, "ucx": 2})


@pytest.mark.parametrize(
    "wrong", [["tcp://a:1", "ucx://b:2"], ["tcp://a:1", "ucx://a:1"], ["tcp://a:1", "tcp://a:2"]]
)
def test_addresses_to_listen_at_that_do_not_fit_together_are_named(wrong: list[str]) -> None:
    with pytest.raises(ConfigError, match="addresses of one host, one for each lane, each with its own port"):
        Producer(NAME, listen=wrong)


@pytest.mark.parametrize("make", [Producer, Publisher])
def test_a_port_that_is_in_use_is_named_and_no_other_one_is_taken(make: type[Producer | Publisher]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port = {port} is not allowed: 0, or a port that is not in use"):
            make(NAME, listen=f"tcp://127.0.0.1:{port}", secret=bytes(32))


@pytest.mark.parametrize(
    "wrong", ["127.0.0.1:7777", "shm://a:1", "tcp://a", "tcp://:7", "tcp://a:70000", "tcp://a:x", ""]
)
def test_an_address_to_listen_at_that_is_none_is_named(wrong: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(wrong))):
        Producer(NAME, listen=wrong)


def test_a_consumer_takes_a_name_or_addresses() -> None:
    assert find_stream("cartpole", "s") == ("cartpole", "s", ())
    assert find_stream("cartpole", None) == ("cartpole", os.environ["DRAY_SCOPE"], ())
    assert find_stream("tcp://a:7", "s") == ("", "", ("tcp:a:7",))
    assert find_stream(["tcp://a:7", "ucx://b:8"], None) == ("", "", ("tcp:a:7", "ucx:b:8"))
    with pytest.raises(ConfigError, match="a name, or one or more addresses"):
        Consumer([])


@pytest.mark.parametrize("wrong", ["shm://a:1", "tcp://a", "tcp://a:x", "a:1", 7, None])
def test_an_address_that_is_none_is_named(wrong: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(wrong))):
        endpoint_of(wrong)


# --- other arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Consumer("a b"), "name"),
        (lambda: Consumer(""), "name"),
        (lambda: Consumer(NAME, ack="later"), "ack"),  # type: ignore[arg-type]
        (lambda: Consumer(NAME, prefetch=-1), "prefetch"),
        (lambda: Consumer(NAME, prefetch=True), "prefetch"),
        (lambda: Consumer(NAME, group="a/b"), "group"),
        (lambda: Consumer(NAME, secret=b"short"), "secret"),
        (lambda: Producer("a/b"), "name"),
        (lambda: Producer(NAME, groups=()), "groups"),
        (lambda: Producer(NAME, groups="train"), "groups"),
        (lambda: Producer(NAME, groups=("a", "a")), "groups"),
        (lambda: Producer(NAME, max_deliveries=0), "max_deliveries"),
        (lambda: Producer(NAME, scope=""), "scope"),
        (lambda: Publisher(NAME, versions=1), "versions"),
        (lambda: Subscriber("a b"), "name"),
        (lambda: PayloadDataset(NAME, payloads_per_epoch=0), "payloads_per_epoch"),
    ],
)
def test_a_wrong_argument_is_a_value_error_that_names_it(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_a_batch_has_at_least_one_payload() -> None:
    with Consumer(NAME) as consumer:
        for wrong in (0, -1, 2.0, True):
            with pytest.raises(ConfigError, match="an integer of 1 or more"):
                consumer.batch(wrong)  # type: ignore[arg-type]


# --- what they show ---------------------------------------------------------------------------------------------


def test_every_object_shows_what_it_is() -> None:
    scope = os.environ["DRAY_SCOPE"]
    with Producer(NAME) as producer, Consumer(NAME) as consumer:
        assert repr(producer) == f"<Producer {NAME!r} in scope {scope!r}>"
        producer.put(x=np.zeros((2, 3), np.float32))
        payload = consumer.get(SECONDS)
        assert repr(payload) == f"<Payload {payload.id}: x float32[2, 3]>"
        shown = f"<Consumer of stream {NAME!r} in scope {scope!r}, group 'default', 1 payloads>"
        assert repr(consumer) == shown
        assert len(consumer.producers) == 1
        assert f"process {os.getpid()}" in consumer.producers[0]
    assert repr(producer) == f"<Producer {NAME!r} closed>"
    assert "closed>" in repr(consumer)
    assert "stream at tcp:a:7" in repr(Consumer(["tcp://a:7"]))


def test_versions_show_their_number() -> None:
    with Publisher(NAME) as publisher, Subscriber(NAME) as subscriber:
        publisher.publish({"w": np.zeros(3)})
        weights = subscriber.newest(timeout=SECONDS)
        assert repr(weights) == "<Weights version 1: w float64[3]>"
        assert repr(publisher) == f"<Publisher {NAME!r} version 1>"
        assert (publisher.version, publisher.subscribers) == (1, 1)
        assert "Subscriber of stream" in repr(subscriber)
    assert "closed" in repr(subscriber)
    assert "closed" in repr(publisher)


def test_a_dataset_shows_its_stream() -> None:
    with PayloadDataset(NAME) as dataset:
        assert repr(dataset).startswith("<PayloadDataset: <Consumer of stream 'arguments'")


# --- after the end ----------------------------------------------------------------------------------------------


def test_what_is_closed_raises_an_error_that_states_it_and_closes_twice() -> None:
    publisher, subscriber, consumer = Publisher(NAME), Subscriber(NAME), Consumer(NAME)
    for each in (publisher, subscriber, consumer):
        each.close()
        each.close()
    with pytest.raises(BufferClosedError):
        publisher.publish({"w": [1]})
    for call in (subscriber.newest, subscriber.__enter__, consumer.get, consumer.__enter__, consumer.statistics):
        with pytest.raises(BufferClosedError):
            call()


def test_a_consumer_that_was_pickled_is_the_same_again() -> None:
    consumer = Consumer(NAME, group="log", ack="manual", prefetch=7)
    assert repr(pickle.loads(pickle.dumps(consumer))) == repr(consumer)  # noqa: S301
    subscriber = Subscriber(NAME)
    assert repr(pickle.loads(pickle.dumps(subscriber))) == repr(subscriber)  # noqa: S301


def test_a_payload_is_acknowledged_or_released_once() -> None:
    with Producer(NAME) as producer, Consumer(NAME, ack="manual") as consumer:
        producer.put(x=1)
        payload = consumer.get(SECONDS)
        payload.release()
        payload.release()
        again = consumer.get(SECONDS)
        assert again.deliveries == 2
        again.acknowledge()
        again.acknowledge()
        again.release()
        assert again.ended
        assert producer.drain(SECONDS) == 0


def test_tensors_can_share_the_memory_of_the_arrays() -> None:
    torch = pytest.importorskip("torch")
    with Producer(NAME) as producer, Consumer(NAME) as consumer:
        producer.put(x=np.arange(4))
        payload = consumer.get(SECONDS)
        shared = payload.torch(copy=False)["x"]
        assert torch.equal(shared, torch.arange(4))
        assert shared.data_ptr() == payload["x"].__array_interface__["data"][0]


def test_a_call_from_a_signal_handler_that_interrupts_one_is_refused() -> None:
    refused: list[StreamError] = []

    def handler(*_: object) -> None:
        with pytest.raises(StreamError, match="this one came from a handler") as caught:
            consumer.get(0)
        refused.append(caught.value)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with Consumer(NAME) as consumer:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(StreamTimeout):
                consumer.get(0.3)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(refused) == 1


# --- scopes -----------------------------------------------------------------------------------------------------


def test_the_scope_is_what_is_set_or_the_job_or_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "XDG_SESSION_ID"):
        monkeypatch.delenv(name, raising=False)
    assert default_scope() == os.environ["DRAY_SCOPE"]
    monkeypatch.delenv("DRAY_SCOPE")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    read = Path.read_text
    texts = {"7\n": "login session 7", "4294967295\n": "login session 3", "": "login session 3"}
    for text, scope in texts.items():
        monkeypatch.setattr(
            Path,
            "read_text",
            lambda self, *args, text=text: text if self.name == "sessionid" else read(self, *args),
        )
        monkeypatch.setenv("XDG_SESSION_ID", "3")
        assert default_scope() == scope
    monkeypatch.delenv("XDG_SESSION_ID")
    assert default_scope() == f"user {os.getuid()}"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    assert default_scope() == "torchrun abc"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert default_scope() == "slurm job 12"
