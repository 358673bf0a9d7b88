"""The process on the first node of a job: its supervisor, with controller, Redis and the replicas of its node.

``python -m dray.launch.slurm.head PLAN PART ATTEMPT``

It is what `dray run` is on one machine, and goes on from the checkpoint in the run's folder if there is one. Its
exit codes are the same. SIGUSR2 tells it that the time limit is near: it ends the job as SIGTERM does, with a code
of its own.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack

from dray.config import JobConfig, JobDraft
from dray.control import RedisAddress
from dray.errors import ConfigError
from dray.launch.display import Display
from dray.launch.ending import stopped_early
from dray.launch.entry_points import check_entry_points
from dray.launch.output import open_output, resume_line
from dray.launch.signals import SignalInbox
from dray.launch.site import Elsewhere, Nowhere, Site, chosen_token
from dray.launch.slurm.command_line import Task
from dray.launch.slurm.network import Interface, choose_interface
from dray.launch.slurm.placement import environment, placements
from dray.launch.slurm.plan import NODE_VARIABLE, Plan
from dray.launch.slurm.remote import OtherNodes
from dray.launch.slurm.task_process import run_task
from dray.launch.supervisor import supervise
from dray.name_resolution import is_loopback
from dray.runtime.exit_codes import ExitCode
from dray.runtime.job import JobFolder
from dray.runtime.membership import Role
from dray.runtime.place import LOOPBACK
from dray.runtime.process import adopt_orphans, log_to_stderr
from dray.transport.lanes import LANES


def run_head(task: Task) -> int:
    """Run one attempt of a job to its end; returns the exit code.

    Raises:
        ConfigError: before anything was started.
    """
    log_to_stderr("head", logging.WARNING)
    if task.node != task.nodes[0]:
        raise ConfigError(NODE_VARIABLE, task.node, f"the first of the job's nodes, which is {task.nodes[0]}")
    config = attempt_config(task.plan)
    # A job on one node needs nobody to reach it.
    alone = len(task.nodes) == 1 and task.plan.interface is None
    interface = Interface("lo", LOOPBACK) if alone else choose_interface(task.plan.interface)
    if len(task.nodes) > 1:
        check_between_nodes(config, interface)
    with ExitStack() as opened:
        inbox = opened.enter_context(SignalInbox())
        title = f"dray: job {config.job.name}"
        display = opened.enter_context(Display(title, config.job.max_steps, timestamps=True))
        folder, state = opened.enter_context(open_output(config, resume=None, attempt=task.name))
        site = _site(task, config, folder, interface, opened)
        if state is not None and not state.outcome:
            display.say(resume_line(folder, state))
        display.say(f"node {task.node}, at {interface.address} on {interface.name}: attempt {task.name}")
        if state is None or not state.outcome:
            adopt_orphans()
            draft, file = JobDraft(config), task.plan.job_file
            signals = check_entry_points(draft, file, folder.run, inbox, say=display.say)
            if signals:
                ending = stopped_early(folder, config.job.name, signals)
                display.say(ending.reason)
                return ending.exit_code
        return supervise(config, task.plan.job_file, site, state, inbox, display)


def attempt_config(plan: Plan) -> JobConfig:
    """The configuration of the job in an attempt."""
    config = plan.config
    # A group of several nodes begins again in another attempt.
    restarts = config.policy.restarts if plan.policy.nodes == 1 else 0
    return config.model_copy(
        update={
            "job": config.job.model_copy(update={"output": str(plan.run_folder)}),
            "policy": config.policy.model_copy(update={"restarts": restarts}),
        }
    )


def check_between_nodes(config: JobConfig, interface: Interface) -> None:
    """Make sure that the configuration is one for several nodes.

    Raises:
        ConfigError: the lane, or a configured Redis server, is for one machine only.
    """
    lane = LANES.get(config.job.lane)
    if lane is not None and lane.local and config.job.payload_transfer == "ucxx":
        between = ", ".join(each.name for each in LANES.values() if not each.local)
        raise ConfigError("job.lane", lane.name, f'a lane between nodes: "auto" or one of {between}')
    if config.redis.url is None:
        return
    address = RedisAddress(config.redis.url)
    host = address.options().get("host")
    if host is None or (is_loopback(host) and not interface.is_loopback):
        raise ConfigError("redis.url", str(address), "the address of a server that every node of the job reaches")


def _site(task: Task, config: JobConfig, folder: JobFolder, interface: Interface, opened: ExitStack) -> Site:
    placed = placements(task.plan, task.nodes)
    here = {each.name: each for each in placed if each.node == task.node}
    away = [each for each in placed if each.node != task.node]
    elsewhere: Elsewhere = Nowhere()
    if away:
        silence = config.controller.dead_after
        elsewhere = opened.enter_context(
            OtherNodes(folder, task.name, task.plan.secret, away, interface.address, silence)
        )
    rollouts = [each.index for each in here.values() if each.role is Role.ROLLOUT]
    variables = {name: environment(each, interface, os.environ) for name, each in here.items()}
    return Site(
        folder=folder,
        host=interface.address,
        ranks=len(here) - len(rollouts),
        rollouts=range(len(rollouts)),
        redis_host=interface.address if away else None,
        secret=task.plan.secret,
        token=chosen_token(config),
        environment=variables.__getitem__,
        elsewhere=elsewhere,
    )


def main() -> int:
    """See the module."""
    return run_task(run_head, failed=ExitCode.FAILED)


if __name__ == "__main__":
    sys.exit(main())
