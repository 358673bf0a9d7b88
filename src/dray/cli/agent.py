"""`dray agent`: the heir of all rings of this user that are registered with it."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from dray.identifiers import DEFAULT_AGENT_KEEP, DEFAULT_AGENT_MEMORY


def agent(
    memory: Annotated[
        int, typer.Option(min=1, help="Bytes of memory that the rings of dead producers may keep together.")
    ] = DEFAULT_AGENT_MEMORY,
    keep: Annotated[
        float, typer.Option(min=0.001, help="Seconds after a producer's death when what is left is dropped.")
    ] = DEFAULT_AGENT_KEEP,
) -> None:
    """Serve what registered producers of this user leave when they are killed, until Ctrl-C or SIGTERM.

    Programs find the agent by themselves, see `dray.agent.find_agent`; another one is named by DRAY_AGENT. A job
    has an agent of its own. What was inherited ends with this command.

    Exit code 0: Ctrl-C or SIGTERM; 2: another agent of this user runs.
    """
    from dray.agent import Agent, standing_folder
    from dray.resources import raise_descriptor_limit

    ends = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # the threads of the agent inherit it
    try:
        raise_descriptor_limit()
        with standing_folder() as folder, Agent(folder, memory=memory, keep=keep) as running:
            typer.echo(f"agent at {running.path}; Ctrl-C ends it")
            signal.sigwait(ends)
            found = running.statistics()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    typer.echo(
        f"kept {found.inherited_payloads} payloads of {found.inherited_rings} dead producers, "
        f"and dropped {found.dropped} of them"
    )
