"""Random walks of a ring beside its model, one for each seed, until one finds a violation."""

import argparse
import logging
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ring_model import walk

STEPS = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable()  # late ends of leases are part of the walk, and the ring logs them
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        try:
            walk(seed, STEPS)
        except BaseException:  # pytest.fail is no Exception
            traceback.print_exc()
            print(f"seed {seed}: the ring differs from its model; to repeat: --first {seed} --seeds 1")
            return 1
    print(f"{arguments.seeds} seeds without a violation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
