"""Configuration of the transport, parsed once and strictly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from dray.errors import ConfigError
from dray.payload import PayloadSchema, TensorSpec
from dray.payload.trajectory import EPISODE_LENGTH
from dray.protocol.handshake import check_secret
from dray.ring import OnFull
from dray.transport.lanes import SHM, UCX, LaneChoice, chosen_lanes

MOST_SECONDS = 86_400.0


class _Table:
    """A configuration that can be made from a table of a configuration file."""

    @classmethod
    def parse(cls, table: Mapping[str, Any]) -> Self:
        """Make it from a mapping whose keys are the names of its fields; what is absent has its default.

        Raises:
            ConfigError: a key is unknown or a value not allowed; it names key, value and what is allowed.
        """
        known = [each.name for each in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key, value in table.items():
            if key not in known:
                raise ConfigError(
                    str(key), value, f"the keys are {', '.join(known)}", "is no key of this configuration"
                )
        return cls(**table)


@dataclass(frozen=True, kw_only=True)
class UCXXConfig(_Table):
    """How completions travel and are read.

    Args:
        payload_transfer: ``"ucxx"`` sends references and serves payloads; ``"redis"`` leaves all of it to the
            framework: nothing is started.
        ucxx_prefetch_timeout: seconds for a whole batch, all its retries included.
        ucxx_read_max_attempts: reads of one reference in one round.
        ucxx_read_timeout: seconds for one read: of a payload, or of a group of a batch's payloads.

    Raises:
        ConfigError: a value is not allowed.
    """

    payload_transfer: Literal["ucxx", "redis"] = "ucxx"
    ucxx_prefetch_timeout: float = 60.0
    ucxx_read_max_attempts: int = 2
    ucxx_read_timeout: float = 30.0

    def __post_init__(self) -> None:
        _one_of("payload_transfer", self.payload_transfer, ("ucxx", "redis"))
        _seconds("ucxx_prefetch_timeout", self.ucxx_prefetch_timeout)
        _count("ucxx_read_max_attempts", self.ucxx_read_max_attempts, 1, 100)
        _seconds("ucxx_read_timeout", self.ucxx_read_timeout)

    @property
    def enabled(self) -> bool:
        """Payloads travel by reference."""
        return self.payload_transfer == "ucxx"


@dataclass(frozen=True, kw_only=True)
class UCXXBufferConfig(_Table):
    """A rollout worker's buffer and its server.

    Args:
        slots: payloads it can hold.
        slot_bytes: size of the largest payload.
        on_full: what writing to a full buffer does, see `SharedRingBuffer`.
        readers: how many readers each payload is meant for.
        lane: how payloads are served, a name or several: ``shm`` on the same host, ``ucx`` and ``tcp`` from
            anywhere. None means ``shm`` and, with a secret, ``ucx``.
        host: address to listen on and to advertise.
        port: first port to try; 0 takes any.
        n_server_threads: server threads, each with endpoints of its own.
        idle_timeout: seconds after which the server closes an idle connection.
        write_timeout: seconds that a write waits for a free slot.
        schema: what trajectories must look like; ``episode_length`` need not be in it.
        per_step: fields with one row per step, beside those that dray knows.
        secret: the job's secret, at least 16 random bytes, which readers must know; needed to listen on more than
            loopback.

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
        if isinstance(self.per_step, str):
            raise ConfigError("per_step", self.per_step, "a list of field names")
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
    if not number or math.isnan(value) or not 0 < value <= MOST_SECONDS:  # type: ignore[arg-type, operator]
        raise ConfigError(key, value, f"a number of seconds, above 0 and at most {MOST_SECONDS:g}")


def _one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(key, value, " or ".join(f'"{each}"' for each in allowed))
