"""``python -m stress``: direct leases against a small ring that is overwritten all the time."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from stress.barriers import Build
from stress.run import Account, Plan, run

from dray.ring.direct import direct_problem


def main(
    leases: Annotated[int, typer.Option(min=1, help="In all runs together.")] = 2_000_000,
    seconds: Annotated[
        float, typer.Option(min=1, help="Time limit for all runs together, without starts.")
    ] = 900.0,
    only: Annotated[str, typer.Option(help="Runs whose names contain this text.")] = "",
    quiet: Annotated[
        bool, typer.Option("--without-faults", help="No kills, stops, forks or failed barriers.")
    ] = False,
    without_barrier: Annotated[
        bool,
        typer.Option(
            "--without-barrier",
            help="Instead, a build of the producer in which only the barrier keeps the order, with it and without "
            "it; then payloads are wrong.",
        ),
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of the faults; by default a random one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file, too.")] = None,
) -> None:
    """Exit code 1 if a payload is wrong, lost, or given again after its end, or if the books do not add up."""
    if why := direct_problem():
        print(f"no direct leases on this machine: {why}", file=sys.stderr)
        sys.exit(2)
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    print(f"seed {seed}", flush=True)
    made = without_barrier_plans(leases, seconds) if without_barrier else plans(leases, seconds)
    wanted = [each for each in made if only in each.name]
    if not wanted:
        raise typer.BadParameter(f"no run is called {only!r}")
    accounts: list[Account] = []
    left = leases
    for index, plan in enumerate(wanted):
        share = len(wanted) - index
        time = max(1.0, (seconds - sum(account.seconds for account in accounts)) / share)
        part = dataclasses.replace(plan, leases=-(-left // share), seconds=time, seed=seed)
        accounts.append(run(without_faults(part) if quiet else part))
        left = max(1, left - accounts[-1].counts["LEASES"])
        print(accounts[-1].line(), flush=True)
    total = sum(account.counts["LEASES"] for account in accounts)
    wrong = sum(account.wrong for account in accounts)
    direct = sum(account.counts["DIRECT"] for account in accounts)
    print(f"{total:,} leases, {direct:,} of them direct; {wrong} wrong", flush=True)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(
            json.dumps([dataclasses.asdict(each) for each in accounts], indent=1), encoding="utf-8"
        )
    sys.exit(1 if any(account.problems for account in accounts) else 0)


def plans(leases: int, seconds: float) -> Iterator[Plan]:
    """Every policy on one processor, on two, and with more processes than processors."""
    cpus = sorted(os.sched_getaffinity(0))
    block = Plan("block", leases, seconds, consumers=2, kills=1.0, stops=2.0, fork_every=20_000)
    overwrite = dataclasses.replace(
        block, name="overwrite", on_full="overwrite", consumers=3, own_readers=False, exchanging=(0,)
    )
    newest = dataclasses.replace(block, name="newest", retain="newest", slots=48)
    for place, using, more in (("one processor", 1, 0), ("two processors", 2, 0), ("crowded", 2, 5)):
        for plan in (block, overwrite, newest):
            yield dataclasses.replace(
                plan, name=f"{plan.name}, {place}", cpus=tuple(cpus[:using]), consumers=plan.consumers + more
            )
    for plan in (block, overwrite):
        yield dataclasses.replace(plan, name=f"{plan.name}, failing barriers", barrier_failures=0.02)


def without_faults(plan: Plan) -> Plan:
    """The same, undisturbed."""
    return dataclasses.replace(plan, kills=0.0, stops=0.0, fork_every=0, barrier_failures=0.0)


def without_barrier_plans(leases: int, seconds: float) -> Iterator[Plan]:
    """The words are read directly after the store, with a barrier between the two or without one."""
    for build in (Build.CLOSE, Build.CLOSE_WITHOUT_BARRIER):
        yield Plan(
            build.value, leases, seconds, on_full="overwrite", consumers=1, own_readers=False, slots=2, hold=100,
            build=build,
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
