"""``python -m soak.weights``: versions of a model to many subscribers, some of which are killed and stopped.

Each version carries a hash of its own arrays, so that a subscriber finds every wrong bit and every mixture.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import ml_dtypes
import numpy as np
import typer
from soak.network import Network
from waiting import holds_within

from dray import Publisher, Subscriber
from dray.errors import BufferFullError

TESTS: Final = Path(__file__).parents[1]

SHARES: Final = (0.001, 0.02, 0.0, 0.1, 0.5, 0.01)
"""How many of the elements change from one version to the next, in turn."""

LIMIT_SECONDS: Final = 600.0
"""For everything that is waited for; versions of gigabytes take long on a machine with other work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run does.

    Attributes:
        versions: how many are published.
        parameters: elements of the model: two thirds are bfloat16, the rest float32 and float8.
        delta: as for `Publisher`.
        lane: of the subscribers on other hosts.
        near, far: subscribers on this host by name, and by address.
        steps: for each subscriber by address, how many versions are one step for it; the next ones have 1.
        late: another subscriber by address comes when half of the versions are published.
        faults: one subscriber of each kind is killed, and one is stopped for a while.
        paced: each version waits until the first subscriber by address has read the one before; without any, the
            first one by name.
        host: the address at which the publisher listens.
        prefixes: for each subscriber by address, what precedes its command: it runs in a network namespace.
    """

    versions: int = 200
    parameters: int = 1_000_000
    delta: str = "sparse"
    lane: str = "tcp"
    near: int = 1
    far: int = 3
    steps: tuple[int, ...] = (1, 7)
    late: bool = True
    faults: bool = False
    paced: bool = False
    host: str = "127.0.0.1"
    prefixes: tuple[tuple[str, ...], ...] = ()


@dataclass(slots=True)
class Result:
    """What has happened.

    Attributes:
        problems: all that is wrong, in words.
        seen: the lines of each subscriber that was not killed: version, delta, bytes, in_place.
        version_bytes: the size of a version.
        memory: the most memory that the kernel counted for the publisher's versions and deltas, in bytes.
        full: messages of the `BufferFullError` that the stopped subscribers caused.
        stopped: the processes that were stopped.
        sent: bytes that the kernel has sent to the network namespaces of the subscribers.
    """

    problems: list[str] = field(default_factory=list)
    seen: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    version_bytes: int = 0
    memory: int = 0
    full: list[str] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    sent: int = 0


class Model:
    """Arrays that change a little with each version."""

    def __init__(self, parameters: int) -> None:
        third = max(1, parameters // 6)
        self._random = np.random.default_rng(1)
        self.arrays: dict[str, np.ndarray[Any, Any]] = {
            "float32": self._random.standard_normal(third).astype(np.float32),
            "float8": self._random.standard_normal(third).astype(ml_dtypes.float8_e4m3fn),
        }
        for index in range(4):
            self.arrays[f"layer{index}"] = self._random.standard_normal(third).astype(ml_dtypes.bfloat16)

    def version(self, number: int) -> Mapping[str, Any]:
        """The next version; of each array the same share of the elements gets other bits."""
        share = SHARES[number % len(SHARES)]
        for array in self.arrays.values():
            elements = array.view(np.uint8).reshape(-1, array.dtype.itemsize)
            where = self._random.integers(0, len(elements), int(len(elements) * share))
            elements[where] = self._random.integers(0, 256, (len(where), array.dtype.itemsize), np.uint8)
        return {**self.arrays, "number": np.array(number), "hash": hash_of(self.arrays, number)}


def hash_of(arrays: Mapping[str, Any], number: int) -> np.ndarray[Any, Any]:
    """A hash over all bits of the arrays, other than the one that deltas have."""
    digest = hashlib.blake2b(str(number).encode(), digest_size=16)
    for name in sorted(arrays):
        if name not in ("number", "hash"):
            digest.update(arrays[name].view(np.uint8).data)
    return np.frombuffer(digest.digest(), np.uint8)


# --- subscribers ------------------------------------------------------------------------------------------------


def subscribe(source: str, secret: str, scope: str, *, step: int, last: int) -> None:
    """Check each version and print a line about it, until the last one has come."""
    number = 0
    with Subscriber(source, secret=bytes.fromhex(secret), scope=scope) as subscriber:
        while number < last:
            found = subscriber.newest(after=min(number + step, last) - 1, timeout=LIMIT_SECONDS)
            if found.version <= number or int(found["number"]) != found.version:
                raise AssertionError(f"version {found.version} with number {found['number']} after {number}")
            if hash_of(dict(found), found.version).tobytes() != found["hash"].tobytes():
                raise AssertionError(f"version {found.version} is wrong, delta {found.delta}")
            number = found.version
            line = {
                "version": number,
                "delta": found.delta,
                "bytes": found.received_bytes,
                "in_place": found.in_place,
            }
            del found
            print(json.dumps(line), flush=True)


class Member:
    """A process that subscribes.

    Attributes:
        lines: what it has printed, read by a thread.
        killed: it was killed.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], *, step: int, last: int, prefix: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.killed = False
        self.lines: list[dict[str, Any]] = []
        self._printed = threading.Condition()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        command = [*prefix, sys.executable, "-m", "soak.weights", "subscribe", *arguments, str(step), str(last)]
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._printed:
                if line.endswith("}\n"):
                    self.lines.append(json.loads(line))
                self._printed.notify_all()
        with self._printed:
            self._ended = True
            self._printed.notify_all()

    def wait_for(self, number: int) -> None:
        """Wait until it has that version, or a newer one, or has ended."""
        with self._printed:
            self._printed.wait_for(
                lambda: self._ended or (self.lines and self.lines[-1]["version"] >= number), LIMIT_SECONDS
            )

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.killed = self.killed or number == signal.SIGKILL
        self.process.send_signal(number)

    def problem(self) -> str:
        """Wait for its end; what is wrong, in words."""
        code = self.process.wait(LIMIT_SECONDS)
        self._thread.join(LIMIT_SECONDS)
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace").strip()
        return f"{self.name}: {errors[-2000:]}" if code and not self.killed else ""

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait(LIMIT_SECONDS)
        self._thread.join(LIMIT_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()


# --- the publisher ----------------------------------------------------------------------------------------------


def run(plan: Plan) -> Result:
    """Publish all versions, and wait until the subscribers have the last one."""
    secret, scope, result = secrets.token_bytes(16), f"soak-{secrets.token_hex(4)}", Result()
    model = Model(plan.parameters)
    with contextlib.ExitStack() as opened:
        publisher = opened.enter_context(
            Publisher(
                "weights", delta=plan.delta, listen=f"{plan.lane}://{plan.host}:0", secret=secret, scope=scope  # type: ignore[arg-type]
            )
        )  # fmt: skip

        def start(name: str, step: int = 1, prefix: Sequence[str] = ()) -> Member:
            source = publisher.addresses[0] if name.startswith("far") else "weights"
            member = Member(name, (source, secret.hex(), scope), step=step, last=plan.versions, prefix=prefix)
            opened.callback(member.close)
            return member

        steps = [*plan.steps, *[1] * plan.far][: plan.far]
        members = [start(f"near {index}") for index in range(plan.near)]
        prefixes = [*plan.prefixes, *[()] * plan.far]
        members += [start(f"far {index}", step, prefixes[index]) for index, step in enumerate(steps)]
        paced = members[plan.near if plan.far else 0]
        _wait_for_subscribers(publisher, members)
        stopped: list[Member] = []
        for number in range(1, plan.versions + 1):
            if plan.late and number == plan.versions // 2:
                members.append(start("far late", prefix=prefixes[0]))
            if plan.faults:
                _cause_faults(plan, number, members, stopped, result)
            _publish(publisher, model.version(number), stopped, result)
            result.memory = max(result.memory, memfd_bytes())
            if plan.paced:
                paced.wait_for(number)
        result.version_bytes = sum(array.nbytes for array in model.arrays.values())
        for member in members:
            problem = member.problem()
            result.problems += [problem] if problem else []
            if not member.killed:
                result.seen[member.name] = member.lines
        result.sent = sent_bytes()
    return result


def _publish(publisher: Publisher, version: Mapping[str, Any], stopped: list[Member], result: Result) -> None:
    try:
        publisher.publish(version, timeout=0.5 if stopped else LIMIT_SECONDS)
    except BufferFullError as error:
        result.full.append(str(error))
        for member in stopped:
            member.signal(signal.SIGCONT)
        stopped.clear()
        publisher.publish(version, timeout=LIMIT_SECONDS)


def _cause_faults(
    plan: Plan, number: int, members: Sequence[Member], stopped: list[Member], result: Result
) -> None:  # fmt: skip
    """Kill the first subscriber of each kind, stop the second, and let it continue."""
    kinds = [[member for member in members if member.name.startswith(kind)] for kind in ("near", "far")]
    if number == plan.versions // 4:
        for member in (kind[0] for kind in kinds if kind):
            member.signal(signal.SIGKILL)
    elif number == plan.versions // 2:
        stopped += [kind[1] for kind in kinds if len(kind) > 1]
        for member in stopped:
            result.stopped.append(member.process.pid)
            member.signal(signal.SIGSTOP)
    elif number == plan.versions * 3 // 4:
        for member in stopped:
            member.signal(signal.SIGCONT)
        stopped.clear()


def memfd_bytes() -> int:
    """The memory of all memfds of this process, as the kernel counts it."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(entry.readlink()).startswith("/memfd:"):
                total += entry.stat().st_blocks * 512
    return total


def sent_bytes() -> int:
    """What the kernel has sent to other network namespaces, with all headers."""
    devices = (line.split(":") for line in Path("/proc/self/net/dev").read_text().splitlines() if ":" in line)
    return sum(int(counters.split()[8]) for device, counters in devices if device.strip().startswith("soak"))


def _wait_for_subscribers(publisher: Publisher, members: Sequence[Member]) -> None:
    def all_have_come_or_one_has_ended() -> bool:
        ended = any(member.process.poll() is not None for member in members)
        return ended or publisher.subscribers == len(members)

    if not holds_within(LIMIT_SECONDS, all_have_come_or_one_has_ended) or publisher.subscribers != len(members):
        raise RuntimeError("a subscriber has ended, or has not come")


# --- the command ------------------------------------------------------------------------------------------------


def main(
    versions: Annotated[int, typer.Option(min=1, help="Versions that are published.")] = 1000,
    parameters: Annotated[int, typer.Option(min=6, help="Elements of the model.")] = 100_000_000,
    delta: Annotated[str, typer.Option(help="sparse or full.")] = "sparse",
    lane: Annotated[str, typer.Option(help="tcp or ucx.")] = "tcp",
    near: Annotated[int, typer.Option(min=0, help="Subscribers that use versions in place.")] = 2,
    far: Annotated[int, typer.Option(min=0, help="Subscribers by address.")] = 3,
    faults: Annotated[bool, typer.Option("--faults", help="Kill one of each kind, and stop another.")] = False,
    network: Annotated[bool, typer.Option("--network", help="Those by address in network namespaces.")] = False,
    host: Annotated[str, typer.Option(hidden=True)] = "127.0.0.1",
    prefixes: Annotated[str, typer.Option(hidden=True)] = "[]",
) -> None:
    """Publish versions; exit code 1 if one was wrong."""
    if network:
        sys.exit(_in_namespaces(far))
    began = time.monotonic()
    plan = Plan(
        versions=versions, parameters=parameters, delta=delta, lane=lane, near=near, far=far, faults=faults,
        paced=not faults, steps=() if faults else (1, 7), late=far > 0 and versions >= 8,
        host=host, prefixes=tuple(map(tuple, json.loads(prefixes))),
    )  # fmt: skip
    result = run(plan)
    for name, lines in result.seen.items():
        deltas = [line["bytes"] for line in lines if line["delta"]]
        share = sum(deltas) / max(1, len(deltas)) / result.version_bytes
        print(f"{name}: {len(lines)} versions, {len(deltas)} as deltas of {share:.1%} of the bytes")
    if result.sent:
        received = sum(line["bytes"] for lines in result.seen.values() for line in lines)
        print(f"sent by the kernel: {result.sent:,} bytes; of versions and deltas: {received:,}")
    print(f"memory: {result.memory / result.version_bytes:.2f} versions; {time.monotonic() - began:.0f} s")
    for problem in (*result.problems, *(f"waited: {text}" for text in result.full)):
        print(problem)
    sys.exit(1 if result.problems else 0)


def _in_namespaces(far: int) -> int:
    """Run this command again in a network namespace, joined to one for each subscriber by address."""
    names = tuple(f"host{index}" for index in range(far))
    with Network(names, filters=False) as hosts:
        for index, name in enumerate(names[1:], 1):
            route = ["ip", "route", "add", "10.77.0.0/24", "via", f"10.77.{index}.1"]
            subprocess.run([*hosts.within(name), *route], check=True)
        again = [argument for argument in sys.argv[1:] if argument != "--network"]
        placed = ["--host", "10.77.0.1", "--prefixes", json.dumps([hosts.within(name) for name in names])]
        command = [*hosts.within("hub"), sys.executable, "-m", "soak.weights", *again, *placed]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    if sys.argv[1:2] == ["subscribe"]:
        subscribe(*sys.argv[2:5], step=int(sys.argv[5]), last=int(sys.argv[6]))
    else:
        typer.run(main)
