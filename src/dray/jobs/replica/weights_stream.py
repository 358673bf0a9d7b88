"""``transfer = "reference"``: weights are versions of a `dray.Publisher`; where the newest one is, Redis knows.

A policy that starts publishes under a new name. A version acts when Redis has accepted its entry, which it refuses
to a policy group that was replaced: what a publisher announces earlier is not used.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from dray.clock import Deadline
from dray.counters import Counters
from dray.errors import (
    BufferFullError,
    ConfigError,
    MissingDependencyError,
    ProtocolError,
    StreamTimeout,
    TransportError,
)
from dray.jobs.process import StopFlag
from dray.jobs.queue import PublishedWeights, WeightsChannel
from dray.jobs.replica.user_code import UserValueError
from dray.name_resolution import bracketed
from dray.payload import Arrays
from dray.payload.ragged import arrays_in
from dray.resources import Closing
from dray.streams import Publisher, Subscriber
from dray.streams.payload import Weights
from dray.streams.registry import Registry
from dray.streams.weights import DeltaMode
from dray.transport.lanes import LANES

_LOG = logging.getLogger("dray.jobs.replica.weights_stream")
_SLICE = 0.5
_MAX_VERSIONS: Final = 64


@dataclass(frozen=True, slots=True)
class WeightsReference:
    """Where a version of the weights is.

    Attributes:
        stream, scope: what its publisher is called on its host.
        addresses: of the publisher, for other hosts.
        number: that of the version there.
    """

    stream: str
    scope: str
    addresses: tuple[str, ...]
    number: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> WeightsReference:
        """The reference that `to_json` has written.

        Raises:
            ProtocolError: it is none.
        """
        try:
            found = json.loads(text)
            stream, scope, addresses, number = (found[each] for each in ("stream", "scope", "addresses", "number"))
            texts = [stream, scope, *addresses]
            if number.__class__ is not int or not all(isinstance(each, str) for each in texts):
                raise ValueError("a text or a number is of another type")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ProtocolError(f"not a reference of weights: {text[:200]!r}") from error
        return cls(stream, scope, tuple(addresses), number)


class StreamWeightsPublisher(Closing):
    """The policy replica's end of the way of weights.

    Args:
        lane: that of the job.
        host: the address to listen on for other nodes; None if all replicas are on this machine.
        replicas: how many rollout replicas there are.
        delta: whether whole versions travel to other hosts, or what has changed.
        timeout: seconds to wait for room, if workers keep arrays of earlier versions.
        close_timeout: seconds for transfers in flight at the end.
    """

    def __init__(
        self,
        channel: WeightsChannel,
        stop: StopFlag,
        *,
        lane: str,
        host: str | None,
        replicas: int,
        delta: DeltaMode,
        secret: bytes,
        timeout: float,
        close_timeout: float,
    ) -> None:
        self._channel = channel
        self._stop = stop
        self._timeout = timeout

        def publisher(listen: Sequence[str]) -> Publisher:
            return Publisher(
                f"weights-{secrets.token_hex(8)}",
                # A worker may keep the arrays of a version until it has loaded the next one.
                versions=min(2 * replicas + 2, _MAX_VERSIONS),
                delta=delta,
                listen=listen,
                secret=secret,
                drain_timeout=close_timeout,
            )

        self._publisher = _on_usable_lanes(lane, host, publisher)

    def publish(self, weights: Arrays, version: int, epoch: int | None) -> None:
        """Make `weights`, of a policy group in its `epoch`, the newest; nothing happens if stopped before.

        Raises:
            PayloadError: `weights` cannot be carried.
            UserValueError: workers keep arrays of too many earlier versions.
        """
        deadline = Deadline.after(self._timeout)
        while not self._stop.is_set:
            try:
                # Versions of a job begin at 0, those of a publisher at 1.
                number = self._publisher.publish(weights, version + 1, timeout=deadline.capped_at(_SLICE).timeout)
            except BufferFullError as error:
                if deadline.expired:
                    raise UserValueError(f"load_weights must copy what it keeps: {error}") from error
                continue
            of = self._publisher
            reference = WeightsReference(of.name, of.scope, of.addresses, number)
            self._channel.publish(reference.to_json(), version, epoch=epoch)
            return

    def restore(self) -> None:
        """Publish again what Redis has lost, if it was restarted empty."""
        self._channel.restore()

    def newest_version(self) -> int | None:
        """The version that was published last, in whichever epoch of the policy group; None if there is none."""
        newest = self._channel.newest()
        return None if newest is None else newest.version

    def close(self) -> None:
        """End the publisher. Twice is fine."""
        self._publisher.close()


class StreamWeightsSubscriber(Closing):
    """The rollout replica's end of the way of weights, each of which is fetched within `timeout` seconds.

    Args:
        lane: that of the job.
        counters: where it counts ``weight_payloads``, of these ``weight_deltas`` and ``weights_in_place``, their
            whole size in ``weight_bytes``, what has travelled in ``weight_received_bytes``; and ``weight_stale``,
            waits for weights that brought none.
    """

    def __init__(
        self,
        channel: WeightsChannel,
        stop: StopFlag,
        counters: Counters,
        *,
        lane: str,
        secret: bytes,
        timeout: float,
    ) -> None:
        self._channel = channel
        self._stop = stop
        self._counters = counters
        self._lane = lane
        self._secret = secret
        self._timeout = timeout
        self._last: PublishedWeights | None = None
        self._opened = ExitStack()
        self._publisher = ""  # the name of that of `_subscriber`
        self._subscriber: Subscriber
        self._attempts = 0

    def newer(self, timeout: float) -> tuple[int, Arrays] | None:
        """Version and arrays of the newest weights if they are others than the last time; else None.

        The arrays are read-only. Those of this machine are in place: what is kept of them keeps the memory of
        the whole version.
        """
        deadline = Deadline.after(self._timeout)
        found = self._channel.wait_newer(self._last, timeout)
        while found is not None and not self._stop.is_set:
            reference = WeightsReference.from_json(found.reference)
            weights = self._read(reference, deadline)
            if weights is not None and weights.version == reference.number:
                self._last = found
                self._count(weights)
                return found.version, _read_only(weights)
            if weights is None and not self._subscriber.attached:
                self._publisher = ""  # next time, another address of it if there is one
                break  # its policy has died, and rollouts continue until the next one publishes
            # Many bytes are on their way; or newer ones are published, and their entry follows.
            newer = self._channel.wait_newer(found, 0.0 if weights is None else deadline.capped_at(_SLICE).timeout)
            if newer is None and deadline.expired:
                break
            found = found if newer is None else newer
        return None

    def close(self) -> None:
        """End the subscription. Twice is fine."""
        self._opened.close()

    def _read(self, reference: WeightsReference, deadline: Deadline) -> Weights | None:
        subscriber = self._subscriber_to(reference)
        try:
            return subscriber.newest(reference.number - 1, deadline.capped_at(_SLICE).timeout)
        except (StreamTimeout, TransportError) as error:
            _LOG.info("weights have not come yet: %s", error)
            self._counters.add("weight_stale")
            return None

    def _subscriber_to(self, reference: WeightsReference) -> Subscriber:
        if self._publisher != reference.stream:
            self._opened.close()
            stream, scope = self._place_of(reference)
            self._attempts += 1
            self._subscriber = self._opened.enter_context(Subscriber(stream, scope=scope, secret=self._secret))
            self._publisher = reference.stream
        return self._subscriber

    def _place_of(self, reference: WeightsReference) -> tuple[str, str | None]:
        """Name and scope of a publisher on this host, where the lane allows that; else one of its addresses."""
        usable = [
            address
            for address in reference.addresses
            if (lane := address.partition(":")[0]) in LANES
            and LANES[lane].available
            and self._lane in ("auto", lane)
        ]
        if not usable or (self._lane == "auto" and _is_here(reference)):
            return reference.stream, reference.scope
        return usable[self._attempts % len(usable)], None

    def _count(self, weights: Weights) -> None:
        self._counters.add_all(
            {
                "weight_payloads": 1,
                "weight_deltas": int(weights.delta),
                "weights_in_place": int(weights.in_place),
                "weight_bytes": sum(array.nbytes for _, array in arrays_in(weights)),
                "weight_received_bytes": weights.received_bytes,
            }
        )


def _is_here(reference: WeightsReference) -> bool:
    with Registry(reference.stream, reference.scope) as registry:
        return bool(registry.peers("p"))


def _read_only(weights: Weights) -> Arrays:
    for _, array in arrays_in(weights):
        array.flags.writeable = False
    return dict(weights)


def _on_usable_lanes(lane: str, host: str | None, publisher: Callable[[Sequence[str]], Publisher]) -> Publisher:
    """A publisher that listens where replicas on other nodes, or of a lane of the network, need it.

    Raises:
        ConfigError, MissingDependencyError: this machine cannot use the lane of the job.
    """
    shown = None if host is None else bracketed(host)
    if lane == "shm" or (lane == "auto" and host is None):
        return publisher(())
    if lane != "auto":
        return publisher([f"{lane}://{shown or '127.0.0.1'}:0"])
    names = [each.name for each in LANES.values() if not each.local and each.available]
    try:
        return publisher([f"{name}://{shown}:0" for name in names])
    except (ConfigError, MissingDependencyError) as error:
        _LOG.warning("weights travel over tcp alone: %s", error)
        return publisher([f"tcp://{shown}:0"])
