"""Network namespaces for the producers, joined by veth pairs, and packet filters between them.

Consumers live in a namespace called the hub, each producer in one of its own. A namespace exists as long as a
process that waits for the end of its standard input: whatever happens to the supervisor, nothing stays behind.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

_TOOLS = ("unshare", "nsenter", "ip", "iptables")
_SECONDS = 10.0


class Network:
    """One namespace per producer, and the hub.

    Args:
        producers: their names.
        filters: `cut` will be called, which needs iptables.

    Raises:
        OSError: this machine does not allow it; `unavailable` reports the reason beforehand.
    """

    def __init__(self, producers: tuple[str, ...], *, filters: bool = True) -> None:
        self._number = {name: number for number, name in enumerate(producers)}
        self._holders: dict[str, subprocess.Popen[str]] = {}
        try:
            self._hold("hub")
            self._run("hub", "ip", "link", "set", "lo", "up")
            for name, number in self._number.items():
                self._hold(name)
                pid = str(self._holders[name].pid)
                near, far = f"soak{number}", f"soak{number}p"
                self._run("hub", "ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", pid)
                for where, device, host in (("hub", near, 1), (name, far, 2)):
                    self._run(where, "ip", "address", "add", f"10.77.{number}.{host}/24", "dev", device)
                    self._run(where, "ip", "link", "set", device, "up")
                self._run(name, "ip", "link", "set", "lo", "up")
                for chain in ("OUTPUT", "INPUT") if filters else ():
                    self._run("hub", "iptables", "-w", "-N", f"{near}-{chain}")
                    self._run("hub", "iptables", "-w", "-A", chain, "-j", f"{near}-{chain}")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def unavailable(*, filters: bool = True) -> str:
        """Why this machine has no namespaces and packet filters for us; empty if it has."""
        missing = [tool for tool in _TOOLS[: 4 if filters else 3] if shutil.which(tool) is None]
        if missing:
            return f"{', '.join(missing)} not installed"
        trial = "mount -t sysfs soak /sys && ip link add soak0 type veth peer name soak0p"
        if filters:
            trial += " && iptables -w -A OUTPUT -p tcp -j REJECT --reject-with tcp-reset"
        tried = subprocess.run(
            ["unshare", "--net", "--mount", "sh", "-c", trial],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        return "" if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["refused"])[-1]

    def address(self, producer: str) -> str:
        """Where a producer listens."""
        return f"10.77.{self._number[producer]}.2"

    def within(self, name: str) -> list[str]:
        """What precedes a command so that it runs in a producer's namespace, or in the ``hub``."""
        return ["nsenter", f"--target={self._holders[name].pid}", "--net", "--mount", f"--wd={Path.cwd()}"]

    def cut(self, producer: str, *, reject: bool, port: int | None) -> None:
        """Drop what goes to and comes from a producer, all of it or that of one port; or answer with resets."""
        near, peer = f"soak{self._number[producer]}", self.address(producer)
        for chain, way, end in (("OUTPUT", "-d", "--dport"), ("INPUT", "-s", "--sport")):
            target = ["REJECT", "--reject-with", "tcp-reset"] if reject else ["DROP"]
            only = [end, str(port)] if port is not None else []
            self._run(
                "hub", "iptables", "-w", "-A", f"{near}-{chain}", "-p", "tcp", way, peer, *only, "-j", *target
            )

    def heal(self, producer: str) -> None:
        """Let everything through again."""
        for chain in ("OUTPUT", "INPUT"):
            self._run("hub", "iptables", "-w", "-F", f"soak{self._number[producer]}-{chain}")

    def close(self) -> None:
        """Let the namespaces go. Twice is fine."""
        for holder in self._holders.values():
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.close()
            holder.stdout.close()
            holder.wait(_SECONDS)
        self._holders.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hold(self, name: str) -> None:
        # A process group of its own: Ctrl-C must not end it before those who live there.
        self._holders[name] = holder = subprocess.Popen(
            # UCX looks for its devices in /sys, which shows the namespace that it was mounted in.
            ["unshare", "--net", "--mount", "sh", "-c", "mount -t sysfs soak /sys && echo ready && exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0,
        )  # fmt: skip
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            raise OSError(f"no network namespace for {name}")

    def _run(self, where: str, *command: str) -> None:
        done = subprocess.run(
            [*self.within(where), *command], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def network(producers: tuple[str, ...], *, namespaces: bool) -> Iterator[Network | None]:
    """The namespaces, if they are wanted."""
    if not namespaces:
        yield None
        return
    with Network(producers) as made:
        yield made
