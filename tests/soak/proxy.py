"""A proxy for TCP that stalls, resets and truncates connections on command.

``python -m soak.proxy PATH`` listens on the Unix socket PATH for lines: ``route NAME HOST PORT`` opens a port that
leads there, answers with its number, and closes it when that connection ends, as it does when its producer ends;
``fault NAME KIND SECONDS`` stalls, resets or truncates all connections of a route.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import struct
import sys
from collections import defaultdict

from soak.member import MARK_VARIABLE

STALL, RESET, TRUNCATE = "stall", "reset", "truncate"
_CHUNK = 1 << 16
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger("soak.proxy")


def ask_for_route(connection: socket.socket, name: str, endpoint: str) -> str:
    """The endpoint that leads to `endpoint` for as long as `connection` is open."""
    _, host, port = endpoint.rsplit(":", 2)
    connection.settimeout(10.0)
    connection.sendall(f"route {name} {host} {port}\n".encode())
    return f"tcp:127.0.0.1:{int(connection.recv(64))}"


def inflict(control: str, name: str, kind: str, seconds: float) -> None:
    """Let the proxy do something to the connections of a route."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10.0)
        connection.connect(control)
        connection.sendall(f"fault {name} {kind} {seconds}\n".encode())
        connection.recv(64)


class Route:
    """The connections that lead to one producer, and what is being done to them."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.truncates = False
        self.writers: set[asyncio.StreamWriter] = set()

    async def inflict(self, kind: str, seconds: float) -> None:
        if kind == RESET:
            for writer in self.writers:
                _reset(writer)
        elif kind == STALL:
            self.open.clear()
            await asyncio.sleep(seconds)
            self.open.set()
        else:
            self.truncates = True
            await asyncio.sleep(seconds)
            self.truncates = False

    async def lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
        """Carry bytes both ways until one side ends."""
        with contextlib.ExitStack() as opened:
            opened.callback(writer.close)
            try:
                there, thence = await asyncio.open_connection(host, port, limit=_CHUNK)
            except OSError:
                _reset(writer)
                return
            opened.callback(thence.close)
            ends = {writer, thence}
            self.writers |= ends
            opened.callback(self.writers.difference_update, ends)
            ways = {
                asyncio.ensure_future(self._carry(reader, thence, False)),
                asyncio.ensure_future(self._carry(there, writer, True)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                await self.open.wait()
                if self.truncates and back and len(chunk) > 1024:
                    writer.write(chunk[: len(chunk) // 2])
                    await writer.drain()
                    return
                writer.write(chunk)
                await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    writer.transport.abort()


class Proxy:
    """All routes, by the name of the producer."""

    def __init__(self) -> None:
        self._routes: defaultdict[str, Route] = defaultdict(Route)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One control connection."""
        with contextlib.closing(writer):
            kind, name, *rest = (await reader.readline()).decode().split()
            if kind == "fault":
                writer.write(b"ok\n")
                await writer.drain()
                await self._routes[name].inflict(rest[0], float(rest[1]))
                return
            route = self._routes[name] = Route()
            host, port = rest[0], int(rest[1])
            running: set[asyncio.Task[None]] = set()

            def begin(near: asyncio.StreamReader, far: asyncio.StreamWriter) -> None:
                task = asyncio.ensure_future(route.lead(near, far, host, port))
                running.add(task)
                task.add_done_callback(running.discard)

            server = await asyncio.start_server(begin, "127.0.0.1", 0, limit=_CHUNK)
            try:
                writer.write(f"{server.sockets[0].getsockname()[1]}\n".encode())
                with contextlib.suppress(OSError):
                    await reader.read()
            finally:
                server.close()
                for task in list(running):
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)


async def _serve(path: str) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    proxy = Proxy()
    server = await asyncio.start_unix_server(proxy.answer, path)
    print("ready", flush=True)
    await ended.wait()
    server.close()


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.environ[MARK_VARIABLE] != str(os.getppid()):
        sys.exit("the supervisor is gone")
    asyncio.run(_serve(sys.argv[1]))


if __name__ == "__main__":
    main()
