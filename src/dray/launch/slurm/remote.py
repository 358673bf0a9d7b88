"""The other nodes of a job as the head sees them: who has connected, what runs there, and what became of it."""

from __future__ import annotations

import logging
import selectors
import signal
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from dray.clock import MONOTONIC, Deadline
from dray.launch.children import EndRequest, JobProcess
from dray.launch.slurm.door import Door
from dray.launch.slurm.greeting import Purpose
from dray.launch.slurm.link import Alive, Ended, Goodbye, Kill, Link, SendSignal, Started
from dray.launch.slurm.network import boot_id
from dray.launch.slurm.placement import Placement
from dray.runtime.exit_codes import meaning
from dray.runtime.job import JobFolder, JobSpec, write_json
from dray.runtime.membership import Role

GOODBYE_BOUND = 5.0
"""Seconds that the head waits for the other nodes when the job is over."""

_LOG = logging.getLogger("dray.launch.remote")


class RemoteReplica:
    """A replica on another node; see `dray.launch.children.JobProcess`."""

    def __init__(self, placed: Placement, pid: int, log: Path, link: Link) -> None:
        self.name = placed.name
        self.role = placed.role
        self.pid = pid
        self.log = log
        self.exit_code: int | None = None
        self._node = placed.node
        self._link = link
        self._code: int | None = None
        self._with_node = False
        self._request: EndRequest | None = None
        self._seen = MONOTONIC.now()

    @property
    def running(self) -> bool:
        return self.exit_code is None

    @property
    def ending(self) -> str:
        if self._with_node:
            return f"its node {self._node} is gone"
        if self._request is not None:
            return f"{self._request.why} and sent it {self._request.number.name}"
        return "it runs" if self.exit_code is None else meaning(self.exit_code)

    def seconds_unseen(self) -> float:
        """Seconds since its node last said that the process runs."""
        return MONOTONIC.now() - self._seen

    def seen(self) -> None:
        """Its node says that the process runs."""
        self._seen = MONOTONIC.now()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process; one that has ended gets none."""
        if self._code is None:
            self._link.send(SendSignal(name=self.name, number=number))

    def kill_group(self) -> None:
        """Kill the process and every other one in its group."""
        if self._code is None:
            self._link.send(Kill(name=self.name))

    def collect(self) -> int | None:
        """The exit code, once its node has told it or is gone."""
        self.exit_code = self._code
        return self.exit_code

    def ended(self, said: Ended) -> None:
        """Its node says how it ended."""
        if self._code is None:
            self._code = said.code
            if said.asked:
                request = EndRequest(signal.Signals(said.asked), f"its node {self._node} was told to end")
                self._request = request if request.explains(said.code) else None

    def lost(self) -> None:
        """Its node is gone, and the process with it, or about to be."""
        if self._code is None:
            self._code, self._with_node = -signal.SIGKILL, True

    def __repr__(self) -> str:
        return f"<RemoteReplica {self.name} on {self._node} {'running' if self.running else self.exit_code}>"


class OtherNodes:
    """The nodes beside the head's; see `dray.launch.site.Elsewhere`. As a context manager it closes.

    Args:
        attempt: the name of the attempt, which connections must show.
        placed: the replicas on other nodes.
        host: the head's address.
        silence: seconds without an answer after which another machine counts as gone.
    """

    def __init__(
        self,
        folder: JobFolder,
        attempt: str,
        secret: bytes,
        placed: Iterable[Placement],
        host: str,
        silence: float,
    ) -> None:
        self._folder = folder
        self._attempt = attempt
        self._placed = {each.name: each for each in placed}
        self._ranks: dict[int, socket.socket | None] = {
            each.index: None for each in self._placed.values() if each.role is Role.POLICY
        }
        self._replicas: dict[str, RemoteReplica] = {}
        self._links: dict[str, Link] = {}
        self._known: set[str] = set()
        self._selector: selectors.BaseSelector | None = None
        self._door = Door(host, secret, silence, self._refusal, self._welcome)

    @property
    def expected(self) -> int:
        """How many replicas run there."""
        return len(self._placed)

    @property
    def processes(self) -> Sequence[JobProcess]:
        """Those that have been started there."""
        return list(self._replicas.values())

    def open(self, selector: selectors.BaseSelector, spec: JobSpec) -> None:
        """Listen, and tell the other nodes where, in a file of the job's folder."""
        self._selector = selector
        host, port = self._door.open(selector)
        address = {
            "host": host,
            "port": port,
            "attempt": self._attempt,
            "job_id": spec.job_id,
            "boot_id": boot_id(),
        }
        write_json(self._folder.head_address, address, mode=0o600)

    def look(self) -> None:
        """Drop connections that take too long to show what they are; note nodes that take no orders any more."""
        for node in [node for node, link in self._links.items() if link.lost]:
            self._lose(node)
        self._door.look()

    def take_ranks(self) -> list[socket.socket] | None:
        """See `dray.launch.site.Elsewhere`."""
        connected = [self._ranks[rank] for rank in sorted(self._ranks)]
        taken = [each for each in connected if each is not None]
        if len(taken) < len(connected):
            return None
        self._ranks = {}
        return taken

    def refuse(self) -> None:
        """See `dray.launch.site.Elsewhere`."""
        self._door.close()

    def close(self) -> None:
        """Say goodbye, and wait until the other nodes have ended what was left there."""
        self.refuse()
        deadline = Deadline.after(GOODBYE_BOUND)
        with selectors.DefaultSelector() as selector:
            for link in self._links.values():
                link.send(Goodbye())
                link.finish_sending()
                if not link.lost:
                    selector.register(link, selectors.EVENT_READ, link)
            while selector.get_map() and not deadline.expired:
                for key, _ in selector.select(deadline.remaining):
                    link = key.data
                    link.receive()
                    if link.lost:
                        selector.unregister(link)
        left = [node for node, link in self._links.items() if not link.lost]
        if left:
            _LOG.warning("did not say goodbye within %g s: %s", GOODBYE_BOUND, ", ".join(left))
        for link in self._links.values():
            link.close()
        self._links = {}
        for connected in self._ranks.values():
            if connected is not None:
                connected.close()
        self._ranks = {}

    def __enter__(self) -> OtherNodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- connections ------------------------------------------------------------------------------------------

    def _welcome(self, purpose: Purpose, connected: socket.socket) -> None:
        assert self._selector is not None
        if purpose.rank is not None:
            self._ranks[purpose.rank] = connected
            _LOG.info("node %s has connected policy-%d", purpose.node, purpose.rank)
            return
        self._known.add(purpose.node)
        link = self._links[purpose.node] = Link(connected)
        self._selector.register(link, selectors.EVENT_READ, lambda: self._hear(purpose.node, link))
        _LOG.info("node %s has connected", purpose.node)

    def _refusal(self, purpose: Purpose) -> str:
        """Why a connection for `purpose` is not wanted, or nothing."""
        if purpose.attempt != self._attempt:
            return f"it is from attempt {purpose.attempt}, and this one is {self._attempt}"
        if purpose.rank is not None:
            placed = self._placed.get(f"{Role.POLICY.value}-{purpose.rank}")
            wanted = placed is not None and placed.node == purpose.node and purpose.rank in self._ranks
            return "" if wanted and self._ranks[purpose.rank] is None else f"no rank {purpose.rank} is missing"
        if purpose.node not in {each.node for each in self._placed.values()}:
            return f"no replica runs on node {purpose.node}"
        return f"node {purpose.node} has been here before" if purpose.node in self._known else ""

    def _hear(self, node: str, link: Link) -> None:
        for said in link.receive():
            if isinstance(said, Started):
                for name, pid in said.pids.items():
                    if name in self._placed and self._placed[name].node == node:
                        log = self._folder.logs / f"{name}.log"
                        self._replicas[name] = RemoteReplica(self._placed[name], pid, log, link)
            elif isinstance(said, Alive):
                for name in said.names:
                    if name in self._replicas and self._placed[name].node == node:
                        self._replicas[name].seen()
            elif isinstance(said, Ended) and said.name in self._replicas:
                self._replicas[said.name].ended(said)
        if link.lost:
            self._lose(node)

    def _lose(self, node: str) -> None:
        """A node is gone."""
        assert self._selector is not None
        link = self._links.pop(node)
        self._selector.unregister(link)
        link.close()
        _LOG.info("node %s is gone", node)
        for name, replica in self._replicas.items():
            if self._placed[name].node == node:
                replica.lost()
