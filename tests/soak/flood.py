"""``python -m soak.flood``: CartPole is learnt while strangers connect to every listening socket of the job.

The strangers have no secret. They connect to every address that the job's processes listen on: the controller,
the endpoints of payload servers on each lane, the ports that UCX opens, and Redis. One third of their connections
send nothing, one third begin a message, one third send a byte now and then. Closed connections are opened again.
"""

from __future__ import annotations

import contextlib
import json
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated
from urllib.request import Request, urlopen

import psutil
import typer
from rich.console import Console
from rich.table import Table
from waiting import wait_until

from dray.clock import Deadline
from dray.resources import raise_descriptor_limit

USUAL_LIMIT = 1024
"""Descriptors that a process may open on most systems, unless it raises its limit."""

JOB = Path(__file__).parents[2] / "examples" / "cartpole" / "job.toml"
MAX_LOG_BYTES = 64 << 10
MAX_GROWTH_MB = 48.0
_BEGINNING = b"POST /status HTTP/1.1\r\nHost: x\r\n"
_CLOSED = "unproven_connections_closed_total"
_TURN_SECONDS = 0.25
_START_SECONDS, _ANSWER_SECONDS, _END_SECONDS = 120.0, 10.0, 300.0
_REOPENED_PER_TURN = 128

Address = str | tuple[str, int]


def addresses_of(process: psutil.Process) -> set[Address]:
    """What a process listens on."""
    with contextlib.suppress(psutil.Error):
        ports = {each.laddr for each in process.net_connections("tcp4") if each.status == psutil.CONN_LISTEN}
        paths = {each.laddr for each in process.net_connections("unix") if str(each.laddr).endswith(".sock")}
        return {(("127.0.0.1" if host == "0.0.0.0" else host), port) for host, port in ports} | paths
    return set()


@dataclass
class Stranger:
    """One connection that is kept: what it does with its third."""

    address: Address
    kind: int
    sock: socket.socket | None = None


@dataclass
class Flood:
    """Connections to some addresses.

    Args:
        addresses: where to.
        count: how many connections are kept.
    """

    addresses: Iterable[Address]
    count: int
    done: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Flood:
        self._poll = select.epoll()
        targets = islice(cycle(sorted(self.addresses, key=str)), self.count)
        self._strangers = [Stranger(address, index % 3) for index, address in enumerate(targets)]
        self._connected: dict[int, Stranger] = {}
        self._due = list(self._strangers)
        self.turn(len(self._due))
        return self

    def __exit__(self, *_: object) -> None:
        for stranger in list(self._connected.values()):
            self._close(stranger)
        self._poll.close()

    @property
    def open(self) -> int:
        """Connections that have not been closed by the other end."""
        return len(self._connected)

    def turn(self, reopened: int = _REOPENED_PER_TURN) -> None:
        """Notice what was closed, open as many again, and send bytes."""
        while events := self._poll.poll(0, 4096):
            for descriptor, _ in events:
                self._read(self._connected[descriptor])
        if self.done["turns"]:
            self.done["most open"] = max(self.done["most open"], self.open)
        self.done["turns"] += 1
        for stranger in list(self._connected.values()):
            if stranger.kind == 2:
                self._send(stranger, b"x")
        due, self._due = self._due[:reopened], self._due[reopened:]
        for stranger in due:
            self._open(stranger)

    def _open(self, stranger: Stranger) -> None:
        unix = isinstance(stranger.address, str)
        stranger.sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        stranger.sock.setblocking(False)
        try:
            stranger.sock.connect(stranger.address)
        except BlockingIOError:
            pass  # under way, or the backlog of a Unix socket is full
        except OSError:
            self.done["refused"] += 1
        self._connected[stranger.sock.fileno()] = stranger
        self._poll.register(stranger.sock, select.EPOLLIN | select.EPOLLRDHUP)
        self.done["opened"] += 1
        if stranger.kind:
            self._send(stranger, _BEGINNING if stranger.kind == 1 else _BEGINNING[:1])

    def _read(self, stranger: Stranger) -> None:
        assert stranger.sock is not None
        try:
            ended = not stranger.sock.recv(4096)
        except BlockingIOError:
            ended = False
        except OSError:
            ended = True
        if ended:
            self.done["closed by the job"] += 1
            self._close(stranger)

    def _send(self, stranger: Stranger, data: bytes) -> None:
        assert stranger.sock is not None
        with contextlib.suppress(OSError):  # not connected yet, or closed: that is noticed in the next turn
            stranger.sock.send(data)

    def _close(self, stranger: Stranger) -> None:
        assert stranger.sock is not None
        del self._connected[stranger.sock.fileno()]
        stranger.sock.close()
        stranger.sock = None
        self._due.append(stranger)


@dataclass
class Footprint:
    """What one process of the job held: descriptors at most, megabytes before the flood and at most."""

    name: str
    descriptors: int
    before: float
    megabytes: float

    def sample(self, process: psutil.Process) -> None:
        """Measure the process again, if it still exists."""
        with contextlib.suppress(psutil.Error):
            self.descriptors = max(self.descriptors, process.num_fds())
            self.megabytes = max(self.megabytes, process.memory_info().rss / 2**20)


@dataclass
class Result:
    """One job under the flood.

    Attributes:
        seconds: of the flood.
        ending: the last lines of `dray run`.
        closed_by_controller: as its metrics count, while the job ran.
        connections: figures for each kind of address.
    """

    seconds: float
    exit_code: int
    solved: bool
    ending: str
    log_bytes: int
    closed_by_controller: float
    connections: dict[str, dict[str, int]]
    held: list[Footprint]

    def failures(self) -> list[str]:
        """What is not as it must be."""
        found = []
        if not self.solved:
            found.append(f"the job ended with code {self.exit_code}: {self.ending}")
        if self.log_bytes > MAX_LOG_BYTES:
            found.append(f"the logs grew by {self.log_bytes} bytes")
        for each in self.held:
            # Redis bounds its clients by itself, at what its own limit of descriptors allows.
            if each.descriptors >= USUAL_LIMIT and each.name != "redis":
                found.append(f"{each.name} had {each.descriptors} descriptors open")
            if each.name == "controller" and each.megabytes - each.before > MAX_GROWTH_MB:
                found.append(f"{each.name} grew from {each.before:.1f} to {each.megabytes:.1f} MB")
        return found


def flooded_job(command: list[str], output: Path, connections: int, seconds: float) -> Result:
    """Run a job that writes to `output`, flood it from its first step on, for `seconds` or until it ends.

    Args:
        connections: how many are kept to each kind of address.
    """
    with tempfile.TemporaryFile("w+") as printed:
        job = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        try:
            wait_until(
                lambda: job.poll() is not None or _first_step(output), "the first step", _START_SECONDS, pause=0.1
            )
            result = _flood(job, output, connections, seconds)
            result.exit_code = job.wait(_END_SECONDS)
        finally:
            job.kill()
            job.wait()
        printed.seek(0)
        result.ending = printed.read()[-1000:]
    summary = output / "summary.json"
    result.solved = result.exit_code == 0 and summary.exists() and json.loads(summary.read_text())["solved"]
    result.log_bytes += _log_bytes(output)
    return result


def _flood(job: subprocess.Popen[bytes], output: Path, connections: int, seconds: float) -> Result:
    processes = {_name(each): each for each in psutil.Process(job.pid).children(recursive=True)}
    held = {name: Footprint(name, 0, _megabytes(each), 0.0) for name, each in processes.items()}
    result = Result(0.0, -1, False, "", -_log_bytes(output), 0.0, {}, list(held.values()))
    deadline = Deadline.after(seconds)
    with ExitStack() as opened:
        floods = {
            name: opened.enter_context(Flood(addresses, connections))
            for name, addresses in _groups(processes).items()
        }
        while job.poll() is None and not deadline.expired:
            turn = Deadline.after(_TURN_SECONDS)
            for flood in floods.values():
                flood.turn()
            for name, process in processes.items():
                held[name].sample(process)
            with contextlib.suppress(OSError):  # the job has just ended
                result.closed_by_controller = _closed_by_controller(output)
            select.select([], [], [], turn.remaining)
        result.seconds = deadline.elapsed
        result.connections = {name: dict(flood.done) for name, flood in floods.items()}
    return result


def _groups(processes: Mapping[str, psutil.Process]) -> dict[str, set[Address]]:
    """What the processes of a job listen on, by kind."""
    groups: defaultdict[str, set[Address]] = defaultdict(set)
    for name, process in processes.items():
        kind = name if name in ("controller", "redis") else "payload servers"
        for address in addresses_of(process):
            groups[f"{kind}, {'unix' if isinstance(address, str) else 'tcp and ucx'}"].add(address)
    return dict(groups)


def _closed_by_controller(output: Path) -> float:
    """From the controller's metrics, over a connection of its own: one with the token gets in."""
    address = json.loads((output / ".run" / "controller.json").read_text())
    request = Request(f"{address['url']}/metrics", headers={"Authorization": f"Bearer {address['token']}"})
    with urlopen(request, timeout=_ANSWER_SECONDS) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"dray_{_CLOSED}"))


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        module = next((word for word in words if word.startswith("dray.jobs.")), "")
        if module:
            index = next((word for word in words if word.isdecimal()), "")
            room, _, name = module.removeprefix("dray.jobs.").partition(".")
            return room if room == "controller" else f"{name}-{index}"
        if any("redis" in word for word in words):
            return "redis"
    return f"pid {process.pid}"


def _megabytes(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        return float(process.memory_info().rss) / 2**20
    return 0.0


def _first_step(output: Path) -> bool:
    metrics = output / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def _log_bytes(output: Path) -> int:
    return sum(path.stat().st_size for path in output.glob("logs/*.log"))


def main(
    seconds: Annotated[float, typer.Option(min=1.0, help="How long strangers come; jobs run in a row.")] = 60.0,
    connections: Annotated[int, typer.Option(min=1, help="How many are kept to each kind of address.")] = (
        2 * USUAL_LIMIT
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
) -> None:
    """Flood CartPole jobs; exit code 1 if one is not solved, or logs, memory or descriptors are not bounded."""
    raise_descriptor_limit()
    console = Console(highlight=False)
    folder = Path(tempfile.mkdtemp(prefix="dray-flood-"))
    results: list[Result] = []
    while sum(each.seconds for each in results) < seconds and not any(each.failures() for each in results):
        output = folder / str(len(results))
        command = [sys.executable, "-m", "dray.cli.app", "run", str(JOB), "--output", str(output)]
        command += ["--set", f"job.seed={len(results) + 1}"]
        results.append(flooded_job(command, output, connections, seconds))
        _show(console, results[-1])
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([asdict(each) for each in results], indent=1), encoding="utf-8")
    failures = [line for each in results for line in each.failures()]
    console.print(*failures, sep="\n", end="\n" if failures else "")
    if failures:
        console.print(f"outputs of the jobs: {folder}")
        raise typer.Exit(1)
    shutil.rmtree(folder)


def _show(console: Console, result: Result) -> None:
    solved = "solved" if result.solved else "not solved"
    console.print(
        f"{solved} after {result.seconds:.1f} s of flood; logs grew by {result.log_bytes} bytes; "
        f"the controller closed {result.closed_by_controller:.0f} connections"
    )
    table = Table("connections to", "opened", "closed by the job", "open at most")
    for name, done in result.connections.items():
        table.add_row(name, *(str(done.get(key, 0)) for key in ("opened", "closed by the job", "most open")))
    console.print(table)
    table = Table("process", "descriptors at most", "MB before", "MB at most")
    for each in result.held:
        table.add_row(each.name, str(each.descriptors), f"{each.before:.1f}", f"{each.megabytes:.1f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
