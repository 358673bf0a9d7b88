"""`UCXXRolloutMixin`: `UCXXBuffer` for those whose framework asks for a subclass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dray.errors import BufferClosedError, DrayError
from dray.ucxx.buffer import UCXXBuffer
from dray.ucxx.completion import Completion
from dray.ucxx.config import UCXXBufferConfig, UCXXConfig


class UCXXRolloutMixin:
    """Lets a rollout worker hand on completions in place of trajectories.

    Call `setup_ucxx` once, `write_to_buffer` for each trajectory, `cleanup_ucxx` at the end.

    Attributes:
        ucxx_buffer: the object behind it; None before `setup_ucxx`, after `cleanup_ucxx`, and where
            ``payload_transfer`` is not ``"ucxx"``.
    """

    ucxx_buffer: UCXXBuffer | None = None

    def setup_ucxx(
        self, buffer: UCXXBufferConfig | Mapping[str, Any] | None = None, config: UCXXConfig | None = None
    ) -> None:
        """Make the buffer and serve it; with ``payload_transfer = "redis"`` do nothing.

        Args:
            buffer: the buffer's settings, or a table of them as it stands in a configuration file.
            config: how payloads travel.

        Raises:
            ConfigError: a setting is not allowed.
            MissingDependencyError: `ucxx` is needed and not installed.
            DrayError: it was called before.
        """
        if self.ucxx_buffer is not None:
            raise DrayError("setup_ucxx was called before; cleanup_ucxx comes first")
        settings = UCXXBufferConfig.parse(buffer) if isinstance(buffer, Mapping) else buffer
        if config is None or config.enabled:
            self.ucxx_buffer = UCXXBuffer(settings)

    def write_to_buffer(
        self,
        trajectory: Mapping[str, Any],
        *,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Completion:
        """Put a trajectory of arrays or tensors into the buffer; the JSON-safe completion that stands for it.

        See `UCXXBuffer.write`.
        """
        if self.ucxx_buffer is None:
            raise BufferClosedError('there is no buffer: setup_ucxx with payload_transfer "ucxx" comes first')
        return self.ucxx_buffer.write(trajectory, metadata=metadata, timeout=timeout)

    def cleanup_ucxx(self, drain: float = 0.0) -> int:
        """Wait up to `drain` seconds for readers, then close; how many payloads were not read. Twice is fine."""
        buffer, self.ucxx_buffer = self.ucxx_buffer, None
        if buffer is None:
            return 0
        with buffer:
            return buffer.drain(drain)
