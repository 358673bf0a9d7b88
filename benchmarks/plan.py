"""How much is measured: sizes, lanes, rounds and operations."""

from __future__ import annotations

import re
from dataclasses import dataclass

LANES = ("shm", "tcp", "ucx")
KIB, MIB = 1 << 10, 1 << 20

ALL_SIZES = tuple(KIB << exponent for exponent in range(0, 17, 2))
QUICK_SIZES = (KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB)

_UNITS = {"": 1, "b": 1, "kib": KIB, "k": KIB, "mib": MIB, "m": MIB}
_LEAST_SIZE = KIB
_MOST_SIZE = 256 * MIB
_FEWEST = 4
_BATCH_BYTES = 64 * MIB
_MOST_IN_BATCH = 256


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run measures.

    Attributes:
        sizes: payload sizes in bytes.
        lanes: which of dray's lanes.
        rounds: how often each measurement is repeated, all of them in turn.
        block_bytes: about how many bytes one measurement moves in a round.
        most_operations: at most that many operations in a round.
        idle_seconds: how long idle connections are watched.
    """

    sizes: tuple[int, ...] = ALL_SIZES
    lanes: tuple[str, ...] = LANES
    rounds: int = 7
    block_bytes: int = 128 * MIB
    most_operations: int = 1000
    idle_seconds: float = 10.0

    def operations(self, nbytes: int) -> int:
        """Operations of one measurement in one round."""
        return min(max(self.block_bytes // nbytes, _FEWEST), self.most_operations)

    def batch(self, nbytes: int) -> int:
        """Payloads that are written together before they are read; it bounds the memory."""
        return min(max(_BATCH_BYTES // nbytes, 2), _MOST_IN_BATCH, self.operations(nbytes))


QUICK = Plan(sizes=QUICK_SIZES, rounds=3, block_bytes=48 * MIB, most_operations=300, idle_seconds=3.0)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Sizes such as ``"1KiB,64KiB,1MiB"``, ascending.

    Raises:
        ValueError: one of them is not a size from 1 KiB to 256 MiB.
    """
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*([a-z]*)\s*", part.lower())
        nbytes = int(found[1]) * _UNITS.get(found[2], 0) if found else 0
        if not _LEAST_SIZE <= nbytes <= _MOST_SIZE:
            raise ValueError(f"{part.strip()!r} is not a size from 1KiB to 256MiB")
        sizes.append(nbytes)
    return tuple(sorted(set(sizes)))


def size_name(nbytes: int) -> str:
    """``1 KiB``, ``64 MiB``."""
    if nbytes % MIB == 0:
        return f"{nbytes // MIB} MiB"
    return f"{nbytes // KIB} KiB" if nbytes % KIB == 0 else f"{nbytes} B"
