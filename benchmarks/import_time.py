"""How long `import dray` takes beside `import numpy`: ``python benchmarks/import_time.py [--rounds N]``.

Each import has an interpreter of its own, and the two take turns, so that what else the machine does meets both.
`import dray` is timed in an interpreter that has imported NumPy already, with every public name, as names are
imported at their first use.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence

LIMIT_MS = 150
"""What `import dray` may take beyond NumPy, in milliseconds: the target P22."""

PROGRAM = """
import sys, time
for name in sys.argv[1:]:
    began = time.perf_counter()
    exec(f"from {name} import *")
print(time.perf_counter() - began)
"""
MEASURED = (("numpy",), ("numpy", "dray"))
"""What is imported, one after the other; the last of each is timed."""


def import_time(names: Sequence[str]) -> float:
    """Milliseconds that the last of `names` takes, after the others, in a new interpreter."""
    printed = subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, check=True)
    return float(printed.stdout) * 1e3


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="how often each import is timed")
    rounds = parser.parse_args().rounds
    found: dict[str, list[float]] = {names[-1]: [] for names in MEASURED}
    for names in MEASURED:
        import_time(names)  # compiles what is not compiled yet
    for _ in range(rounds):
        for names in MEASURED:
            found[names[-1]].append(import_time(names))
    print(f"{'':<14} {'median':>9} {'least':>9}")
    for name, times in found.items():
        print(f"{f'import {name}':<14} {statistics.median(times):>6.0f} ms {min(times):>6.0f} ms")
    verdict = "reached" if statistics.median(found["dray"]) <= LIMIT_MS else "not reached"
    print(f"P22: import dray takes at most {LIMIT_MS} ms beyond import numpy: {verdict}")


if __name__ == "__main__":
    main()
