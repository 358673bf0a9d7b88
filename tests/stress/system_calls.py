"""``python -m stress.system_calls``: strace counts the system calls of a consumer that reads payloads in place.

It runs the consumer twice, once without payloads and once with all of them; the difference belongs to the reads.
The producer is never full, and never waits for the consumer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from stress.ledger import MAX_BYTES, PRODUCED, Count, Ledger, end_with_parent, nbytes_of, payload_of

from dray import PayloadClient, PayloadRef, PayloadServer
from dray.errors import StaleSlotError

SLOTS = 256
TIMEOUT_SECONDS = 600.0
_ROW = re.compile(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(?:\d+ +)?(\w+)$")

app = typer.Typer(add_completion=False)


@app.callback(invoke_without_command=True)
def count(
    context: typer.Context,
    payloads: Annotated[int, typer.Option(min=1, help="Read in place, one after the other.")] = 100_000,
) -> None:
    """Print the number of system calls of both runs, and of the difference by name."""
    if context.invoked_subcommand is not None:
        return
    if shutil.which("strace") is None:
        print("strace is not installed", file=sys.stderr)
        sys.exit(2)
    without, having = calls(0), calls(payloads)
    more = having - without
    print(f"a consumer of no payload: {without.total():,} system calls, from its start to its end")
    print(f"a consumer of {payloads:,} payloads in place: {having.total():,}")
    print(f"difference: {having.total() - without.total():,}: {dict(more.most_common(8))}")


def calls(payloads: int) -> Counter[str]:
    """The system calls of a consumer, in all its threads, by name."""
    with tempfile.TemporaryDirectory(prefix="dray-calls-") as folder:
        table = Path(folder) / "table"
        started = [sys.executable, "-m", "stress.system_calls"]
        with subprocess.Popen(
            [*started, "produce", folder, str(payloads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as producer:
            try:
                assert producer.stdout is not None
                server = producer.stdout.readline()
                consumer = [
                    "strace",
                    "-c",
                    "-f",
                    "-o",
                    str(table),
                    *started,
                    "consume",
                    folder,
                    str(payloads),
                    server,
                ]
                subprocess.run(consumer, check=True, timeout=TIMEOUT_SECONDS)
            finally:
                producer.kill()
        rows = map(_ROW.match, table.read_text().splitlines())
        return Counter({row[2]: int(row[1]) for row in rows if row is not None and row[2] != "total"})


@app.command(hidden=True)
def produce(folder: Path, payloads: int) -> None:
    """Put payloads while at least half of the slots are free."""
    end_with_parent()
    ledger = ledger_in(folder, payloads)
    with PayloadServer.create(slots=SLOTS, slot_bytes=MAX_BYTES, lane="shm", threads=1) as server:
        print(json.dumps([server.ring.producer_id.hex(), server.endpoints]), flush=True)
        for sequence in range(payloads):
            while sequence - ledger.counts[0][Count.CURSOR] > SLOTS // 2:
                os.sched_yield()
            ref = server.put_bytes(payload_of(sequence), timeout=20)
            ledger.announce(ref.slot, sequence)
        sys.stdin.read()


@app.command(hidden=True)
def consume(folder: Path, payloads: int, server: str) -> None:
    """Read payloads in place, and compare their bytes."""
    ledger = ledger_in(folder, payloads)
    producer, endpoints = json.loads(server)

    def ref(slot: int, sequence: int) -> PayloadRef:
        return PayloadRef(bytes.fromhex(producer), slot, sequence, nbytes_of(sequence), tuple(endpoints))

    with PayloadClient(lane="shm") as client:
        with contextlib.suppress(StaleSlotError):
            client.read_bytes(ref(0, (1 << 62) - 1))  # it brings the attachment
        for sequence in range(payloads):
            while ledger.head[PRODUCED] <= sequence:
                pass  # without a system call
            with client.lease_bytes(ref(ledger.slots[sequence], sequence)) as leased:
                if leased.data.tobytes() != payload_of(sequence):
                    raise AssertionError(f"payload {sequence} is another one")
            ledger.counts[0][Count.CURSOR] = sequence + 1
        if client.statistics().direct_reads != payloads:
            raise AssertionError("not all payloads were leased directly")


def ledger_in(folder: Path, payloads: int) -> Ledger:
    return Ledger(folder, payloads=max(1, payloads), slots=SLOTS, consumers=1, readers=1)


if __name__ == "__main__":
    app()
