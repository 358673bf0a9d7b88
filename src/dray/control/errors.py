"""What the control plane says besides `ControlPlaneError`: each class tells its caller to do one thing."""

from __future__ import annotations

from dray.errors import ControlPlaneError


class RedisUnavailableError(ControlPlaneError):
    """Redis has not answered until the deadline; the message says for how long it has been away."""

    retryable = True


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
