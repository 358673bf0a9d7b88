"""What the control plane says besides `ControlPlaneError`: each class tells its caller to do one thing."""

from __future__ import annotations

from typing import Any

from dray.errors import ControlPlaneError


class RedisUnavailableError(ControlPlaneError):
    """Redis has not answered until the deadline, or has refused; the message says for how long.

    Args:
        answer: what the server answered; empty if it did not.
    """

    retryable = True

    def __init__(self, message: str, *, answer: str = "", **about: Any) -> None:
        super().__init__(message, **about)
        self.answer = answer


class StreamLostError(ControlPlaneError):
    """The stream is not the one this producer published to: Redis was restarted empty.

    Call `RolloutQueue.attach` and publish every payload again that is READY or being read.
    """

    retryable = True


class BacklogFullError(ControlPlaneError):
    """The stream held `max_backlog` entries until the deadline; nothing was published."""

    retryable = True


class OldEpochError(ControlPlaneError):
    """The policy group goes on under a newer epoch; nothing was committed, and this replica must exit."""


class ControlPlaneStopped(ControlPlaneError):
    """The wait was given up because shutdown began; nothing was published."""
