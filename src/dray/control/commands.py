"""Commands to one replica, on a stream of its own."""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dray.clock import Deadline
from dray.control import names, scripts
from dray.control.client import RedisClient, paired
from dray.control.connection import RedisConnection, block_ms
from dray.control.names import JobKeys
from dray.errors import ConfigError, ProtocolError

logger = logging.getLogger("dray.control")


@dataclass(frozen=True, slots=True)
class Command:
    """What a replica is told to do, e.g. ``Command("drain", {"reason": "solved"})``."""

    name: str
    fields: dict[str, str]

    @classmethod
    def from_fields(cls, fields: Mapping[bytes, bytes]) -> Command:
        """The command in an entry of the stream.

        Raises:
            ProtocolError: a field is missing or malformed.
        """
        try:
            values = json.loads(fields[names.COMMAND_FIELDS])
            if not isinstance(values, dict):
                raise ProtocolError("the fields of a command are not a JSON object")
            return cls(fields[names.COMMAND_NAME].decode(errors="replace"), {k: str(v) for k, v in values.items()})
        except KeyError as error:
            raise ProtocolError(f"a command has no field {error}") from error
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the fields of a command are not valid JSON: {error}") from error


class CommandStream:
    """The command stream of one replica: any process sends, the replica itself receives, each command once.

    The replica calls `clear` before it registers: then it sees every command that was sent since, and none that
    was meant for an earlier process of its name.

    Args:
        connection: shared with others; its shutdown event ends every wait here.
        keys: the job's names.
        replica: name of the replica.
    """

    def __init__(self, connection: RedisConnection, keys: JobKeys, replica: str) -> None:
        self.replica = replica
        self._connection = connection
        self._key = keys.commands(replica)
        self._lock = threading.Lock()
        self._after = b"0-0"
        # A send whose answer was lost is made again: its token tells the second entry.
        self._tokens: deque[bytes] = deque(maxlen=names.COMMANDS_KEPT)

    def clear(self, timeout: float | None = 30.0) -> None:
        """Drop every command that was sent so far.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        self._connection.call(
            f"clear the commands to {self.replica}",
            lambda client: client.do("UNLINK", self._key),
            Deadline.after(timeout, self._connection.clock),
        )

    def send(self, name: str, fields: Mapping[str, str] | None = None, timeout: float | None = 30.0) -> None:
        """Tell the replica to do `name`.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        if not name:
            raise ConfigError("command", name, "a name")
        text = json.dumps(dict(fields or {}), sort_keys=True)
        entry: list[str | bytes | int] = [
            names.COMMAND_NAME,
            name,
            names.COMMAND_FIELDS,
            text,
            names.COMMAND_TOKEN,
            secrets.token_hex(8),
        ]
        self._connection.call(
            f"send {name} to {self.replica}",
            lambda client: scripts.SEND_COMMAND.run(client, [self._key], entry),
            Deadline.after(timeout, self._connection.clock),
        )

    def receive(self, timeout: float | None = 0.0) -> list[Command]:
        """The commands that have come since the last call, as soon as there is one.

        Args:
            timeout: seconds to wait for the first one; None: until shutdown.

        Returns:
            The commands, oldest first; none when the time is over, at once when shutdown has begun, and during an
            outage that is shorter than the connection's patience.

        Raises:
            ControlPlaneError: Redis is gone for good, or refuses.
        """
        deadline = Deadline.after(timeout, self._connection.clock)
        while True:
            reply = self._connection.poll(
                f"receive commands to {self.replica}",
                lambda client: self._read(client, deadline),
                deadline,
                None,
                reads_only=True,
            )
            commands = [] if not reply else self._accept(reply[0][1])
            if commands or deadline.expired or self._connection.shutdown.is_set():
                return commands

    def _read(self, client: RedisClient, deadline: Deadline) -> Any:
        block: list[str | int] = [] if deadline.expired else ["BLOCK", block_ms(deadline)]
        return client.do("XREAD", *block, "STREAMS", self._key, self._after)

    def _accept(self, entries: list[tuple[bytes, list[bytes]]]) -> list[Command]:
        commands = []
        with self._lock:
            for entry_id, flat in entries:
                self._after = entry_id
                fields = paired(flat)
                token = fields.get(names.COMMAND_TOKEN, b"")
                try:
                    command = Command.from_fields(fields)
                except ProtocolError as error:
                    logger.warning("entry %s of %s is not a command: %s", entry_id.decode(), self._key, error)
                    continue
                if token not in self._tokens:
                    self._tokens.append(token)
                    commands.append(command)
        return commands

    def __repr__(self) -> str:
        return f"<CommandStream {self.replica} at {self._connection.address}>"
