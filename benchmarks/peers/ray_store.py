"""Ray: arrays as the argument of an actor's method, which puts those above 100 KiB into the object store.

That is Ray's shortest way from one process to another: one call, with small arrays inside it. The actor sees the
store's memory mapped read-only. The call's answer carries the time at which the arrays were there.
"""

from __future__ import annotations

import importlib
import os
import time
from collections import deque
from typing import Any

import numpy as np

from benchmarks.peers.isolation import join_loopback
from benchmarks.service import Reply

_STORE_BYTES = 4 << 30
_SECONDS = 60.0


def start_ray(**options: Any) -> Any:
    """The module, with this process connected to a Ray on loopback alone: one of its own, or that of an `address`.

    Raises:
        NotIsolated: the process could reach other hosts.
    """
    join_loopback()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray = importlib.import_module("ray")
    if "address" not in options:
        options |= {"address": "local", "include_dashboard": False}
    ray.init(_node_ip_address="127.0.0.1", log_to_driver=False, **options)
    return ray


class RayService:
    """The producer is this process, the driver; the consumer is an actor."""

    def __init__(self) -> None:
        self._ray = start_ray(num_cpus=2, object_store_memory=_STORE_BYTES)
        self._actor: Any = self._ray.remote(_Consumer).options(num_cpus=1).remote()
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._sequence = 0

    def do(self, command: str, **arguments: Any) -> Reply:
        if command == "open":
            generator = np.random.default_rng(0)
            shape = arguments["nbytes"] // 8
            self._arrays = [generator.integers(0, 2**63, shape, np.uint64) for _ in range(arguments["window"])]
            return Reply({})
        if command == "latency":
            began, ended = self._measure(arguments["count"], 1)
            return Reply({"seconds": [b - a for a, b in zip(began, ended, strict=True)]})
        if command == "stream":
            began, ended = self._measure(arguments["count"], len(self._arrays))
            return Reply({"seconds": ended[-1] - began[0]})
        self._arrays.clear()
        return Reply({})

    def close(self) -> None:
        self._ray.shutdown()

    def _measure(self, count: int, window: int) -> tuple[list[float], list[float]]:
        began: list[float] = []
        ended: list[float] = []
        waiting: deque[Any] = deque()
        for _ in range(count):
            if len(waiting) == window:
                ended.append(self._ray.get(waiting.popleft(), timeout=_SECONDS))
            array = self._arrays[self._sequence % len(self._arrays)]
            self._sequence += 1
            array[0] = array[-1] = self._sequence
            began.append(time.monotonic())
            waiting.append(self._actor.receive.remote(array, self._sequence))
        ended += self._ray.get(list(waiting), timeout=_SECONDS)
        return began, ended


class _Consumer:
    """Ray makes an actor of it in a process of its own."""

    def receive(self, array: np.ndarray[Any, Any], sequence: int) -> float:
        if array[0] != sequence or array[-1] != sequence:
            raise ValueError(f"payload {sequence} is another one")
        return time.monotonic()
