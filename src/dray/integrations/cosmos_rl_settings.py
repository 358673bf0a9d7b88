"""`CosmosSettings`: what `dray.integrations.cosmos_rl` reads from a job's configuration and the environment."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dray.errors import ConfigError
from dray.protocol.handshake import check_secret
from dray.ring import OnFull
from dray.transport.lanes import SHM, UCX, LaneChoice, chosen_lanes

KEY_PREFIX: Final = "dray_"

ENVIRONMENT: Final = {"secret_file": "DRAY_SECRET_FILE", "host": "DRAY_HOST", "interface": "DRAY_INTERFACE"}
"""Settings that may differ between nodes: these variables replace the values of the configuration."""

_SIOCGIFADDR: Final = 0x8915


@dataclass(frozen=True, kw_only=True)
class CosmosSettings:
    """Settings of the transport. In ``[custom]``, their names begin with ``dray_``.

    Args:
        slots: trajectories that a rollout worker can hold.
        slot_bytes: bytes of the largest one.
        on_full: what a rollout worker does when it holds that many: ``"block"``, ``"error"`` or ``"overwrite"``.
        write_timeout: seconds that it waits for a free slot.
        trim: cut per-step fields to ``episode_length``.
        lane: lanes that serve and read, a name or several; by default ``shm``, and with a secret also ``ucx``.
        host: address at which a rollout worker listens, and that other hosts reach.
        interface: the network interface whose IPv4 address is used instead of `host`.
        port: the first port to try; 0 lets the system choose.
        threads: server threads of a rollout worker.
        secret_file: file with at least 16 bytes, which only its owner may read; needed for several nodes.
        timeout: seconds for the payloads of a batch.
        read_timeout: seconds for one read.
        output: what a policy worker gets: ``"cpu"``, ``"worker"`` or another device for torch tensors there,
            ``"numpy"`` for arrays.
        readers: ranks that each get every trajectory: set from the parallelism of the policy.
        reader: the number of this process among them, likewise.

    Raises:
        ConfigError: a value is not allowed.
        MissingDependencyError: the ucx lane is named, and ucxx is not installed.
    """

    slots: int = 256
    slot_bytes: int = 16 << 20
    on_full: OnFull = "block"
    write_timeout: float = 60.0
    trim: bool = True
    lane: LaneChoice | None = None
    host: str = "127.0.0.1"
    interface: str | None = None
    port: int = 0
    threads: int = 2
    secret_file: str | None = None
    timeout: float = 60.0
    read_timeout: float = 30.0
    output: str = "cpu"
    readers: int = 1
    reader: int = 0
    secret: bytes | None = field(default=None, init=False, repr=False)
    address: str = field(default="", init=False)

    def __post_init__(self) -> None:
        for key in ("write_timeout", "timeout", "read_timeout"):
            value = getattr(self, key)
            if type(value) not in (int, float) or not 0 < value <= 86_400:
                raise ConfigError(KEY_PREFIX + key, value, "a number of seconds, above 0 and at most 86400")
        if type(self.trim) is not bool:
            raise ConfigError(KEY_PREFIX + "trim", self.trim, "true or false")
        object.__setattr__(self, "secret", None if self.secret_file is None else read_secret(self.secret_file))
        chosen_lanes(KEY_PREFIX + "lane", self.lanes)
        address = self.host if self.interface is None else address_of(self.interface)
        object.__setattr__(self, "address", address)

    @classmethod
    def of(cls, config: Any) -> CosmosSettings:
        """The settings of a job: of ``[custom]``, the environment, and the policy's parallelism.

        Raises:
            ConfigError: a key that begins with ``dray_`` is unknown, or a value is not allowed.
        """
        custom = getattr(config, "custom", None) or {}
        known = {each.name for each in dataclasses.fields(cls) if each.init} - {"readers", "reader"}
        table: dict[str, Any] = {}
        for key, value in custom.items():
            if not str(key).startswith(KEY_PREFIX):
                continue
            name = str(key).removeprefix(KEY_PREFIX)
            if name not in known:
                keys = f"the keys are {', '.join(KEY_PREFIX + each for each in sorted(known))}"
                raise ConfigError(str(key), value, keys, "is no key of this configuration")
            table[name] = value
        for name, variable in ENVIRONMENT.items():
            if os.environ.get(variable):
                table[name] = os.environ[variable]
        readers, reader = receivers(config)
        return cls(**table, readers=readers, reader=reader)

    @property
    def lanes(self) -> LaneChoice:
        """The lanes that serve and read."""
        if self.lane is not None:
            return self.lane
        return SHM.name if self.secret is None else (SHM.name, UCX.name)

    def device(self, worker: Any) -> str | None:
        """The device for tensors; None for NumPy arrays. `worker` is the device of the worker."""
        if self.output == "worker":
            return "cpu" if worker is None else str(worker)
        return None if self.output == "numpy" else self.output


def receivers(config: Any) -> tuple[int, int]:
    """How many ranks of a policy replica get the same trajectory, and which of them this process is.

    cosmos-rl hands a reference to all ranks with the same place in the data-parallel dimensions. They differ in
    pipeline, context and tensor parallelism; ranks are numbered with pipeline first and tensor last.

    Raises:
        ConfigError: the processes of the replica cannot be divided so.
    """
    sizes = getattr(getattr(config, "policy", None), "parallelism", None)
    pp, cp, tp = (int(getattr(sizes, f"{name}_size", 1) or 1) for name in ("pp", "cp", "tp"))
    readers = pp * cp * tp
    if readers == 1 or os.environ.get("COSMOS_ROLE") != "Policy":
        return readers, 0
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world % readers:
        raise ConfigError("WORLD_SIZE", world, f"a multiple of {readers}, which is pp_size * cp_size * tp_size")
    return readers, rank // (world // pp) * cp * tp + rank % (cp * tp)


def read_secret(path: str) -> bytes:
    """The secret in a file, without white space around it.

    Raises:
        ConfigError: the file cannot be read, others may read it, or the secret is too short.
    """
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o077
            secret = file.read(4096).strip()
    except OSError as error:
        raise ConfigError("secret_file", path, f"a file that can be read ({error.strerror})") from error
    if mode:
        raise ConfigError("secret_file", path, "a file that only its owner may read (chmod 600)")
    check_secret(secret)
    return secret


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface.

    Raises:
        ConfigError: there is no such interface, or it has no IPv4 address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", os.fsencode(interface)[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError("interface", interface, f"an interface with an IPv4 address ({names})") from error
    return socket.inet_ntoa(answer[20:24])
