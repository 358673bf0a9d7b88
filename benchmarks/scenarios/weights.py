"""Versions of weights: to subscribers on one host and by tcp, whole (P19) and as sparse deltas (P20)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from benchmarks.exchanges.lanes import LaneRead
from benchmarks.figures import Figure, Row, Target
from benchmarks.machine import available_bytes
from benchmarks.partner import Partner, PartnerError
from benchmarks.plan import GIB, MIB, Plan, size_name
from benchmarks.runtime_folder import own_runtime_folder
from benchmarks.scenario import Progress, Scenario, Skipped
from dray import Subscriber
from dray.payload import pack
from dray.streams import Weights, sparse

NAME = "weights"
SUBSCRIBERS = 8
CHANGED = 0.02

_SIZES = (4 * GIB, GIB, 256 * MIB)
_QUICK_BYTES = 16 * MIB
_COPIES = 12
"""Memory that is needed, in versions: arrays, a copy, versions of two publishers, and what subscribers read."""
_ENCODED_BYTES = 256 * MIB
_SECONDS = 120.0


@dataclass
class _Times:
    """Seconds, round by round."""

    publish: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    in_place: list[float] = field(default_factory=list)
    tcp: list[float] = field(default_factory=list)
    lane: list[float] = field(default_factory=list)
    sparse: list[float] = field(default_factory=list)
    sparse_bytes: list[float] = field(default_factory=list)


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Publish to all subscribers, then measure encoding alone."""
    nbytes = _nbytes(plan)
    if nbytes * _COPIES > available_bytes():
        yield Skipped(f"weights of {size_name(nbytes)}", f"{_COPIES} times as much memory must be available")
        return
    try:
        yield from _travelling(plan, progress, nbytes)
    except PartnerError as error:
        yield Skipped(f"weights of {size_name(nbytes)}", str(error))
    yield from _encoding(plan, progress)


def _travelling(plan: Plan, progress: Progress, nbytes: int) -> list[Row]:
    times, secret, scope = _Times(), secrets.token_bytes(16), f"benchmark-{secrets.token_hex(4)}"
    with ExitStack() as opened:
        opened.enter_context(own_runtime_folder())
        publisher = opened.enter_context(Partner("publishing"))
        addresses = publisher.ask("open", nbytes=nbytes, scope=scope, secret=secret.hex())
        near = [opened.enter_context(Subscriber("full", scope=scope, secret=secret)) for _ in range(SUBSCRIBERS)]
        far = opened.enter_context(Subscriber(addresses["full"], secret=secret))
        changes = opened.enter_context(Subscriber(addresses["sparse"], secret=secret))
        lane = LaneRead("tcp", checksum=True)
        opened.callback(lane.close)
        lane.open(nbytes, 1)
        for index in range(-2, plan.rounds):  # the first two versions get memory for both places
            progress.step(f"round {index + 1} of {plan.rounds}" if index >= 0 else "warm-up")
            published = publisher.ask("publish", delta="full", share=0.0)
            found = [_timed(each, published["version"])[0] for each in near]
            taken, _ = _timed(far, published["version"])
            copied = publisher.ask("copy")["seconds"]
            lane.prepare(1)
            began = time.perf_counter()
            lane.once()
            read = time.perf_counter() - began
            memory = publisher.ask("memory")["bytes"] if index == plan.rounds - 1 else 0
            if index >= 0:
                times.publish.append(published["seconds"])
                times.copy.append(copied)
                times.in_place.append(sum(found))
                times.tcp.append(taken)
                times.lane.append(read)
        for index in range(-2, plan.rounds):
            progress.step(f"deltas, round {index + 1} of {plan.rounds}" if index >= 0 else "deltas, warm-up")
            published = publisher.ask("publish", delta="sparse", share=CHANGED)
            taken, version = _timed(changes, published["version"])
            if index >= 0:
                times.sparse.append(taken)
                times.sparse_bytes.append(100 * version.received_bytes / nbytes)
    return _rows(nbytes, times, memory)


def _timed(subscriber: Subscriber, version: int) -> tuple[float, Weights]:
    began = time.perf_counter()
    found = subscriber.newest(after=version - 1, timeout=_SECONDS)
    return time.perf_counter() - began, found


def _rows(nbytes: int, times: _Times, memory: int) -> list[Row]:
    publish, copy, in_place, tcp, lane, changes, share = (
        Figure(tuple(each), None, len(each))
        for each in (
            times.publish, times.copy, times.in_place, times.tcp, times.lane, times.sparse, times.sparse_bytes,
        )
    )  # fmt: skip
    held, places = (Figure((float(each),), None, 1) for each in (memory, 2 * nbytes))
    bare, reads = "one copy of the arrays", "a read on the tcp lane"
    copies, rate = Target("P19", "at most", 1.1, "time ratio"), Target("P19", "at least", 0.9, "rate ratio")
    return [
        Row(NAME, bare, nbytes, copy),
        Row(NAME, "publish a version", nbytes, publish, "s", bare, copy, copies),
        Row(NAME, f"{SUBSCRIBERS} subscribers get it in place", nbytes, in_place, moves=False),
        Row(
            NAME, "memory of the versions", nbytes, held, "B", "two versions", places,
            Target("P19", "at most", 1.01, "time ratio"),
        ),
        Row(NAME, reads, nbytes, lane),
        Row(NAME, "a subscriber by tcp", nbytes, tcp, "s", reads, lane, rate),
        Row(NAME, f"by tcp, {CHANGED:.0%} changed, as a delta", nbytes, changes, "s", "a subscriber by tcp", tcp),
        Row(
            NAME, f"bytes of a delta, {CHANGED:.0%} changed", nbytes, share, "%",
            target=Target("P20", "at most", 12.0, "value"),
        ),
    ]  # fmt: skip


def _encoding(plan: Plan, progress: Progress) -> Iterator[Row]:
    """Encode and apply on one core: bytes of the whole version per second of processor time."""
    random = np.random.default_rng(1)
    nbytes = _QUICK_BYTES if plan.quick else _ENCODED_BYTES
    for dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)):
        progress.step(f"encoding {dtype.name}")
        bits = random.integers(0, 256, nbytes, np.uint8).view(f"u{dtype.itemsize}")
        old = np.frombuffer(pack({"w": bits.view(dtype)}), np.uint8)
        bits[random.integers(0, len(bits), int(len(bits) * CHANGED))] ^= 1
        new = np.frombuffer(pack({"w": bits.view(dtype)}), np.uint8)
        room, made = np.zeros(len(new) // 2, np.uint8), np.zeros_like(new)
        rates, copies = [], []
        for index in range(-1, plan.rounds):
            began = time.process_time()
            delta = room[: sparse.encode(old, new, room, base=1, slot=0, sequence=0)]
            header = sparse.Delta.parse(delta)
            assert header is not None
            sparse.apply(delta, header, old, made)
            seconds = time.process_time() - began
            began = time.process_time()
            np.copyto(made, new)
            copied = time.process_time() - began
            if index >= 0:
                rates.append(nbytes / seconds)
                copies.append(nbytes / copied)
        copy = Figure(tuple(copies), None, len(copies))
        rate = Figure(tuple(rates), None, len(rates))
        bare = f"one copy, {dtype.name}, by processor time"
        yield Row(NAME, bare, nbytes, copy, "B/s")
        yield Row(
            NAME, f"encode and apply, {dtype.name}, {CHANGED:.0%} changed", nbytes, rate, "B/s", bare, copy,
            Target("P20", "at least", 1e9, "value"),
        )  # fmt: skip


def _nbytes(plan: Plan) -> int:
    if plan.quick:
        return _QUICK_BYTES
    fitting = (nbytes for nbytes in _SIZES if nbytes * _COPIES <= available_bytes())
    return next(fitting, _SIZES[-1])


def _steps(plan: Plan) -> int:
    return 2 * (plan.rounds + 2) + 2


SCENARIO = Scenario(NAME, "Versions of weights", ("P19", "P20"), _steps, run)
