"""Bare UCX: request, status and payload as three tagged messages, with `ucxx`'s low-level objects.

One worker at each end in blocking progress mode, which waits as dray does: it makes progress without sleep for a
short time first. Error handling is on; the settings are those of dray's `ucx` lane.
"""

from __future__ import annotations

import os
import select
from typing import Any

import numpy as np

from benchmarks.partner import ANSWER_SECONDS, Partner
from benchmarks.service import Reply
from dray.clock import Deadline
from dray.transport.lanes.ucx_worker import SEGMENT_SIZE, require
from dray.transport.polling import AdaptivePoller

FRAME_BYTES = 64
_REQUEST, _STATUS, _PAYLOAD = 1, 2, 3
_CLOSE_STEP_NS = 10_000_000
_CLOSE_STEPS = 100


class UcxEnd:
    """A worker, its one endpoint, and the wait for requests."""

    def __init__(self) -> None:
        self.ucx, self.array = require()
        options = {
            "TCP_TX_SEG_SIZE": SEGMENT_SIZE,
            "TCP_RX_SEG_SIZE": SEGMENT_SIZE,
            "TCP_CM_REUSEADDR": "y",
            "NET_DEVICES": "lo",
        }
        chosen = {name: value for name, value in options.items() if f"UCX_{name}" not in os.environ}
        features = (self.ucx.Feature.TAG, self.ucx.Feature.STREAM, self.ucx.Feature.WAKEUP)
        self.worker = self.ucx.UCXWorker(self.ucx.UCXContext(chosen, features))
        self.worker.init_blocking_progress_mode()
        self.endpoint: Any = None
        self._descriptor = select.poll()
        self._descriptor.register(self.worker.epoll_file_descriptor, select.POLLIN)
        self._poll: AdaptivePoller[Any] = AdaptivePoller(self._sleep, busy_poll=self.worker.progress_once)

    def send(self, memory: Any, tag: int) -> Any:
        return self.endpoint.tag_send(memory, self.ucx.UCXXTag(tag))

    def receive(self, memory: Any, tag: int) -> Any:
        return self.endpoint.tag_recv(memory, self.ucx.UCXXTag(tag))

    def wait(self, *requests: Any) -> None:
        """Make progress until all requests have completed."""
        for request in requests:
            while not request.completed:
                self.step()
            request.check_error()

    def step(self) -> None:
        """Make progress, or wait for something to make progress with."""
        if not self.worker.progress_once() and not self._poll(ANSWER_SECONDS * 1000):
            raise TimeoutError("UCX made no progress")

    def _sleep(self, timeout: float) -> Any:
        return not self.worker.arm() or self._descriptor.poll(timeout)

    def close(self) -> None:
        if self.endpoint is not None:
            self.endpoint.close_blocking(_CLOSE_STEP_NS, _CLOSE_STEPS)
            self.endpoint = None


class UcxService:
    """The answering end."""

    def __init__(self) -> None:
        self._end = UcxEnd()
        self._asking: list[int] = []
        self._listener: Any = None
        self._request = self._end.array(bytearray(FRAME_BYTES))
        self._status = self._end.array(bytearray(FRAME_BYTES))
        self._source = np.empty(0, np.uint8)
        self._slots = np.empty((0, 0), np.uint8)
        self._payloads: list[Any] = []

    def do(self, command: str, **arguments: Any) -> Reply:
        end = self._end
        if command == "listen":
            self._listener = end.ucx.UCXListener.create(end.worker, 0, self._asking.append)
            return Reply({"port": self._listener.port}, self._accept)
        if command == "open":
            self._source = np.random.default_rng(0).integers(0, 256, arguments["nbytes"], np.uint8)
            self._slots = np.zeros((arguments["slots"], arguments["nbytes"]), np.uint8)
            self._payloads = [end.array(slot) for slot in self._slots]
            return Reply({})
        count = arguments["count"]
        for slot in self._slots[:count]:
            np.copyto(slot, self._source)
        return Reply({}, lambda: self._exchange(count))

    def close(self) -> None:
        self._end.close()
        self._listener = None

    def _accept(self) -> None:
        deadline = Deadline.after(ANSWER_SECONDS)
        while not self._asking and not deadline.expired:
            self._end.step()
        self._end.endpoint = self._listener.create_endpoint_from_conn_request(self._asking.pop(), True)
        # UCX connects with the first messages.
        self._end.wait(self._end.receive(self._request, _REQUEST))
        self._end.wait(self._end.send(self._status, _STATUS))

    def _exchange(self, count: int) -> None:
        end = self._end
        for payload in self._payloads[:count]:
            end.wait(end.receive(self._request, _REQUEST))
            end.wait(end.send(self._status, _STATUS), end.send(payload, _PAYLOAD))


class UcxExchange:
    """Ask for a payload, and get status and payload.

    As in dray, each payload of a batch lies in memory of its own and is written before the batch, and all arrive
    in the same memory.
    """

    name = "bare UCX exchange"

    def __init__(self) -> None:
        self._partner = Partner("ucx")
        port = self._partner.ask("listen")["port"]
        self._end = UcxEnd()
        self._end.endpoint = self._end.ucx.UCXEndpoint.create(self._end.worker, "127.0.0.1", port, True)
        self._request = self._end.array(bytearray(FRAME_BYTES))
        self._status = self._end.array(bytearray(FRAME_BYTES))
        self._payload: Any = None
        answered = self._end.receive(self._status, _STATUS)
        self._end.wait(self._end.send(self._request, _REQUEST), answered)

    def open(self, nbytes: int, batch: int) -> None:
        self._partner.ask("open", nbytes=nbytes, slots=batch)
        self._payload = self._end.array(np.zeros(nbytes, np.uint8))

    def prepare(self, count: int) -> None:
        self._partner.ask("prepare", count=count)

    def once(self) -> None:
        end = self._end
        status = end.receive(self._status, _STATUS)
        payload = end.receive(self._payload, _PAYLOAD)
        end.wait(end.send(self._request, _REQUEST), status, payload)

    def shut(self) -> None:
        self._partner.ask("open", nbytes=0, slots=0)
        self._payload = None

    def close(self) -> None:
        self._end.close()
        self._partner.close()
