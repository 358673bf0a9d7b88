"""`dray agent`: one for each user, found by its folder, ended by a signal."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dray import PayloadClient, PayloadRef
from dray.ring.direct import direct_problem

pytestmark = pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")

OWNER = """
from dray import PayloadServer, SharedRingBuffer
from dray.agent import find_agent, register
ring = SharedRingBuffer(slots=4, slot_bytes=1 << 16)
registration = register(ring, find_agent(), name="sampler")
server = PayloadServer(ring, lane="shm", threads=1, heirs=registration.endpoints)
print(server.put_bytes(b"bytes").to_json(), flush=True)
input()
"""


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "DRAY_RUNTIME_DIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_agent_keeps_what_a_killed_producer_leaves_until_it_is_ended(
    number: signal.Signals, tmp_path: Path
) -> None:
    command = ["-m", "dray.cli.app", "agent"]
    with running([*command, "--memory", "1000000", "--keep", "60"], tmp_path) as agent:
        assert line_of(agent) == f"agent at {tmp_path / 'agent' / 'agent.sock'}; Ctrl-C ends it"
        with running(["-c", OWNER], tmp_path) as producer:
            ref = PayloadRef.from_json(line_of(producer))
        with PayloadClient(lane="shm") as client:
            assert client.read_bytes(ref, timeout=20, consume=False).tobytes() == b"bytes"
        with running(command, tmp_path) as second:
            output, errors = second.communicate(timeout=30)
            assert (second.returncode, output) == (2, "")
            assert f"process {agent.pid} runs" in errors
        agent.send_signal(number)
        assert agent.wait(30) == 0
        assert line_of(agent) == "kept 1 payloads of 1 dead producers, and dropped 0 of them"
    assert [each.name for each in (tmp_path / "agent").iterdir()] == ["agent.lock"]
