"""The plan of a run on Slurm: all that its processes are told, written once, when the run is submitted.

It holds the run's secret: its folder has mode 0700 and the file 0600. The names of nodes are not in it: they are
known when the job runs, and every part of a run may have others (`NODES_VARIABLE`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dray.config import JobConfig
from dray.errors import ConfigError
from dray.runtime.job import write_json
from dray.runtime.private_file import FOLDER_MODE, make_own_folder, read_private_file

NODES_VARIABLE = "DRAY_NODES"
"""Environment variable with the names of the job's nodes, separated by spaces: first those of the policy."""

NODE_VARIABLE = "SLURMD_NODENAME"
"""Environment variable in which Slurm tells a task the name of its node."""


@dataclass(frozen=True, slots=True)
class RoleLayout:
    """How the replicas of a role are spread over its nodes. A replica spans whole nodes or an even part of one.

    Attributes:
        nodes: how many the role has; 0: it shares the one node of the policy.
        replicas_per_node: how many share a node; 1 where a replica spans nodes.
        gpus_per_replica: on each of its nodes.
        nodes_per_replica: 1 where replicas share a node.
    """

    nodes: int
    replicas_per_node: int = 1
    gpus_per_replica: int = 0
    nodes_per_replica: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module.

    Attributes:
        job_file: in the snapshot of the code, if there is one.
        run_folder: the output folder of all parts of the run.
        secret: of the controller, of connections between nodes and of payload transport.
        interface: the network interface to use on every node; None: it is chosen.
        retries: how many attempts may fail before the run does.
        environment: variables for the processes of the job.
    """

    config: JobConfig
    job_file: Path
    run_folder: Path
    secret: bytes = field(repr=False)
    policy: RoleLayout
    rollout: RoleLayout
    interface: str | None
    retries: int
    environment: Mapping[str, str]

    @property
    def path(self) -> Path:
        """Where the plan lies."""
        return plan_path(self.run_folder)

    @property
    def node_count(self) -> int:
        """How many nodes the job has in all."""
        return self.policy.nodes + self.rollout.nodes

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
            "policy": asdict(self.policy),
            "rollout": asdict(self.rollout),
            "interface": self.interface,
            "retries": self.retries,
            "environment": dict(self.environment),
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
                policy=RoleLayout(**document["policy"]),
                rollout=RoleLayout(**document["rollout"]),
                interface=document["interface"],
                retries=document["retries"],
                environment=document["environment"],
            )
        except FileNotFoundError as error:
            reason = str(error.strerror)
            raise ConfigError("plan", str(path), reason, problem=f"{path} cannot be read") from error
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            # Nothing of what was read is shown: it may be the secret.
            allowed = f"must be a plan of this version ({type(error).__name__})"
            raise ConfigError("plan", str(path), allowed, problem=f"{path} cannot be used") from None


def plan_path(run_folder: Path) -> Path:
    """Where the plan of a run lies in its folder."""
    return run_folder / ".slurm" / "plan.json"
