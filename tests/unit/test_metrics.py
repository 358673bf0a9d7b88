import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from opentelemetry.metrics import CallbackOptions, NoOpMeter
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from dray import Consumer, PayloadClient, PayloadServer, Producer, SharedRingBuffer, metrics
from dray.errors import ConfigError


def samples(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(url, timeout=20) as answer:
        text = answer.read().decode()
    found: list[Sample] = [each for family in text_string_to_metric_families(text) for each in family.samples]
    return {(each.name, frozenset(each.labels.items())): each.value for each in found}


def key(family: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return family, frozenset(labels.items())


@pytest.fixture
def stream() -> Iterator[tuple[Producer, Consumer]]:
    with Producer("measured", slots=4, slot_bytes=4096) as producer, Consumer("measured") as consumer:
        producer.put(number=1)
        producer.put(number=2)
        consumer.get(20)
        yield producer, consumer
        for _ in range(producer.ring_statistics().committed - consumer.statistics().payloads):
            consumer.get(20)


def test_a_program_serves_what_its_producers_and_consumers_count(stream: tuple[Producer, Consumer]) -> None:
    producer, consumer = stream
    with metrics.serve({"rollouts": producer, "trainer": consumer}) as server:
        found = samples(server.url)
        assert found[key("dray_ring_committed_payloads_total", name="rollouts")] == 2
        states = {
            state: found[key("dray_ring_state_slots", name="rollouts", state=state)] for state in ("free", "ready")
        }
        assert states["free"] == 2
        assert found[key("dray_group_consumers", name="rollouts", group="default")] == 1
        assert found[key("dray_consumer_payloads_total", name="trainer")] == 1
        producer.put(number=3)
        assert samples(server.url)[key("dray_ring_committed_payloads_total", name="rollouts")] == 3


def test_servers_clients_and_rings_have_metrics() -> None:
    with (
        SharedRingBuffer(2, 4096) as ring,
        PayloadServer(ring) as payloads,
        PayloadClient() as client,
        metrics.serve({"server": payloads, "client": client, "ring": ring}) as server,
    ):
        client.read(payloads.put({"x": np.ones(3)}))
        found = samples(server.url)
        assert found[key("dray_server_events_total", name="server", event="connections")] == 1
        assert found[key("dray_client_reads_total", name="client", lane="shm")] == 1
        assert found[key("dray_client_connections", name="client")] == 1
        assert found[key("dray_ring_committed_payloads_total", name="ring")] == 1


def test_what_is_closed_has_no_metrics_and_hinders_no_others() -> None:
    closed, left = Producer("closed"), Producer("left")
    closed.close()
    with left, metrics.serve({"closed": closed, "left": left}) as server:
        assert {dict(labels)["name"] for _, labels in samples(server.url)} == {"left"}


def test_the_server_is_closed_twice_and_its_port_is_free_again(stream: tuple[Producer, Consumer]) -> None:
    server = metrics.serve({"rollouts": stream[0]})
    port = int(server.url.split(":")[-1].split("/")[0])
    server.close()
    server.close()
    with metrics.serve({"rollouts": stream[0]}, port=port) as again:
        assert samples(again.url)


@pytest.mark.parametrize(
    ("objects", "options", "message"),
    [
        ({"rollouts": 3}, {}, "'rollouts'.* = 3 is not allowed: one of Producer, Consumer, PayloadServer"),
        ({"": None}, {}, "a text that is not empty"),
        ({}, {"port": 70_000}, "port = 70000 is not allowed: 0 to 65535"),
        ({}, {"host": "example"}, "host = 'example' is not allowed: an IP address"),
    ],
)
def test_a_mistake_is_named(objects: dict, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        metrics.serve(objects, **options)


def test_every_family_has_a_name_of_its_own_with_a_unit_and_a_sentence() -> None:
    names = [family.name for family in metrics.FAMILIES]
    assert len(set(names)) == len(names)
    for family in metrics.FAMILIES:
        assert family.name.startswith("dray_")
        assert family.help.endswith(".")
        assert "name" not in family.labels


class KeptInstruments(NoOpMeter):
    """A meter of OpenTelemetry's interface. Its SDK is not installed: every job would import it through redis."""

    def __init__(self) -> None:
        super().__init__("test")
        self.kept: dict[str, tuple[str, str, Any]] = {}

    def create_observable_counter(
        self, name: str, callbacks: Any = None, unit: str = "", description: str = ""
    ) -> Any:
        self.kept[name] = "counter", unit, callbacks

    def create_observable_gauge(
        self, name: str, callbacks: Any = None, unit: str = "", description: str = ""
    ) -> Any:
        self.kept[name] = "gauge", unit, callbacks


def test_a_meter_of_opentelemetry_gets_the_same_figures(stream: tuple[Producer, Consumer]) -> None:
    meter = KeptInstruments()
    metrics.observe({"rollouts": stream[0]}, meter)
    kind, unit, (callback,) = meter.kept["dray_ring_committed_payloads"]
    assert (kind, unit) == ("counter", "1")
    assert [(each.value, each.attributes) for each in callback(CallbackOptions())] == [(2, {"name": "rollouts"})]
    assert meter.kept["dray_ring_claim_wait_seconds"][:2] == ("counter", "s")
    assert meter.kept["dray_ring_slot_bytes"][:2] == ("gauge", "By")
    _, _, (callback,) = meter.kept["dray_ring_state_slots"]
    assert {"name": "rollouts", "state": "free"} in [each.attributes for each in callback(CallbackOptions())]
