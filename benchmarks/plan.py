"""How much is measured: targets, sizes, rounds and operations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LaneName = Literal["shm", "tcp", "ucx"]

LANES: tuple[LaneName, ...] = ("shm", "tcp", "ucx")
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

ALL_SIZES = (*(KIB << exponent for exponent in range(0, 17, 2)), 256 * MIB, GIB)
QUICK_SIZES = (KIB, 16 * KIB, 64 * KIB, MIB, 16 * MIB)
MAX_COPIED = 64 * MIB
"""Beyond it only reads in place are measured: everything else moves at the speed of memory or of the kernel."""

_UNITS = {"": 1, "b": 1, "kib": KIB, "k": KIB, "mib": MIB, "m": MIB, "gib": GIB, "g": GIB}
_MIN_SIZE = KIB
_MAX_SIZE = GIB
_FEWEST = 4
_BATCH_BYTES = 64 * MIB
_MAX_IN_BATCH = 256


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run measures.

    Attributes:
        targets: names of the targets whose rows are wanted, such as ``"P1"``; none: everything, with the rows that
            have no target.
        sizes: payload sizes in bytes.
        rounds: how often each measurement is repeated, all of them in turn.
        block_bytes: about how many bytes one measurement moves in a round.
        most_operations: at most that many operations in a round.
        idle_seconds: how long idle connections are watched.
        memory_reads: reads whose memory is watched.
        job_steps: training steps of the CartPole job; None: until it is solved.
        quick: leave out what takes long to start.
    """

    targets: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ALL_SIZES
    rounds: int = 7
    block_bytes: int = 128 * MIB
    most_operations: int = 1000
    idle_seconds: float = 10.0
    memory_reads: int = 1_000_000
    job_steps: int | None = None
    quick: bool = False

    def wants(self, *targets: str) -> bool:
        """Whether rows of one of the targets are asked for."""
        return not self.targets or any(target in self.targets for target in targets)

    def operations(self, nbytes: int) -> int:
        """Operations of one measurement in one round."""
        return min(max(self.block_bytes // nbytes, _FEWEST), self.most_operations)

    def batch(self, nbytes: int) -> int:
        """Payloads that are written together before they are read; it bounds the memory."""
        return min(max(_BATCH_BYTES // nbytes, 2), _MAX_IN_BATCH, self.operations(nbytes))


QUICK = Plan(
    sizes=QUICK_SIZES,
    rounds=3,
    block_bytes=32 * MIB,
    most_operations=200,
    idle_seconds=2.0,
    memory_reads=20_000,
    job_steps=15,
    quick=True,
)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Sizes such as ``"1KiB,64KiB,1MiB"``, ascending.

    Raises:
        ValueError: one of them is not a size from 1 KiB to 1 GiB.
    """
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*([a-z]*)\s*", part.lower())
        nbytes = int(found[1]) * _UNITS.get(found[2], 0) if found else 0
        if not _MIN_SIZE <= nbytes <= _MAX_SIZE:
            raise ValueError(f"{part.strip()!r} is not a size from 1KiB to 1GiB")
        sizes.append(nbytes)
    return tuple(sorted(set(sizes)))


def parse_targets(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Names such as ``"P1,P4"``, in the order of `known`.

    Raises:
        ValueError: one of them is not known.
    """
    wanted = [part.strip().upper() for part in text.split(",")]
    for name in wanted:
        if name not in known:
            raise ValueError(f"{name!r} is not one of {', '.join(known)}")
    return tuple(name for name in known if name in wanted)


def size_name(nbytes: int) -> str:
    """``1 KiB``, ``64 MiB``."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"
