"""The agent in a supervisor: what a killed rollout replica has handed on is trained on all the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from dray.agent import AGENT_VARIABLE, Agent
from dray.errors import DrayError
from dray.jobs.config import JobConfig
from dray.private_directory import PrivateDirectory
from dray.text import text_of

_LOG = logging.getLogger("dray.jobs.launch.heirs")


@contextmanager
def rollout_agent(config: JobConfig, report: Callable[[str], None]) -> Iterator[Mapping[str, str]]:
    """An agent in this process, for the rollout replicas of this machine; yields the variables that they need.

    It ends with the block, and with this process however that ends. Without one the job runs as well: what a
    killed replica leaves is lost then, and counted.

    Args:
        config: of the job.
        report: is called with one line if there can be no agent.
    """
    if not config.agent.memory or config.job.transfer == "inline":
        yield {}
        return
    with ExitStack() as opened:
        try:
            folder = opened.enter_context(PrivateDirectory())
            agent = opened.enter_context(Agent(folder.path, memory=config.agent.memory, keep=config.agent.keep))
        except DrayError as error:
            report(f"no heir: {error}; payloads of rollout replicas that are killed are lost")
            yield {}
            return
        yield {AGENT_VARIABLE: text_of(agent.path)}
        found = agent.statistics()
        if found.inherited_rings:
            _LOG.info(
                "kept %d payloads of %d dead rollout replicas: "
                "%d were dropped, %d are left with %d bytes of memory",
                found.inherited_payloads, found.inherited_rings, found.dropped, found.left, found.memory,
            )  # fmt: skip
