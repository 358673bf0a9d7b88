"""``python -m stress.producer``: puts payloads into a small ring as fast as it can, until it is stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

from stress import barriers
from stress.ledger import MAX_BYTES, PRODUCED, STOP, Ledger, end_with_parent, payload_of

from dray import PayloadServer, SharedRingBuffer
from dray.errors import BufferClosedError, BufferFullError


def main() -> None:
    """Produce; the plan is the first argument, and each line of standard input begins the next phase."""
    end_with_parent()
    plan = json.loads(sys.argv[1])
    if plan["cpus"]:
        os.sched_setaffinity(0, plan["cpus"])
    ledger = Ledger(Path(plan["folder"]), **plan["ledger"])
    build = barriers.Build(plan["build"])
    build.make(ledger.head)
    ring = SharedRingBuffer(
        plan["slots"], MAX_BYTES, on_full=plan["on_full"], retain=plan["retain"], readers=plan["readers"]
    )
    with ring, PayloadServer(ring, lane="shm", threads=1, max_leases=4) as server:
        print(json.dumps([server.ring.producer_id.hex(), server.endpoints]), flush=True)
        sys.stdin.readline()  # the consumers have attached
        if plan["barrier_failures"]:
            barriers.fail_at_random(plan["barrier_failures"], plan["seed"])
        ended = threading.Event()
        observer = threading.Thread(target=_observe, args=(server, ledger, ended), daemon=True)
        if not build.close:
            observer.start()
        full = _produce(server, ledger)
        print(json.dumps(full), flush=True)
        sys.stdin.readline()  # the consumers have ended
        ended.set()
        if observer.ident is not None:
            observer.join()
        print(json.dumps(_statistics(server)), flush=True)


def _produce(server: PayloadServer, ledger: Ledger) -> int:
    """Put payloads until the supervisor wants no more; returns how often the ring stayed full."""
    sequence = full = 0
    head = ledger.head
    while not head[STOP] and sequence < ledger.payloads:
        try:
            ref = server.put_bytes(payload_of(sequence), timeout=60.0)
        except BufferFullError:
            full += 1
            continue
        if ref.sequence != sequence:
            raise AssertionError(f"payload {sequence} became {ref.sequence}")
        ledger.announce(ref.slot, sequence)
        sequence += 1
    return full


def _observe(server: PayloadServer, ledger: Ledger, ended: threading.Event) -> None:
    """Ask for what can only be read from the consumers' words, from another thread than the one that puts."""
    rng = random.Random(7)
    while not ended.wait(0.01):
        server.statistics()
        produced = ledger.head[PRODUCED]
        sequence = max(0, produced - rng.randint(1, 4))
        if produced:
            try:
                server.ring.wait_consumed(ledger.slots[sequence], sequence, timeout=0.02)
            except BufferClosedError:
                return


def _statistics(server: PayloadServer) -> dict[str, Any]:
    found = server.statistics()
    return {**dataclasses.asdict(found.ring), "listed_leases": len(found.leases)}


if __name__ == "__main__":
    main()
