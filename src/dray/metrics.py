"""Metrics of the producers, consumers, servers and clients of a process, for Prometheus and OpenTelemetry.

`serve` answers Prometheus, with the package prometheus-client; `observe` gives the same figures to a meter of
OpenTelemetry. Both take them from the `statistics()` of the objects at the moment they are asked.

Units are in the names, counters end in ``_total``, and every sample has the label ``name``, by which the program
calls the object.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dray.errors import BufferClosedError, ConfigError, MissingDependencyError
from dray.name_resolution import bracketed
from dray.prefetch.reader import BatchReader, BatchReaderStatistics
from dray.resources import Closing
from dray.ring.records import RingStatistics
from dray.ring.ring import SharedRingBuffer
from dray.streams.consumer import Consumer, ConsumerStatistics
from dray.streams.producer import GroupStatistics, Producer
from dray.transport.client import PayloadClient
from dray.transport.client_statistics import ClientStatistics
from dray.transport.server import PayloadServer
from dray.transport.server_statistics import ServerCounters, ServerStatistics

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

Observed = Producer | Consumer | PayloadServer | PayloadClient | SharedRingBuffer | BatchReader
"""What has metrics."""

# --- families ---------------------------------------------------------------------------------------------------

Sample = tuple[tuple[str, ...], float]
"""The values of the labels beside ``name``, and the figure."""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family.

    Attributes:
        name: with its unit; a counter's ends in ``_total``.
        help: one sentence.
        of: the class of the statistics that the samples are taken from.
        samples: takes them.
        labels: beside ``name``.
    """

    name: str
    help: str
    of: type
    samples: Callable[[Any], Iterable[Sample]]
    labels: tuple[str, ...] = ()

    @property
    def is_counter(self) -> bool:
        return self.name.endswith("_total")


def _field(name: str) -> Callable[[Any], Iterable[Sample]]:
    def samples(statistics: Any) -> Iterable[Sample]:
        value = getattr(statistics, name)
        return () if value is None else [((), float(value))]

    return samples


def _fields(of: type, *rows: tuple[str, str, str]) -> tuple[Family, ...]:
    return tuple(Family(name, words, of, _field(field)) for field, name, words in rows)


def _groups(*rows: tuple[str, str, str]) -> tuple[Family, ...]:
    def samples(field: str, group: GroupStatistics) -> Iterable[Sample]:
        return [((group.group,), float(getattr(group, field)))]

    return tuple(
        Family(name, words, GroupStatistics, functools.partial(samples, field), ("group",))
        for field, name, words in rows
    )


def _slots(ring: RingStatistics) -> Iterable[Sample]:
    return [((state,), float(getattr(ring, state))) for state in ("free", "writing", "ready", "reading")]


def _dropped(ring: RingStatistics) -> Iterable[Sample]:
    return [(("no",), float(ring.dropped_unread)), (("yes",), float(ring.dropped_delivered))]


def _lanes(client: ClientStatistics) -> Iterable[Sample]:
    return [((lane,), float(reads)) for lane, reads in client.reads_by_lane.items()]


def _causes(client: ClientStatistics) -> Iterable[Sample]:
    return [((cause,), float(retries)) for cause, retries in client.retries_by_cause.items()]


def _events(counters: ServerCounters) -> Iterable[Sample]:
    return [
        ((field.name,), float(getattr(counters, field.name)))
        for field in dataclasses.fields(counters)
        if field.name != "bytes"
    ]


FAMILIES: Final = (
    Family("dray_ring_state_slots", "Slots of the ring, by state.", RingStatistics, _slots, ("state",)),
    *_fields(
        RingStatistics,
        ("slot_bytes", "dray_ring_slot_bytes", "Size limit of a payload."),
        ("leases", "dray_ring_leases", "Live leases."),
        ("committed", "dray_ring_committed_payloads_total", "Payloads committed."),
        ("committed_bytes", "dray_ring_committed_bytes_total", "Their bytes."),
        ("consumed", "dray_ring_consumed_payloads_total", "Payloads that all readers have consumed."),
        ("retired", "dray_ring_replaced_payloads_total", "Payloads replaced by a newer one."),
        ("stale_reads", "dray_ring_stale_reads_total", "Reads of payloads that were gone."),
        ("claim_waits", "dray_ring_claim_waits_total", "Claims that waited for a free slot."),
        ("claim_wait_seconds", "dray_ring_claim_wait_seconds_total", "Time that claims have waited."),
        ("full_errors", "dray_ring_full_errors_total", "Claims that found no free slot in time."),
        (
            "oldest_ready_age",
            "dray_ring_oldest_ready_seconds",
            "Age of the oldest payload that is not being read.",
        ),
        ("oldest_lease_age", "dray_ring_oldest_lease_seconds", "Age of the oldest lease."),
        ("attachments", "dray_ring_attachments", "Consumers that may lease directly."),
    ),
    Family("dray_ring_dropped_payloads_total", "Payloads dropped.", RingStatistics, _dropped, ("read",)),
    *_groups(
        ("consumers", "dray_group_consumers", "Consumers that are attached."),
        ("waiting", "dray_group_waiting_payloads", "Payloads that no consumer has been given."),
        ("given", "dray_group_given_payloads_total", "Payloads given to a consumer."),
        ("redelivered", "dray_group_redelivered_payloads_total", "Payloads given again."),
        ("returned", "dray_group_returned_payloads_total", "Payloads that a consumer has given back."),
        ("taken_back", "dray_group_taken_back_payloads_total", "Payloads that a consumer did not begin in time."),
        ("dropped", "dray_group_dropped_payloads_total", "Payloads dropped before they were given."),
        ("dead_letters", "dray_group_dead_letters_total", "Payloads that were given up."),
    ),
    *_fields(
        ConsumerStatistics,
        ("producers", "dray_consumer_producers", "Producers that are attached."),
        ("ended", "dray_consumer_ended_producers_total", "Producers that have closed their stream."),
        ("lost", "dray_consumer_lost_producers_total", "Producers that have died."),
        ("payloads", "dray_consumer_payloads_total", "Payloads that the program has got."),
        ("redelivered", "dray_consumer_redelivered_payloads_total", "Of those, given to a consumer before."),
        ("copied", "dray_consumer_copied_payloads_total", "Of those, copied as arrays of others are kept."),
        (
            "gone",
            "dray_consumer_gone_payloads_total",
            "Payloads dropped or taken back before the program got them.",
        ),
        ("acknowledged", "dray_consumer_acknowledged_payloads_total", "Payloads acknowledged."),
    ),
    *_fields(ServerStatistics, ("open_connections", "dray_server_connections", "Connections that are open.")),
    Family("dray_server_events_total", "What has happened on connections.", ServerCounters, _events, ("event",)),
    *_fields(ServerCounters, ("bytes", "dray_server_sent_bytes_total", "Bytes of payloads that were read.")),
    Family("dray_client_reads_total", "Payloads read, by lane.", ClientStatistics, _lanes, ("lane",)),
    Family("dray_client_retries_total", "Attempts after a failed one.", ClientStatistics, _causes, ("cause",)),
    *_fields(
        ClientStatistics,
        ("bytes", "dray_client_read_bytes_total", "Bytes of payloads read."),
        ("direct_reads", "dray_client_direct_reads_total", "Payloads leased without asking the server."),
        ("failed_reads", "dray_client_failed_reads_total", "References of batches that could not be read."),
        ("connects", "dray_client_connects_total", "Connections that were opened."),
        ("open_connections", "dray_client_connections", "Connections that are open."),
        ("unconfirmed_acks", "dray_client_unconfirmed_acks", "Acknowledgements that are to be sent again."),
    ),
    Family(
        "dray_client_quarantined_endpoints",
        "Endpoints that are not used for a while.",
        ClientStatistics,
        lambda client: [((), float(len(client.quarantined)))],
    ),
    *_fields(
        BatchReaderStatistics,
        ("reads", "dray_prefetch_reads_total", "Payloads read ahead."),
        ("reads_again", "dray_prefetch_reads_again_total", "References that were read again."),
        ("failed", "dray_prefetch_failed_reads_total", "References that a round has given up."),
        ("late", "dray_prefetch_late_payloads_total", "Payloads that came after the end of their batch."),
        ("freed", "dray_prefetch_freed_payloads_total", "Payloads freed at their producers."),
        ("unfreed", "dray_prefetch_unfreed_payloads_total", "Payloads whose freeing was given up."),
        ("to_free", "dray_prefetch_payloads_to_free", "Payloads that are not freed yet."),
    ),
)
"""All that an object may have."""


def _statistics(observed: Observed) -> Iterator[Any]:
    """What `FAMILIES` are taken from; nothing once the object is closed."""
    try:
        if isinstance(observed, Producer):
            yield observed.ring_statistics()
            yield from observed.statistics()
            return
        found = observed.statistics()
    except BufferClosedError:
        return
    yield found
    if isinstance(found, ServerStatistics):
        yield found.counters
        yield found.ring


def _checked(objects: Mapping[str, Observed]) -> dict[str, Observed]:
    for name, each in objects.items():
        if not isinstance(name, str) or not name:
            raise ConfigError("objects", name, "the name of an object is a text that is not empty")
        if not isinstance(each, Observed):
            allowed = ", ".join(kind.__name__ for kind in Observed.__args__)
            raise ConfigError(f"objects[{name!r}]", each, f"one of {allowed}")
    return dict(objects)


def _samples(
    objects: Mapping[str, Observed], families: Iterable[Family] = FAMILIES
) -> Iterator[tuple[Family, tuple[str, ...], float]]:
    """Every sample of the families, with the values of its labels; the name comes first."""
    found = [(name, each) for name, observed in objects.items() for each in _statistics(observed)]
    for family in families:
        for name, statistics in found:
            if isinstance(statistics, family.of):
                for labels, value in family.samples(statistics):
                    yield family, (name, *labels), value


# --- Prometheus -------------------------------------------------------------------------------------------------


class Metrics:
    """A collector of prometheus-client: ``registry.register(Metrics({"rollouts": producer}))``.

    Args:
        objects: each by the name that its samples have as the label ``name``.

    Raises:
        ConfigError: an object is none that has metrics.
    """

    def __init__(self, objects: Mapping[str, Observed]) -> None:
        self._objects = _checked(objects)

    def collect(self) -> Iterator[Metric]:
        """The figures at this moment. Closed objects have none."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for family, labels, value in _samples(self._objects):
            kind = CounterMetricFamily if family.is_counter else GaugeMetricFamily
            if family.name not in families:
                families[family.name] = kind(family.name, family.help, labels=("name", *family.labels))
            families[family.name].add_metric(labels, value)
        yield from families.values()

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering asks no object for its figures."""
        return ()


class MetricsServer(Closing):
    """Answers Prometheus from a thread; made by `serve`. A context manager.

    Attributes:
        url: where the metrics are.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        from prometheus_client import start_http_server

        self._server, self._thread = start_http_server(port, host, registry)
        self._closed = False
        self.url = f"http://{bracketed(host)}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """End the thread. Twice is fine."""
        if not self._closed:
            self._closed = True
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


def serve(objects: Mapping[str, Observed], *, port: int = 0, host: str = "127.0.0.1") -> MetricsServer:
    """Answer Prometheus with the metrics of these objects, until the returned server is closed.

    Args:
        objects: each by the name that its samples have as the label ``name``.
        port: 0 for any that is free; see `MetricsServer.url`.
        host: the address to listen on. Who can reach it can read the metrics; they hold no payloads.

    Raises:
        ConfigError: an object is none that has metrics, or the address is none.
        MissingDependencyError: prometheus-client is not installed.
        OSError: nothing can listen there.
    """
    try:
        from prometheus_client import CollectorRegistry
    except ImportError as error:
        raise MissingDependencyError("prometheus-client", "dray.metrics.serve", "'dray-rl[metrics]'") from error
    try:
        ipaddress.ip_address(host)
    except ValueError as error:
        raise ConfigError("host", host, "an IP address") from error
    if not 0 <= port < 1 << 16:
        raise ConfigError("port", port, "0 to 65535")
    registry = CollectorRegistry()
    registry.register(Metrics(objects))
    return MetricsServer(registry, host, port)


# --- OpenTelemetry ----------------------------------------------------------------------------------------------


def observe(objects: Mapping[str, Observed], meter: Meter) -> None:
    """Give the metrics of these objects to a meter of OpenTelemetry, each time that its reader collects.

    The program chooses reader and exporter, as for its own metrics. The names are those of `serve`, without
    ``_total``. The objects are held for as long as the meter exists.

    Args:
        objects: each by the name that its samples have as the attribute ``name``.
        meter: of `opentelemetry.metrics`.

    Raises:
        ConfigError: an object is none that has metrics.
    """
    from opentelemetry.metrics import Observation

    watched = _checked(objects)

    def observations(family: Family, _options: CallbackOptions) -> Iterable[Observation]:
        for _, labels, value in _samples(watched, [family]):
            yield Observation(value, dict(zip(("name", *family.labels), labels, strict=True)))

    for family in FAMILIES:
        make = meter.create_observable_counter if family.is_counter else meter.create_observable_gauge
        make(
            family.name.removesuffix("_total"),
            [functools.partial(observations, family)],
            description=family.help,
            unit="By" if "_bytes" in family.name else "s" if "_seconds" in family.name else "1",
        )
