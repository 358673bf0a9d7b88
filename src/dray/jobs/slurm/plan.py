"""The plan of a run on Slurm: what its processes read, written once, when the run is submitted.

It holds the run's secret: its folder has mode 0700 and the file 0600. The names of nodes are not in it: they are
known when the job runs, and every part of a run may have others (`NODES_VARIABLE`).

A process on a node gets ``PLAN PART ATTEMPT`` on its command line, and its place in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dray.errors import ConfigError, DrayError, error_lines
from dray.files import FOLDER_MODE, make_own_folder, read_private_file, write_json
from dray.jobs.config import JobConfig, SlurmTable
from dray.jobs.exit_codes import ExitCode
from dray.jobs.process import dump_stacks_on_signal, exit_with_own_code_on_crash
from dray.resources import raise_descriptor_limit

NODES_VARIABLE = "DRAY_NODES"
"""Environment variable with the names of the job's nodes, separated by spaces: first those of the policy."""

NODE_VARIABLE = "SLURMD_NODENAME"
"""Environment variable in which Slurm gives a task the name of its node."""


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module.

    Attributes:
        job_file: in the snapshot of the code, if there is one.
        run_folder: the output folder of all parts of the run.
        secret: of the controller, of connections between nodes and of payload transport.
    """

    config: JobConfig
    job_file: Path
    run_folder: Path
    secret: bytes = field(repr=False)

    @property
    def table(self) -> SlurmTable:
        """The table `[slurm]` of the job file; without one, the defaults."""
        return self.config.slurm or SlurmTable()

    @property
    def path(self) -> Path:
        """Where the plan lies."""
        return plan_path(self.run_folder)

    @property
    def node_count(self) -> int:
        """How many nodes the job has in all."""
        return self.table.policy_nodes + self.table.rollout_nodes

    def write(self) -> Path:
        """Write the plan where it belongs, for its owner only, whole or not at all; returns the place."""
        folder = self.path.parent
        self.run_folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        make_own_folder(folder, "plan", 0o700)
        folder.chmod(0o700)
        document = {
            "config": self.config.model_dump(mode="json"),
            "job_file": str(self.job_file),
            "run_folder": str(self.run_folder),
            "secret": self.secret.hex(),
        }
        write_json(self.path, document, mode=0o600)
        return self.path

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read what `write` wrote.

        Raises:
            ConfigError: there is no plan of this version there, or others than its owner may read it.
        """
        try:
            document = json.loads(read_private_file(path, "plan"))
            return cls(
                config=JobConfig.model_validate(document["config"]),
                job_file=Path(document["job_file"]),
                run_folder=Path(document["run_folder"]),
                secret=bytes.fromhex(document["secret"]),
            )
        except ConfigError:
            raise
        except FileNotFoundError as error:
            raise ConfigError("plan", str(path), str(error.strerror), f"{path} cannot be read") from error
        except (KeyError, TypeError, ValueError) as error:
            # Nothing of what was read is shown: it may be the secret.
            allowed = f"must be a plan of this version ({type(error).__name__})"
            raise ConfigError("plan", str(path), allowed, f"{path} cannot be used") from None


def plan_path(run_folder: Path) -> Path:
    """Where the plan of a run lies in its folder."""
    return run_folder / ".slurm" / "plan.json"


@dataclass(frozen=True, slots=True)
class Task:
    """The arguments of a process on a node.

    Attributes:
        nodes: the names of all nodes of the job, the policy's first.
        node: the name of the node on which the process runs.
    """

    plan: Plan
    part: int
    attempt: int
    nodes: tuple[str, ...]
    node: str

    @property
    def name(self) -> str:
        """Part and attempt, as the name of their folder has them."""
        return attempt_name(self.part, self.attempt)

    @classmethod
    def of_this_process(cls) -> Task:
        """The arguments of this process.

        Raises:
            ConfigError: something is missing, or does not fit the plan.
        """
        if len(sys.argv) != 4 or not all(each.isdecimal() for each in sys.argv[2:]):
            raise ConfigError("command line", " ".join(sys.argv[1:]), "PLAN PART ATTEMPT")
        plan = Plan.read(Path(sys.argv[1]))
        nodes = tuple(os.environ.get(NODES_VARIABLE, "").split())
        if len(nodes) != plan.node_count or len(set(nodes)) != len(nodes):
            allowed = f"the names of {plan.node_count} nodes, separated by spaces, each once"
            raise ConfigError(NODES_VARIABLE, " ".join(nodes), allowed)
        node = os.environ.get(NODE_VARIABLE, "")
        if node not in nodes:
            raise ConfigError(NODE_VARIABLE, node, f"one of the job's nodes, which are {' '.join(nodes)}")
        return cls(plan, int(sys.argv[2]), int(sys.argv[3]), nodes, node)


def attempt_name(part: int, attempt: int) -> str:
    """The name of an attempt's folder, e.g. ``"003.1"``."""
    return f"{part:03d}.{attempt}"


def run_task(run: Callable[[Task], int], *, failed: ExitCode) -> int:
    """Call `run` with the arguments of this process, in the environment of the plan; returns the exit code.

    A `DrayError` is a line on stderr (a `ConfigError` one for each mistake), and `ExitCode.CONFIGURATION` or,
    if it is of another kind, `failed`.
    """
    exit_with_own_code_on_crash()
    dump_stacks_on_signal()
    raise_descriptor_limit()
    try:
        task = Task.of_this_process()
        os.environ.update(task.plan.table.environment)
        return run(task)
    except DrayError as error:
        print(*error_lines(error), sep="\n", file=sys.stderr)
        return ExitCode.CONFIGURATION if isinstance(error, ConfigError) else failed
