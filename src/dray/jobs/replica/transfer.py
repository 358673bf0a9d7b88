"""How payloads and weights travel: makes a replica's ends of their ways, with rings or with Redis alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from dray.agent import AGENT_VARIABLE, register
from dray.identifiers import PayloadId
from dray.jobs.process import folder_is_local, own_address
from dray.jobs.queue import RolloutProducer, WeightsChannel
from dray.jobs.replica.base import Replica
from dray.jobs.replica.redis_transfer import (
    RedisPublisher,
    RedisReader,
    RedisWeightsPublisher,
    RedisWeightsSubscriber,
)
from dray.jobs.replica.ring_transfer import (
    GroupSource,
    RingPublisher,
    RingReader,
)
from dray.jobs.replica.weights_stream import StreamWeightsPublisher, StreamWeightsSubscriber
from dray.prefetch import BatchReader
from dray.protocol.ref import has_control
from dray.ring import SharedRingBuffer
from dray.text import path_of
from dray.transport import PayloadClient, PayloadServer

TrajectoryPublisher = RingPublisher | RedisPublisher
TrajectoryReader = RingReader | RedisReader
WeightsPublisher = StreamWeightsPublisher | RedisWeightsPublisher
WeightsSubscriber = StreamWeightsSubscriber | RedisWeightsSubscriber

_FREE_PAUSE = 2.0
_MAX_SOCKET_FOLDER = 80
_HEIR_LANES = ("shm", "tcp")


@contextmanager
def rollout_ends(replica: Replica) -> Iterator[tuple[TrajectoryPublisher, WeightsSubscriber]]:
    """The ends of a rollout replica."""
    config, stop, activity = replica.spec.config, replica.stop, replica.activity
    channel = WeightsChannel(replica.redis, replica.keys)
    if config.job.transfer == "inline":
        unfinished = config.work_items_in_flight * config.payloads_of_work_item
        publisher = RedisPublisher(
            RolloutProducer(replica.redis, replica.keys, max_backlog=unfinished),
            replica.name,
            stop,
            activity.counters,
            replica.stages,
            kept=unfinished,
            timeout=config.timeouts.redis,
        )
        yield publisher, RedisWeightsSubscriber(channel, activity.counters)
        return
    with ExitStack() as opened:
        ring = opened.enter_context(
            SharedRingBuffer(config.rollout.slots, config.rollout.slot_bytes, readers=config.policy.readers)
        )
        server = _server(replica, ring, opened)
        weights = opened.enter_context(
            StreamWeightsSubscriber(
                channel,
                stop,
                activity.counters,
                lane=config.job.lane,
                secret=replica.spec.secret,
                timeout=config.timeouts.read,
            )
        )
        yield (
            RingPublisher(
                ring,
                server,
                RolloutProducer(replica.redis, replica.keys),
                replica.name,
                stop,
                activity,
                replica.heartbeat,
                replica.stages,
                inline_bytes=config.rollout.inline_bytes,
                serve=replica.bounds.serve,
                timeout=config.timeouts.redis,
            ),
            weights,
        )


@contextmanager
def policy_ends(
    replica: Replica, freed: Callable[[Iterable[PayloadId]], None]
) -> Iterator[tuple[TrajectoryReader, WeightsPublisher]]:
    """The ends of the first policy replica.

    Args:
        freed: called with payloads that their producers have freed.
    """
    config, channel = replica.spec.config, WeightsChannel(replica.redis, replica.keys)
    if config.job.transfer == "inline":
        yield RedisReader(), RedisWeightsPublisher(channel)
        return
    with ExitStack() as opened:
        clients = [opened.enter_context(_client(replica, reader)) for reader in range(config.policy.readers)]
        batches = _batch_reader(replica, clients, freed)
        # The last heartbeat has what is left when every request has ended, not what was under way before.
        opened.callback(lambda: replica.activity.show("unfreed", float(batches.unfreed)))
        opened.enter_context(batches)
        weights = opened.enter_context(
            StreamWeightsPublisher(
                channel,
                replica.stop,
                lane=config.job.lane,
                host=None if folder_is_local() else own_address(),
                replicas=config.rollout.replicas,
                delta=config.policy.weights,
                secret=replica.spec.secret,
                timeout=config.timeouts.read,
                close_timeout=replica.bounds.transfers,
            )
        )
        yield RingReader(clients[0], batches, config.timeouts.read), weights


def rank_reader(replica: Replica) -> BatchReader:
    """What a policy replica that is not the first of its group reads with."""
    return _batch_reader(replica, [_client(replica, replica.index % replica.spec.config.policy.readers)])


def _batch_reader(
    replica: Replica,
    clients: Sequence[PayloadClient],
    freed: Callable[[Iterable[PayloadId]], None] = lambda ids: None,
) -> BatchReader:
    config = replica.spec.config
    # A committed payload is freed however long its producer takes to answer. The slots of the rings limit how many
    # payloads wait.
    return BatchReader(
        GroupSource(clients, in_place=config.policy.in_place, freed=freed),
        read_timeout=config.timeouts.read,
        consume=False,
        free_attempts=sys.maxsize,
        free_pause=_FREE_PAUSE,
    )


def _server(replica: Replica, ring: SharedRingBuffer, opened: ExitStack) -> PayloadServer:
    """A server of the ring, which is registered with the agent of this machine. `opened` closes both."""
    config = replica.spec.config
    max_leases = max(8, ring.slots)
    agent = os.environ.get(AGENT_VARIABLE)
    registration = register(
        ring,
        None if agent is None else path_of(agent),
        name=replica.name,
        lanes=_HEIR_LANES if config.job.lane == "auto" else (config.job.lane,),
        host=own_address(),
        secret=replica.spec.secret,
        max_leases=max_leases,
    )
    sockets = replica.spec.folder.run / "sockets"
    # A Unix socket's path is short by law, and has no control characters in a reference: else the default place.
    fits = folder_is_local() and len(str(sockets)) <= _MAX_SOCKET_FOLDER and not has_control(str(sockets))
    server = opened.enter_context(
        PayloadServer(
            ring,
            lane=config.job.lane,
            host=own_address(),
            threads=config.rollout.server_threads,
            secret=replica.spec.secret,
            max_leases=max_leases,
            drain_timeout=replica.bounds.transfers,
            join_timeout=replica.bounds.threads,
            directory=sockets if fits else None,
            heirs=() if registration is None else registration.endpoints,
        )
    )
    if registration is not None:
        opened.enter_context(registration)
    return server


def _client(replica: Replica, reader: int) -> PayloadClient:
    return PayloadClient(lane=replica.spec.config.job.lane, secret=replica.spec.secret, reader=reader)
