"""The performance targets, one line each."""

from __future__ import annotations

from typing import NamedTuple


class Named(NamedTuple):
    """A target's name, what it is about, and what is asked for."""

    name: str
    what: str
    asked: str


TARGETS = (
    Named("P1", "shm in place, six fields, 1 KiB to 1 GiB", "p50 ≤ 10 µs at every size, ≤ 5 µs as bytes"),
    Named("P2", "shm with copy, from 1 MiB", "time ≤ 1.05 × one copy of memory that another process wrote"),
    Named("P3", "tcp, from 1 MiB", "rate ≥ 0.95 × bare sendall and recv_into, ≥ 0.85 × with checksum"),
    Named("P4", "tcp, 1 KiB", "p50 ≤ 3 × a bare TCP round trip"),
    Named("P5", "ucx, from 1 MiB", "rate ≥ 0.9 × low-level exchange; read_many ≥ 0.85 × ucx_perftest"),
    Named("P6", "ucx, 1 KiB", "p50 ≤ 1.5 × the low-level exchange"),
    Named("P7", "read_many of 1 KiB on shm", "≥ 300,000 payloads/s as bytes, ≥ 150,000 unpacked"),
    Named("P8", "64 idle connections", "≤ 1 % of a core at each end"),
    Named("P9", "pack six fields into a slot", "≤ 15 µs at 1 KiB, ≤ 1.1 × the bare copy from 1 MiB"),
    Named("P9A", "pack and unpack 32 nested arrays", "≤ 1.5 × the same arrays on one level"),
    Named("P10", "one life cycle of a slot, 10 to 100,000 slots", "≤ 1.3 × the smallest ring"),
    Named("P11", "16 producers, one consumer, 1 MiB", "rate ≥ 0.9 × that of one producer"),
    Named("P12", "shm, producer busy in Python", "p99 ≤ 1.2 × that of an idle producer; its loop ≥ 98 % as fast"),
    Named("P13", "memory over a million reads", "no growth (≤ 256 KiB)"),
    Named("P14", "the CartPole job: time inside reads", "≤ 2 % of the wall time"),
    Named(
        "P15",
        "streams, in place, beside what people use instead",
        "p50 ≤ 0.8 × the best of them, throughput ≥ 1.2 × from 16 KiB, ≥ 2 × from 1 MiB",
    ),
    Named(
        "P16",
        "300 producers of a stream, one consumer, 64 KiB",
        "rate ≥ 0.9 × that of one producer; memory and descriptors of each ≤ 1.1 × those beside 100",
    ),
    Named("P17", "one of 32 fields of 256 MiB", "shm: p50 ≤ 10 µs; tcp: time ≤ 1.1 × a payload of that size"),
    Named(
        "P19",
        "weights of 4 GiB to 8 subscribers on one host, and by tcp",
        "publish ≤ 1.1 × one copy, memory of two versions; rate ≥ 0.9 × the tcp lane's",
    ),
    Named("P20", "sparse weights, 2 % of the elements changed", "≤ 12 % of the bytes; encode and apply ≥ 1 GB/s"),
)
NAMES = tuple(target.name for target in TARGETS)
