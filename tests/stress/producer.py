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
from stress.books import MAX_BYTES, PRODUCED, STOP, Books, end_with_parent, payload_of

from dray import PayloadServer, SharedRingBuffer
from dray.errors import BufferClosedError, BufferFullError


def main() -> None:
    """Produce; the plan comes as JSON in the first argument, and the end of the books on standard input."""
    end_with_parent()
    plan = json.loads(sys.argv[1])
    if plan["cpus"]:
        os.sched_setaffinity(0, plan["cpus"])
    books = Books(Path(plan["folder"]), **plan["books"])
    build = barriers.Build(plan["build"])
    build.make(books.head)
    ring = SharedRingBuffer(
        plan["slots"], MAX_BYTES, on_full=plan["on_full"], retain=plan["retain"], readers=plan["readers"]
    )
    with ring, PayloadServer(ring, lane="shm", threads=1, max_leases=4) as server:
        print(json.dumps([server.ring.producer_id.hex(), server.endpoints]), flush=True)
        sys.stdin.readline()  # the consumers have attached
        if plan["barrier_failures"]:
            barriers.fail_at_random(plan["barrier_failures"], plan["seed"])
        ended = threading.Event()
        observer = threading.Thread(target=_observe, args=(server, books, ended), daemon=True)
        if not build.close:
            observer.start()
        full = _produce(server, books)
        print(json.dumps(full), flush=True)
        sys.stdin.readline()  # the consumers have ended
        ended.set()
        if observer.ident is not None:
            observer.join()
        print(json.dumps(_statistics(server)), flush=True)


def _produce(server: PayloadServer, books: Books) -> int:
    """Put payloads until the supervisor wants no more; returns how often the ring stayed full."""
    sequence = full = 0
    head = books.head
    while not head[STOP] and sequence < books.payloads:
        try:
            ref = server.put_bytes(payload_of(sequence), timeout=60.0)
        except BufferFullError:
            full += 1
            continue
        if ref.sequence != sequence:
            raise AssertionError(f"payload {sequence} became {ref.sequence}")
        books.announce(ref.slot, sequence)
        sequence += 1
    return full


def _observe(server: PayloadServer, books: Books, ended: threading.Event) -> None:
    """Ask for what only a look at the consumers' words answers, from another thread than the one that puts."""
    rng = random.Random(7)
    while not ended.wait(0.01):
        server.statistics()
        produced = books.head[PRODUCED]
        sequence = max(0, produced - rng.randint(1, 4))
        if produced:
            try:
                server.ring.wait_consumed(books.slots[sequence], sequence, timeout=0.02)
            except BufferClosedError:
                return


def _statistics(server: PayloadServer) -> dict[str, Any]:
    found = server.statistics()
    return {**dataclasses.asdict(found.ring), "listed_leases": len(found.leases)}


if __name__ == "__main__":
    main()
