"""``python -m benchmarks``: the same as ``dray bench``."""

import typer

from dray.cli.bench import bench

if __name__ == "__main__":
    typer.run(bench)
