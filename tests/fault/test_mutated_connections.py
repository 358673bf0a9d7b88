"""W4, by the hundred thousand: malformed conversations affect no other connection.

A server runs in a process of its own. Several others play mutated conversations to it, many at once; beside them a
good client reads all the time and compares every byte. Afterwards the server still serves, every malformed
conversation is counted, no lease is left, and the server holds what it held before.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mutated_conversations import ROW
from transport_fixtures import Child, Footprint, pattern, reference
from waiting import wait_until

from dray import PayloadClient, PayloadRef
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE

TESTS = Path(__file__).parents[1]
SIZES = (0, 5, 300, 4000, 70_000, 1)
GOOD_SIZES = (0, 1, 1000, 65_537)
WORKERS = 2
LIMIT_SECONDS = 1500.0

SERVER = """
import logging, threading
logging.disable(logging.WARNING)
sys.path.insert(0, arguments["tests"])
from mutated_conversations import Table
sizes, good = arguments["sizes"], arguments["good"]
ring = SharedRingBuffer(len(sizes) + len(good), 1 << 17)
server = PayloadServer(ring, lane=[arguments["lane"]], threads=1, drain_timeout=0.5)
table = Table(arguments["table"], len(sizes))
send([json.loads(server.put_bytes(pattern(seed, size)).to_json()) for seed, size in enumerate(good)])
def renew(row, size):
    "The ring is full but for the slot of the payload that was consumed: its successor gets the same one."
    try:
        while True:
            ref = server.put_bytes(bytes([size % 251]) * size)
            table.put(row, ref.slot, ref.sequence, size)
            server.wait_consumed(ref)
    except BufferClosedError:
        pass
threads = [threading.Thread(target=renew, args=each, daemon=True) for each in enumerate(sizes)]
for thread in threads:
    thread.start()
while (wanted := receive()) is not None:
    send(server.statistics().to_dict())
server.close()
ring.close()
"""


class Reader:
    """A good client that reads and compares until it is stopped."""

    def __init__(self, refs: list[PayloadRef], lane: Any) -> None:
        self.reads = 0
        self._refs = refs
        self._lane = lane
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        contents = [pattern(seed, ref.nbytes) for seed, ref in enumerate(self._refs)]
        try:
            with PayloadClient(lane=self._lane) as client:
                while not self._stop.wait(0.001):
                    for ref, content in zip(self._refs, contents, strict=True):
                        assert bytes(client.read_bytes(ref, timeout=20, consume=False)) == content
                        self.reads += 1
                assert client.statistics().retries == 0
                assert client.statistics().connects == 1
        except BaseException as failure:
            self._failure = failure


class Mutants:
    """Processes that play mutated conversations to a server."""

    def __init__(self, count: int, task: dict[str, Any], seed: int) -> None:
        share = -(-count // WORKERS)
        script = str(TESTS / "mutated_conversations.py")
        self._processes = [
            subprocess.Popen(
                [sys.executable, script, json.dumps({**task, "conversations": share, "seed": seed + index})],
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
            )
            for index in range(WORKERS)
        ]

    def __enter__(self) -> "Mutants":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def counts(self, seconds: float) -> Counter[str]:
        """The counts of all of them."""
        total: Counter[str] = Counter()
        for process in self._processes:
            out, _ = process.communicate(timeout=seconds)
            assert process.returncode == 0
            total.update(json.loads(out))
        return total


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "payloads"
    path.write_bytes(bytes(ROW.size * len(SIZES)))
    return str(path)


def play(lane: str, conversations: int, warm_up: int, table: str, seed: int) -> None:
    """Play them, and check all that must hold."""
    arguments = {"lane": lane, "table": table, "tests": str(TESTS), "sizes": SIZES, "good": GOOD_SIZES}
    with Child(SERVER, **arguments) as server:
        refs = [reference(found) for found in server.receive()]
        task = {
            "lane": lane,
            "address": refs[0].endpoints[0],
            "producer": refs[0].producer.hex(),
            "table": table,
            "rows": len(SIZES),
            "protected": {ref.slot: ref.sequence for ref in refs},
        }
        wait_until(
            lambda: server.ask("statistics")["ring"]["ready"] == len(SIZES) + len(GOOD_SIZES), "the payloads"
        )
        with Reader(refs, lane) as reader:
            with Mutants(warm_up, task, seed) as mutants:
                before = mutants.counts(LIMIT_SECONDS)
            began, held = time.monotonic(), _footprint(server)
            with Mutants(conversations, task, seed + 1000) as mutants:
                counts = mutants.counts(LIMIT_SECONDS)
            seconds = time.monotonic() - began
            after = _footprint(server)
            reads = reader.reads
            wait_until(
                lambda: reader.reads > reads + len(refs) or reader.check(), "more reads of the good client", 30
            )
        reader.check()
        wait_until(lambda: server.ask("statistics")["open_connections"] == 0, "the connections to end", 30)
        found = server.ask("statistics")
        counts.update(before)
        _check_counted(counts, found)
        ring = found["ring"]
        assert (ring["leases"], ring["reading"], found["leases"]) == (0, 0, [])
        print(
            f"{lane}: {conversations} mutated conversations, {conversations / seconds:.0f}/s; {dict(counts)}; the "
            f"good client read {reader.reads} payloads; server before {held}, after {after}; {found['server']}"
        )
        assert after.threads == held.threads
        assert after.descriptors <= held.descriptors
        assert after.megabytes <= held.megabytes + 8
        assert after.mappings <= held.mappings + 8


def _footprint(server: Child) -> Footprint:
    """What the server holds while only the good client has a connection."""
    wait_until(lambda: server.ask("statistics")["open_connections"] <= 1, "the connections to end", 30)
    return Footprint.of(server.pid)


def _check_counted(counts: Counter[str], found: dict[str, Any]) -> None:
    """Those that were certainly malformed are in the counters, and no others than could be."""
    server = found["server"]
    uncertain = counts["either"] + counts["left"]
    assert counts["malformed"] <= server["malformed"] <= counts["malformed"] + uncertain
    assert counts["denied"] <= server["auth_failures"] <= counts["denied"] + uncertain
    assert server["connections"] <= counts["connections"] + 1
    assert server["malformed"] > 0
    assert server["reads"] > 0


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_w4_thousands_of_mutated_conversations_affect_no_other(lane: str, table: str) -> None:
    play(lane, 6_000, 1_500, table, seed=1)


@pytest.mark.endurance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_w4_half_a_million_mutated_conversations_on_each_lane_affect_no_other(lane: str, table: str) -> None:
    play(lane, 500_000, 20_000, table, seed=int(time.time()))


@pytest.mark.skipif(not UCXX_AVAILABLE, reason="ucxx is not installed")
def test_w4_hundreds_of_mutated_conversations_on_ucx_affect_no_other(table: str) -> None:
    play("ucx", 400, 200, table, seed=1)


@pytest.mark.endurance
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not UCXX_AVAILABLE, reason="ucxx is not installed")
def test_w4_ten_thousand_mutated_conversations_on_ucx_affect_no_other(table: str) -> None:
    play("ucx", 10_000, 1_000, table, seed=int(time.time()))
