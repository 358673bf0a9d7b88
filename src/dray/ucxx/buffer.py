"""`UCXXBuffer`: a rollout worker's trajectories, in shared memory and served to whoever has their completions."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from dray.clock import Deadline
from dray.payload import torch_interop
from dray.payload.trajectory import EPISODE_LENGTH, resolve_episode_length
from dray.ring import SharedRingBuffer
from dray.transport import PayloadServer
from dray.transport.server_statistics import ServerStatistics
from dray.ucxx.completion import Completion, completion_for
from dray.ucxx.config import UCXXBufferConfig


class UCXXBuffer:
    """A ring and its server, for trajectories.

    Args:
        config: the ring, the server and the schema; every setting has a default.

    Attributes:
        config: as given.
        ring: where the payloads are.
        server: who serves them.

    Raises:
        ConfigError: a setting is not allowed, or a lane cannot be served here.
        MissingDependencyError: the ``ucx`` lane is to be served and `ucxx` is not installed; it says what to
            install.
    """

    def __init__(self, config: UCXXBufferConfig | None = None) -> None:
        self.config = config or UCXXBufferConfig()
        self._schema = self.config.trajectory_schema
        self.ring = SharedRingBuffer(
            self.config.slots, self.config.slot_bytes, on_full=self.config.on_full, readers=self.config.readers
        )
        try:
            self.server = PayloadServer(
                self.ring,
                lane=self.config.served_lanes,
                host=self.config.host,
                port=self.config.port,
                threads=self.config.n_server_threads,
                idle_timeout=self.config.idle_timeout,
                secret=self.config.secret,
            )
        except BaseException:
            self.ring.close()
            raise

    def write(
        self,
        trajectory: Mapping[str, Any],
        *,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Completion:
        """Pack a trajectory into a free slot; the completion that stands for it.

        Args:
            trajectory: field name → NumPy array, torch tensor on any device, list or number. ``episode_length``
                is written where it is not there: the number of rows of the per-step fields.
            metadata: text by name, kept with the arrays.
            timeout: seconds to wait for a free slot; by default the configuration's ``write_timeout``.

        Raises:
            PayloadError: it cannot be packed, does not fit the schema, or not into a slot.
            BufferFullError: no slot became free in time.
            BufferClosedError: the buffer is closed.
        """
        arrays = {
            name: torch_interop.to_numpy(value) if torch_interop.is_tensor(value) else value
            for name, value in trajectory.items()
        }
        if EPISODE_LENGTH not in arrays:
            length = resolve_episode_length(arrays, self.config.per_step)
            arrays[EPISODE_LENGTH] = np.asarray(length, np.int64)
        wait = self.config.write_timeout if timeout is None else timeout
        return completion_for(self.server.put(arrays, schema=self._schema, metadata=metadata, timeout=wait))

    def drain(self, timeout: float) -> int:
        """Wait until what was written is consumed; how many payloads are left after `timeout` seconds."""
        deadline = Deadline.after(timeout)
        ready = self.ring.ready(leased=True)
        return sum(not self.ring.wait_consumed(each.slot, each.sequence, deadline.remaining) for each in ready)

    def statistics(self) -> ServerStatistics:
        """As `PayloadServer.statistics`."""
        return self.server.statistics()

    def close(self) -> None:
        """End the server, then the ring; what was not read is gone. Twice is fine."""
        self.server.close()
        self.ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<UCXXBuffer {self.server!r}>"
