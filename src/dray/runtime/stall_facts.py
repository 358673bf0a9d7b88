"""What the controller knows about waits, as the facts that `stall` makes a line of."""

from __future__ import annotations

from dray.runtime.lifecycle import Phase
from dray.runtime.membership import Membership
from dray.runtime.stall import Facts, Pastime, oldest


def gather(membership: Membership, now: float, elapsed: float) -> Facts:
    """The facts of this moment.

    Args:
        now: on the clock of `membership`.
        elapsed: seconds since the controller began.
    """
    active = membership.active()
    pastimes = [
        Pastime(
            member.name,
            member.progress.doing,
            member.progress.waits_for,
            member.progress.seconds + now - member.last_heard,
            now - member.last_heard,
        )
        for member in active
    ]
    missing = membership.missing() if membership.phase is Phase.STARTING else []
    if missing:
        pastimes.append(Pastime("the controller", "their registration", ", ".join(missing), elapsed))
    ages = {
        member.name: {kind: age + now - member.last_heard for kind, age in member.progress.ages.items()}
        for member in active
    }
    return Facts(pastimes, oldest(ages))
