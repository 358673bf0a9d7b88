"""The agent in a supervisor: what a killed rollout replica has handed on is trained on all the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from dray.agent import AGENT_VARIABLE, Agent
from dray.errors import DrayError
from dray.jobs.config import JobConfig
from dray.jobs.messages.models import HeirFigures
from dray.private_directory import PrivateDirectory
from dray.text import text_of

_LOG = logging.getLogger("dray.jobs.launch.heirs")


class RolloutHeir:
    """The heir of the rollout replicas of this machine, if they have one.

    Attributes:
        variables: what the replicas find in their environment.
    """

    def __init__(self, agent: Agent | None) -> None:
        self._agent = agent
        self.variables: Mapping[str, str] = {} if agent is None else {AGENT_VARIABLE: text_of(agent.path)}

    def figures(self) -> HeirFigures:
        """What it has inherited so far."""
        if self._agent is None:
            return HeirFigures()
        found = self._agent.statistics()
        return HeirFigures(
            rings=found.inherited_rings,
            payloads=found.inherited_payloads,
            bytes=found.inherited_bytes,
            consumed=found.consumed,
            dropped=found.dropped,
            left=found.left,
        )


@contextmanager
def rollout_heir(config: JobConfig, report: Callable[[str], None]) -> Iterator[RolloutHeir]:
    """The heir of the rollout replicas of this machine: an agent in this process.

    It ends with the block, and with this process however that ends. Without an agent the job runs as well: what a
    killed replica leaves is lost then, and counted.

    Args:
        config: of the job.
        report: is called with one line if there can be no agent.
    """
    if not config.agent.memory or config.job.transfer == "inline":
        yield RolloutHeir(None)
        return
    with ExitStack() as opened:
        try:
            folder = opened.enter_context(PrivateDirectory())
            agent = opened.enter_context(Agent(folder.path, memory=config.agent.memory, keep=config.agent.keep))
        except DrayError as error:
            report(f"no heir: {error}; payloads of rollout replicas that are killed are lost")
            yield RolloutHeir(None)
            return
        yield RolloutHeir(agent)
        found = agent.statistics()
        if found.inherited_rings:
            _LOG.info(
                "kept %d payloads of %d dead rollout replicas: "
                "%d were dropped, %d are left with %d bytes of memory",
                found.inherited_payloads, found.inherited_rings, found.dropped, found.left, found.memory,
            )  # fmt: skip


def total(figures: Iterable[HeirFigures]) -> dict[str, int]:
    """The figures of several machines together, by name."""
    found = [each.model_dump(exclude={"what"}) for each in figures]
    names = [name for name in HeirFigures.model_fields if name != "what"]
    return {name: sum(each[name] for each in found) for name in names}
