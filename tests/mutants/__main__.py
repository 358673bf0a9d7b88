"""`make mutants`: plants each defect and reports what found it; fails if one survives."""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

from defects import DEFECTS, Search
from planting import find
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument(
        "--seeds", type=int, default=10_000, help="seeds; a defect that none of them finds has survived"
    )
    parser.add_argument("--search", choices=[search.value for search in Search], help="only what this must find")
    parser.add_argument("--only", default="", help="defects whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbose", action="store_true", help="print the output of each search")
    arguments = parser.parse_args()
    console = Console()
    chosen = [
        defect
        for defect in DEFECTS
        if arguments.only in defect.name and arguments.search in (None, defect.search.value)
    ]
    findings = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, transient=True) as progress,
        ThreadPoolExecutor(arguments.jobs) as threads,
    ):
        task = progress.add_task("defects", total=len(chosen))
        running = {threads.submit(find, defect, arguments.seeds): defect for defect in chosen}
        for future in as_completed(running):
            findings[running[future]] = future.result()
            progress.advance(task)
            defect, finding = running[future], findings[running[future]]
            by = "nothing" if finding.seed is None else f"seed {finding.seed} of the {defect.search.value}"
            progress.console.print(f"{defect.name}: found by {by}, {finding.seconds:.1f} s", highlight=False)
            if arguments.verbose:
                progress.console.print(finding.output, markup=False, highlight=False)
    table = Table("defect", "file", "found by", "seeds", "seconds")
    survived = 0
    for defect in chosen:
        finding = findings[defect]
        survived += finding.seed is None
        by, seeds = (
            (defect.search.value, str(finding.seed + 1)) if finding.seed is not None else ("[red]nothing[/]", "")
        )
        table.add_row(defect.name, defect.file, by, seeds, f"{finding.seconds:.1f}")
    console.print(table)
    console.print(f"{len(chosen) - survived} of {len(chosen)} defects found within {arguments.seeds} seeds")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
