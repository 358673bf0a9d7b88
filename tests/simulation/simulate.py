"""`python -m simulation`: runs of the simulation, many on all cores, or one with its trace."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from simulation.scheduler import Violation
from simulation.streams import StreamRun
from simulation.world import Run, quiet_process

STREAMS_EVERY = 4
"""One in so many runs is of streams."""
_CHUNKS_OF_PROCESS = 20
_CHUNK = 200
_LAST_LINES = 60
_MAX_CPU_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Failure:
    """A seed whose run went wrong."""

    seed: int
    what: str


def run_seed(seed: int, seen: Counter[str], traced: bool = False) -> tuple[Failure | None, list[str]]:
    """One run: how it failed, if it did, and its trace, if it is `traced`."""
    run = None
    try:
        with _no_spin():
            run = (StreamRun if seed % STREAMS_EVERY == STREAMS_EVERY - 1 else Run)(seed, seen, traced)
            run.go()
    except AssertionError as violation:
        return Failure(seed, f"{type(violation).__name__}: {violation}"), run.scheduler.trace if run else []
    except Exception as crash:
        where = "".join(traceback.format_exception(crash))
        return Failure(seed, f"{type(crash).__name__}: {crash}\n{where}"), run.scheduler.trace if run else []
    return None, run.scheduler.trace


@contextlib.contextmanager
def _no_spin() -> Iterator[None]:
    """Ends a run that goes round in circles without ever giving way."""

    def ring(_signal: int, _frame: object) -> None:
        raise Violation(f"no end after {_MAX_CPU_SECONDS} s of processor time")

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, _MAX_CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def run_seeds(seeds: Sequence[int]) -> tuple[int, list[Failure], Counter[str]]:
    """Several runs, in a process that does nothing else: how many, those that failed, what happened in them."""
    seen: Counter[str] = Counter()
    failures = []
    with quiet_process():
        for seed in seeds:
            failure, _ = run_seed(seed, seen)
            if failure is not None:
                failures.append(failure)
    return len(seeds), failures, seen


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if something was violated."""
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--stop-at-first", action="store_true", help="end with the first violation")
    parser.add_argument("--seed", type=int, help="run only this one")
    parser.add_argument("--trace", action="store_true", help="print every step of --seed")
    parser.add_argument("--counts", action="store_true", help="print how often what happened")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    if options.seed is not None:
        return _one(console, options.seed, options.trace)
    return _many(console, options)


def _one(console: Console, seed: int, whole: bool) -> int:
    seen: Counter[str] = Counter()
    with quiet_process():
        failure, trace = run_seed(seed, seen, traced=True)
    for line in trace if whole else trace[-_LAST_LINES:] if failure else []:
        console.print(line, markup=False)
    console.print(f"seed {seed}: {failure.what if failure else 'nothing was violated'}", markup=False)
    return 1 if failure else 0


def _many(console: Console, options: argparse.Namespace) -> int:
    began = time.monotonic()
    failures: list[Failure] = []
    seen: Counter[str] = Counter()
    done = 0
    columns = (TextColumn("seeds"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("seeds", total=options.seeds)
        for count, failed, what in _results(options):
            done += count
            failures += failed
            seen += what
            progress.update(bar, completed=done)
            if failures and options.stop_at_first:
                break
    seconds = time.monotonic() - began
    for failure in sorted(failures, key=lambda failure: failure.seed)[:20]:
        console.print(f"seed {failure.seed}: {failure.what}", markup=False)
        console.print(f"  replay: python -m simulation --seed {failure.seed} --trace", markup=False)
    if options.counts:
        for name, count in sorted(seen.items()):
            console.print(f"{count:9d}  {name}", markup=False)
    rate = done / seconds
    console.print(f"{done} seeds in {seconds:.1f} s ({rate:.0f}/s), {len(failures)} violations", markup=False)
    return 1 if failures else 0


def _results(options: argparse.Namespace) -> Iterator[tuple[int, list[Failure], Counter[str]]]:
    seeds = range(options.first, options.first + options.seeds)
    chunk = 20 if options.stop_at_first else min(_CHUNK, max(1, len(seeds) // options.jobs))
    chunks = [seeds[begin : begin + chunk] for begin in range(0, len(seeds), chunk)]
    if options.jobs == 1:
        yield from map(run_seeds, chunks)
        return
    # A process that is killed within `__del__` keeps its greenlet, and so the whole world of its seed.
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=_CHUNKS_OF_PROCESS) as pool:
        yield from pool.imap_unordered(run_seeds, chunks)
