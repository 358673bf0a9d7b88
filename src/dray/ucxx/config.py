"""The configuration of `dray.ucxx`. It is parsed once; an unknown key of it is an error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from dray.errors import ConfigError
from dray.payload import PayloadSchema, TensorSpec
from dray.payload.trajectory import EPISODE_LENGTH
from dray.protocol.handshake import check_secret
from dray.ring import OnFull
from dray.transport.lanes import SHM, UCX, LaneChoice, chosen_lanes

MAX_SECONDS = 86_400.0


class _Table:
    """A configuration that can be parsed from a table of a configuration file.

    Attributes:
        prefix: how the keys of this configuration begin, if the table may be a framework's, with keys of its own.
    """

    prefix: ClassVar[str] = ""

    @classmethod
    def parse(cls, table: Mapping[str, Any]) -> Self:
        """Return the configuration with the values of a table, and defaults for absent keys.

        Unknown keys that do not begin with `prefix` belong to another program and are ignored.

        Raises:
            ConfigError: a key that begins with `prefix` is unknown, or a value is not allowed.
        """
        known = [each.name for each in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key, value in table.items():
            if key not in known and str(key).startswith(cls.prefix):
                keys = f"the keys are {', '.join(known)}"
                raise ConfigError(str(key), value, keys, "is no key of this configuration")
        return cls(**{key: table[key] for key in known if key in table})


@dataclass(frozen=True, kw_only=True)
class UCXXConfig(_Table):
    """How completions travel and are read.

    Args:
        payload_transfer: ``"ucxx"`` sends references and serves payloads; ``"redis"`` starts nothing and leaves
            the transfer to the framework.
        ucxx_prefetch_timeout: seconds for a whole batch with all its retries.
        ucxx_read_max_attempts: reads of one reference in one round.
        ucxx_read_timeout: seconds for one read of a payload, or of a group of a batch's payloads.
        ucxx_trim: cut the per-step fields of a trajectory that is read to its ``episode_length``.
        ucxx_per_step: names of per-step fields that are cut, beside `dray.payload.trajectory.STEP_FIELDS`.
        ucxx_device: None returns NumPy arrays; a device such as ``"cpu"`` or ``"cuda:0"``, torch tensors there.

    Raises:
        ConfigError: a value is not allowed.
    """

    prefix: ClassVar[str] = "ucxx_"

    payload_transfer: Literal["ucxx", "redis"] = "ucxx"
    ucxx_prefetch_timeout: float = 60.0
    ucxx_read_max_attempts: int = 2
    ucxx_read_timeout: float = 30.0
    ucxx_trim: bool = False
    ucxx_per_step: Collection[str] = ()
    ucxx_device: str | None = None

    def __post_init__(self) -> None:
        _one_of("payload_transfer", self.payload_transfer, ("ucxx", "redis"))
        _seconds("ucxx_prefetch_timeout", self.ucxx_prefetch_timeout)
        _count("ucxx_read_max_attempts", self.ucxx_read_max_attempts, 1, 100)
        _seconds("ucxx_read_timeout", self.ucxx_read_timeout)
        if type(self.ucxx_trim) is not bool:
            raise ConfigError("ucxx_trim", self.ucxx_trim, "true or false")
        _names("ucxx_per_step", self.ucxx_per_step)
        if self.ucxx_device is not None and not isinstance(self.ucxx_device, str):
            raise ConfigError("ucxx_device", self.ucxx_device, 'None, or a device as text, such as "cuda:0"')

    @property
    def enabled(self) -> bool:
        """Payloads travel by reference."""
        return self.payload_transfer == "ucxx"


@dataclass(frozen=True, kw_only=True)
class UCXXBufferConfig(_Table):
    """The buffer of a rollout worker and its server.

    Args:
        slots: payloads that the buffer can hold.
        slot_bytes: size of the largest payload in bytes.
        on_full: what a write to a full buffer does; see `SharedRingBuffer`.
        readers: reader ids that each consume every payload.
        lane: lanes that serve payloads, a name or several: ``shm`` on the same host, ``ucx`` and ``tcp`` from
            any host. None means ``shm`` and, with a secret, ``ucx``.
        host: address to listen on and to advertise.
        port: first port to try; 0 lets the system choose.
        n_server_threads: server threads, 1 to 16, each with an endpoint on each lane. A reference of at most 512
            bytes carries them all, so fewer than 16 fit with several lanes: more is an error at start.
        idle_timeout: seconds after which the server closes an idle connection.
        write_timeout: seconds that a write waits for a free slot.
        on_error: what `UCXXRolloutMixin.write_to_buffer` does with a trajectory that cannot be written:
            ``"raise"``, or ``"none"``: log why, and return None.
        schema: fields of a trajectory; ``episode_length`` is added if it is not among them.
        per_step: names of fields with one row for each step, beside `dray.payload.trajectory.STEP_FIELDS`.
        secret: the job's secret, at least 16 random bytes, which consumers must have; required to listen on
            addresses other than loopback.

    Raises:
        ConfigError: a value is not allowed.
    """

    slots: int = 64
    slot_bytes: int = 1 << 20
    on_full: OnFull = "block"
    readers: int = 1
    lane: LaneChoice | None = None
    host: str = "127.0.0.1"
    port: int = 0
    n_server_threads: int = 2
    idle_timeout: float = 120.0
    write_timeout: float = 60.0
    on_error: Literal["raise", "none"] = "raise"
    schema: PayloadSchema | None = None
    per_step: Collection[str] = ()
    secret: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _count("slots", self.slots, 1, 2**32 - 1)
        _count("slot_bytes", self.slot_bytes, 1, 2**63 - 1)
        _one_of("on_full", self.on_full, ("block", "error", "overwrite"))
        _count("readers", self.readers, 1, 64)
        if self.lane is not None:
            chosen_lanes("lane", self.lane)
        _count("port", self.port, 0, 65_535)
        _count("n_server_threads", self.n_server_threads, 1, 16)
        _seconds("idle_timeout", self.idle_timeout)
        _seconds("write_timeout", self.write_timeout)
        if self.schema is not None and not isinstance(self.schema, PayloadSchema):
            raise ConfigError("schema", self.schema, "a PayloadSchema")
        _one_of("on_error", self.on_error, ("raise", "none"))
        _names("per_step", self.per_step)
        check_secret(self.secret)

    @property
    def served_lanes(self) -> LaneChoice:
        """The lanes that are served."""
        if self.lane is not None:
            return self.lane
        return SHM.name if self.secret is None else (SHM.name, UCX.name)

    @property
    def trajectory_schema(self) -> PayloadSchema | None:
        """The schema with ``episode_length``, which every trajectory has."""
        if self.schema is None or EPISODE_LENGTH in self.schema:
            return self.schema
        return PayloadSchema({**self.schema, EPISODE_LENGTH: TensorSpec("I64", ())})


def _count(key: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(key, value, f"a whole number from {least} to {most}")


def _seconds(key: str, value: object) -> None:
    number = type(value) in (int, float)
    if not number or math.isnan(value) or not 0 < value <= MAX_SECONDS:  # type: ignore[arg-type, operator]
        raise ConfigError(key, value, f"a number of seconds, above 0 and at most {MAX_SECONDS:g}")


def _names(key: str, value: object) -> None:
    if isinstance(value, str) or not isinstance(value, Collection):
        raise ConfigError(key, value, "a list of field names")


def _one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(key, value, " or ".join(f'"{each}"' for each in allowed))
