"""Which of the two ways payloads travel, by the job's configuration."""

from __future__ import annotations

from dray.runtime.by_reference import reference_inlet, reference_outlet
from dray.runtime.inline import inline_inlet, inline_outlet
from dray.runtime.replica import Replica
from dray.runtime.transfer import InletContext, OutletContext


def open_outlet(replica: Replica) -> OutletContext:
    """The ends of a rollout replica."""
    if replica.spec.config.job.payload_transfer == "redis":
        return inline_outlet(replica)
    return reference_outlet(replica)


def open_inlet(replica: Replica) -> InletContext:
    """The ends of the policy replica."""
    if replica.spec.config.job.payload_transfer == "redis":
        return inline_inlet(replica)
    return reference_inlet(replica)
