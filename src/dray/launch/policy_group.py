"""The policy replicas' processes: started together, and all of them again when one is lost.

A step of the group is void when one of its ranks has died, and what the others hold of it with it: so none of them
goes on. The next life begins an epoch of its own, goes on from the last checkpoint, and is given what the one
before had not committed.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from dray.launch.children import Child
from dray.launch.replicas import Environment, start_rank
from dray.runtime.exit_codes import COMES_AGAIN, ExitCode
from dray.runtime.job import JobFolder

_NEVER_AGAIN = COMES_AGAIN | {ExitCode.CONFIGURATION, ExitCode.CONTROLLER_LOST, ExitCode.REDIS_LOST}
_AGAIN = frozenset((ExitCode.NOT_A_MEMBER, ExitCode.OLD_EPOCH, ExitCode.GROUP_LOST))


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
        """Whether the group goes on in another life, now that one of it has ended."""
        codes = [child.exit_code for child in self.children if child.exit_code is not None]
        return self.life < self.restarts and is_worth_another_life(codes, self._here)

    def end(self) -> list[Child]:
        """Kill the ranks that are still there; returns them."""
        left = [child for child in self.children if child.running]
        for child in left:
            child.kill_group()
        for child in left:
            child.collect(5.0)
        return left


def is_worth_another_life(codes: Iterable[int], replicas: int) -> bool:
    """Whether another life may do better than one whose ranks ended with `codes`: one that was killed or lost the
    others may. What the user's class returned comes again. An exception of it does so in a group of one; in a
    larger one it may only say that another rank was gone."""
    ended = set(codes)
    if ended & _NEVER_AGAIN:
        return False
    again = _AGAIN if replicas == 1 else _AGAIN | {ExitCode.USER_CODE}
    return any(code < 0 or code in again for code in ended)
