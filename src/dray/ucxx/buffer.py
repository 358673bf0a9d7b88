"""The rollout worker's side: `UCXXBuffer`, `UCXXRolloutMixin`, and the completions that stand for trajectories."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from dray.clock import Deadline
from dray.errors import BufferClosedError, ConfigError, DrayError, ProtocolError
from dray.payload import torch_interop
from dray.payload.trajectory import EPISODE_LENGTH, resolve_episode_length
from dray.protocol import PayloadRef
from dray.resources import Closing
from dray.ring import SharedRingBuffer
from dray.transport import PayloadServer
from dray.transport.server_statistics import ServerStatistics
from dray.ucxx.config import UCXXBufferConfig, UCXXConfig

logger = logging.getLogger("dray.ucxx")

PAYLOAD_KEY = "dray_payload"
"""The key of a completion. Its value is the text of a reference; a framework may add keys of its own."""

Completion = dict[str, str]

_REFERENCE_KEYS = frozenset("psqne")
_ABSENT = object()


class UCXXBuffer(Closing):
    """A ring for trajectories, and the server that serves them; both are attributes: `ring` and `server`.

    Args:
        config: settings of the ring, the server and the schema.

    Raises:
        ConfigError: a setting is not allowed, or a lane cannot be served on this machine.
        MissingDependencyError: `ucxx` is needed and not installed; the text has the command that installs it.
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
        except BaseException as error:
            self.ring.close()
            if isinstance(error, ConfigError) and error.key == "threads":
                raise ConfigError("n_server_threads", error.value, error.allowed) from error
            raise

    def write(
        self,
        trajectory: Mapping[str, Any],
        *,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Completion:
        """Pack a trajectory into a free slot and return the completion that stands for it.

        Args:
            trajectory: field name → NumPy array, torch tensor on any device, list or number. If it has no
                ``episode_length``, the number of rows of the per-step fields is added.
            metadata: text by name, stored with the arrays.
            timeout: seconds to wait for a free slot; by default the setting ``write_timeout``.

        Raises:
            PayloadError: the trajectory cannot be packed, or does not fit the schema or a slot.
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

    def drain(self, timeout: float = 30.0) -> int:
        """Wait until all payloads are consumed; return how many are left after `timeout` seconds."""
        deadline = Deadline.after(timeout)
        ready = self.ring.ready(leased=True)
        return sum(not self.ring.wait_consumed(each.slot, each.sequence, deadline.remaining) for each in ready)

    def statistics(self) -> ServerStatistics:
        """Return `PayloadServer.statistics`."""
        return self.server.statistics()

    def close(self) -> None:
        """Close the server, then the ring; unread payloads are lost. Twice is fine."""
        self.server.close()
        self.ring.close()

    def __repr__(self) -> str:
        return f"<UCXXBuffer {self.server!r}>"


class UCXXRolloutMixin:
    """Gives a framework's rollout worker the methods of a `UCXXBuffer`.

    Call `setup_ucxx` once, `write_to_buffer` for each trajectory, and `cleanup_ucxx` at the end.

    Attributes:
        ucxx_buffer: the buffer; ``None`` before `setup_ucxx`, after `cleanup_ucxx`, and if ``payload_transfer`` is
            not ``"ucxx"``.
    """

    ucxx_buffer: UCXXBuffer | None = None

    def setup_ucxx(
        self, buffer: UCXXBufferConfig | Mapping[str, Any] | None = None, config: UCXXConfig | None = None
    ) -> None:
        """Make the buffer; with ``payload_transfer = "redis"`` do nothing. `buffer` may be a configuration table.

        Raises:
            ConfigError, MissingDependencyError: as `UCXXBuffer`.
            DrayError: there is a buffer already.
        """
        if self.ucxx_buffer is not None:
            raise DrayError("setup_ucxx was called before; call cleanup_ucxx first")
        settings = UCXXBufferConfig.parse(buffer) if isinstance(buffer, Mapping) else buffer
        if config is None or config.enabled:
            self.ucxx_buffer = UCXXBuffer(settings)

    def write_to_buffer(
        self,
        trajectory: Mapping[str, Any],
        *,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Completion | None:
        """Call `UCXXBuffer.write`. With ``on_error = "none"``, a trajectory that cannot be written is logged.

        Returns None for such a trajectory, else its completion.
        """
        if self.ucxx_buffer is None:
            raise BufferClosedError('there is no buffer: call setup_ucxx with payload_transfer "ucxx" first')
        try:
            return self.ucxx_buffer.write(trajectory, metadata=metadata, timeout=timeout)
        except DrayError as error:
            if self.ucxx_buffer.config.on_error == "raise":
                raise
            logger.warning("trajectory not written: %s", error)
            return None

    def cleanup_ucxx(self, drain: float = 0.0) -> int:
        """Wait up to `drain` seconds for consumers and close the buffer; return how many payloads are unread.

        Twice is fine.
        """
        buffer, self.ucxx_buffer = self.ucxx_buffer, None
        if buffer is None:
            return 0
        with buffer:
            return buffer.drain(drain)


def completion_for(ref: PayloadRef) -> Completion:
    """Return the completion that stands for a payload: a ``dict`` that JSON can carry."""
    return {PAYLOAD_KEY: ref.to_json()}


def is_completion(value: object) -> bool:
    """Whether `value` stands for a payload. Prefetch and `get_policy_input` use this test and no other.

    True for a mapping with the key ``"dray_payload"``, as `completion_for` returns it; a `PayloadRef`; the JSON
    text of either; and an object whose attribute ``completion`` is one of these.
    """
    return _content(value) is not _ABSENT


def reference_of(completion: object) -> PayloadRef:
    """Return the reference in a completion.

    Raises:
        ProtocolError: there is no reference in it.
    """
    content = _content(completion)
    if isinstance(content, PayloadRef):
        return content
    if isinstance(content, str):
        return PayloadRef.from_json(content)
    found = "none" if content is _ABSENT else type(content).__name__
    raise ProtocolError(f"a completion's {PAYLOAD_KEY!r} must be a reference as text, got {found}")


def _content(value: object) -> object:
    """What stands in `value` where a completion has its reference; `_ABSENT` if `value` is no completion."""
    content = _own_content(value)
    return _own_content(getattr(value, "completion", None)) if content is _ABSENT else content


def _own_content(value: object) -> object:
    if isinstance(value, PayloadRef):
        return value
    if isinstance(value, Mapping):
        return value.get(PAYLOAD_KEY, _ABSENT)
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return _ABSENT
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return _ABSENT
    return value if parsed.keys() == _REFERENCE_KEYS else parsed.get(PAYLOAD_KEY, _ABSENT)
