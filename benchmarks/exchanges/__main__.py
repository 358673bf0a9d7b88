"""The far end of one exchange: ``python -m benchmarks.exchanges KIND [DESCRIPTOR]``."""

from __future__ import annotations

import sys

from benchmarks.service import Service, serve


def make_service(kind: str, descriptors: list[int]) -> Service:
    """The service that goes by `kind`."""
    # Each is imported where it is used: a bare end holds nothing but what it needs.
    if kind == "socket":
        from benchmarks.exchanges.sockets import SocketService

        return SocketService()
    if kind == "memory":
        from benchmarks.exchanges.memory import MemoryService

        return MemoryService(descriptors[0])
    if kind == "ucx":
        from benchmarks.exchanges.ucx import UcxService

        return UcxService()
    if kind == "payloads":
        from benchmarks.exchanges.lanes import PayloadService

        return PayloadService()
    if kind == "idle reader":
        from benchmarks.exchanges.lanes import IdleReaderService

        return IdleReaderService()
    if kind == "busy payloads":
        from benchmarks.exchanges.busy import BusyService

        return BusyService(descriptors[0])
    if kind == "holding":
        from benchmarks.exchanges.holding import HoldingService

        return HoldingService()
    if kind == "producing":
        from benchmarks.exchanges.producing import ProducingService

        return ProducingService(descriptors[0])
    if kind == "producers":
        from benchmarks.exchanges.streaming import ProducersService

        return ProducersService()
    if kind == "stream reader":
        from benchmarks.exchanges.streaming import StreamReaderService

        return StreamReaderService()
    if kind == "publishing":
        from benchmarks.exchanges.publishing import PublishingService

        return PublishingService()
    raise ValueError(f"unknown kind {kind!r}")


if __name__ == "__main__":
    serve(make_service(sys.argv[1], [int(each) for each in sys.argv[2:]]))
