"""The configuration files of the virtual cluster's daemons."""

from __future__ import annotations

import pwd
import random
import socket
from os import getuid
from pathlib import Path

NODES = ("n1", "n2", "n3")
PARTITION = "virtual"
GPUS_PER_NODE = 2
CPUS_PER_NODE = 4

KILL_WAIT = 5
"""Seconds between SIGTERM and SIGKILL for a job that is cancelled or has exceeded its time limit."""

NODE_TIMEOUT = 10
"""Seconds after which a node that does not answer counts as down."""

# Validity of munge's credentials, and so the time that a requeued job waits; 120 s by default.
CREDENTIAL_SECONDS = 6

# Slurm needs a device file for each number in CUDA_VISIBLE_DEVICES. They are not opened.
_GPU_FILES = ("/dev/null", "/dev/zero")

_CONFIGURATION = """\
ClusterName=dray
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={credential_seconds}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
SlurmdTimeout={node_timeout}
SlurmctldTimeout=30
InactiveLimit=0
MinJobAge=1800
GresTypes=gpu
PartitionName={partition} Nodes={nodes} Default=YES MaxTime=INFINITE DefaultTime=10
"""

_NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Gres=gpu:{gpus}\n"


def write_configuration(folder: Path) -> Path:
    """Write the configuration of a cluster in `folder`, with free ports; returns the path of `slurm.conf`."""
    controller_port, *node_ports = _free_ports(1 + len(NODES))
    text = _CONFIGURATION.format(
        folder=folder,
        host=socket.gethostname(),
        user=pwd.getpwuid(getuid()).pw_name,
        controller_port=controller_port,
        credential_seconds=CREDENTIAL_SECONDS,
        kill_wait=KILL_WAIT,
        node_timeout=NODE_TIMEOUT,
        partition=PARTITION,
        nodes=",".join(NODES),
    )
    for name, port in zip(NODES, node_ports, strict=True):
        text += _NODE.format(name=name, port=port, cpus=CPUS_PER_NODE, gpus=GPUS_PER_NODE)
    (folder / "plugstack.conf").touch()
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={name}\n" for name in _GPU_FILES))
    configuration = folder / "slurm.conf"
    configuration.write_text(text)
    return configuration


def _free_ports(count: int) -> list[int]:
    """Free ports outside the range from which the kernel chooses those of clients."""
    lowest_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = random.SystemRandom().sample(range(lowest_of_clients // 2, lowest_of_clients), 50 * count)
    found: list[int] = []
    for port in candidates:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:  # taken
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"of {len(candidates)} ports below {lowest_of_clients} fewer than {count} are free")
