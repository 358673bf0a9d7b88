"""The ends of each kind of peer; modules are imported where they are used, in an environment that can."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.peers.contract import PairedService, Sender
from benchmarks.service import Service


def make_service(kind: str) -> Service:
    """The consumer's process."""
    name, _, rest = kind.partition(":")
    match name:
        case "dray":
            from benchmarks.peers.dray_lanes import DrayReceiver

            return PairedService(partial(DrayReceiver, kind))
        case "stream":
            from benchmarks.peers.dray_stream import StreamReceiver

            return PairedService(partial(StreamReceiver, kind))
        case "multiprocessing":
            from benchmarks.peers.multiprocessing_queue import QueueReceiver

            return PairedService(QueueReceiver)
        case "redis":
            from benchmarks.peers.redis_inline import RedisReceiver

            return PairedService(RedisReceiver)
        case "zeromq":
            from benchmarks.peers.zeromq import ZeroMQReceiver

            return PairedService(partial(ZeroMQReceiver, rest))
        case "torch":
            from benchmarks.peers.torch_queue import TorchReceiver

            return PairedService(TorchReceiver)
        case "transferqueue":
            from benchmarks.peers.transfer_queue import TransferQueueReceiver

            return PairedService(TransferQueueReceiver)
        case "ray":
            from benchmarks.peers.ray_store import RayService

            return RayService()
    raise ValueError(f"unknown kind {kind!r}")


def make_sender(kind: str, references: socket.socket, settings: Mapping[str, Any]) -> Sender:
    """The producer's end."""
    match kind.partition(":")[0]:
        case "dray":
            from benchmarks.peers.dray_lanes import DraySender

            return DraySender(settings, references)
        case "stream":
            from benchmarks.peers.dray_stream import StreamSender

            return StreamSender(settings)
        case "redis":
            from benchmarks.peers.redis_inline import RedisSender

            return RedisSender(settings)
        case "zeromq":
            from benchmarks.peers.zeromq import ZeroMQSender

            return ZeroMQSender(settings)
        case "transferqueue":
            from benchmarks.peers.transfer_queue import TransferQueueSender

            return TransferQueueSender(settings, references)
    raise ValueError(f"unknown kind {kind!r}")
