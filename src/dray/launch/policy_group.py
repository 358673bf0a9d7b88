"""The policy replicas' processes: started together, and all of them again when one is lost.

A step of the group is void when one of its ranks has died, and what the others hold of it with it: so none of them
goes on. The next life begins an epoch of its own, goes on from the last checkpoint, and is given what the one
before had not committed.

Whether the group is started again depends on the exit codes of its ranks alone, by the table `RESTARTED`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum
from types import MappingProxyType

from dray.launch.children import Child
from dray.launch.replicas import Environment, start_rank
from dray.runtime.exit_codes import ExitCode
from dray.runtime.job import JobFolder


class Restarted(Enum):
    """Whether a policy group is started again when one of its ranks has ended with a certain exit code."""

    YES = "yes"
    IN_A_GROUP_OF_SEVERAL = "in a group of several"
    NO = "no"


RESTARTED: Mapping[int, Restarted] = MappingProxyType(
    {
        ExitCode.OK: Restarted.NO,
        ExitCode.FAILED: Restarted.YES,
        ExitCode.CONFIGURATION: Restarted.NO,
        # Alone, the class raises again. In a larger group it may have raised because another rank was gone.
        ExitCode.USER_CODE: Restarted.IN_A_GROUP_OF_SEVERAL,
        ExitCode.CONTROLLER_LOST: Restarted.NO,
        ExitCode.NOT_A_MEMBER: Restarted.YES,
        ExitCode.REDIS_LOST: Restarted.NO,
        ExitCode.INTERNAL: Restarted.YES,
        ExitCode.OLD_EPOCH: Restarted.YES,
        ExitCode.GROUP_LOST: Restarted.YES,
        ExitCode.USER_VALUE: Restarted.NO,
        # It was asked to end, and has written a checkpoint: that ends the job, too.
        ExitCode.SIGINT: Restarted.NO,
        ExitCode.TIME_LIMIT: Restarted.NO,
        ExitCode.SIGTERM: Restarted.NO,
    }
)
"""Every `ExitCode`. Any other code, and being killed by a signal, is `Restarted.YES`."""


class PolicyGroup:
    """See the module. To be used in the main thread.

    Args:
        here: how many of the ranks, the first ones, are processes of this machine.
        restarts: how often the group may be started again; only where all of them are.
        environment: the variables of a replica, by its name.

    Attributes:
        children: the processes of this life.
        life: how many lives there were before.
    """

    def __init__(self, folder: JobFolder, here: int, restarts: int, environment: Environment) -> None:
        self._folder = folder
        self._here = here
        self._environment = environment
        self.restarts = restarts
        self.children: list[Child] = []
        self.life = -1

    def start(self, elsewhere: Sequence[socket.socket] = ()) -> list[Child]:
        """Start all ranks of this machine, each connected with the first one.

        Args:
            elsewhere: connections to the ranks of other machines, in order; from here on the first rank has them.
        """
        self.life += 1
        with ExitStack() as ends:
            pairs = [socket.socketpair() for _ in range(1, self._here)]
            for end in (*(end for pair in pairs for end in pair), *elsewhere):
                ends.enter_context(end)
            first, *others = ([*(pair[0] for pair in pairs), *elsewhere], *([pair[1]] for pair in pairs))
            self.children = [
                start_rank(self._folder, rank, self.life, sockets, self._environment)
                for rank, sockets in enumerate([first, *others])
            ]
        return self.children

    def may_start_again(self) -> bool:
        """Whether the group is to be started again, now that one of it has ended."""
        codes = [child.exit_code for child in self.children if child.exit_code is not None]
        return self.life < self.restarts and is_restarted(codes, self._here)

    def end(self) -> list[Child]:
        """Kill the ranks that are still there; returns them."""
        left = [child for child in self.children if child.running]
        for child in left:
            child.kill_group()
        for child in left:
            child.collect(5.0)
        return left


def is_restarted(codes: Iterable[int], replicas: int) -> bool:
    """Whether a group is started again whose ranks ended with `codes`: no code forbids it, and one asks for it.

    Args:
        codes: as `subprocess` gives them, of the ranks that have ended.
        replicas: how many ranks the group has.
    """
    verdicts = {RESTARTED.get(code, Restarted.YES) for code in codes}
    if replicas == 1 and Restarted.IN_A_GROUP_OF_SEVERAL in verdicts:
        return False
    return bool(verdicts) and Restarted.NO not in verdicts
