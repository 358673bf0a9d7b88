"""``python -m soak``: producers and consumers under random faults, and an account of every payload."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from soak.accounts import account
from soak.leaks import growths
from soak.ledger import Kind
from soak.network import Network, network
from soak.plan import Plan
from soak.report import Report
from soak.supervisor import History, Supervisor

from dray.jobs.queue import start_redis
from dray.private_directory import PrivateDirectory

_PRINT_EVERY = 15.0
_INTERRUPTED = 130


def main(
    minutes: Annotated[float, typer.Option(min=0.05, help="How long faults come, without start and drain.")] = 2.0,
    seed: Annotated[int | None, typer.Option(help="Of the plan; by default a random one.")] = None,
    namespaces: Annotated[
        bool | None,
        typer.Option(help="Network namespaces and packet filters; by default where the machine allows."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file, too.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep ledgers and logs even if all is well.")] = False,
) -> None:
    """Run a soak; exit code 1 if a payload is wrong or unaccounted, a wait too long, or anything left behind."""
    console = Console(highlight=False)
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    why_not = Network.unavailable() if namespaces is not False else "not wanted"
    if namespaces and why_not:
        raise typer.BadParameter(f"no network namespaces here: {why_not}")
    plan = Plan(seed, minutes * 60, namespaces=not why_not)
    console.print(f"seed {seed}; {f'no network namespaces: {why_not}' if why_not else 'in network namespaces'}")
    folder = Path(tempfile.mkdtemp(prefix="dray-soak-"))
    report = _run(plan, folder, console)
    report.show(console)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report.document(), indent=1), encoding="utf-8")
    if keep or report.failed:
        console.print(f"ledgers and logs: {folder}")
    else:
        shutil.rmtree(folder)
    sys.exit(1 if report.failed else _INTERRUPTED if report.history.interrupted else 0)


def _run(plan: Plan, folder: Path, console: Console) -> Report:
    names = tuple(producer.name for producer in plan.producers)
    with (
        start_redis(folder / "redis") as redis,
        network(names, namespaces=plan.namespaces) as namespaces,
        Live(console=console, auto_refresh=False, transient=True) as live,
    ):
        printed = time.monotonic()

        def show(counts: Counter[Kind], history: History) -> None:
            nonlocal printed
            line = _progress(plan, counts, history)
            if console.is_terminal:
                live.update(line, refresh=True)
            elif time.monotonic() >= printed + _PRINT_EVERY:
                printed = time.monotonic()
                console.print(line)

        supervisor = Supervisor(plan, folder, redis, namespaces, show)
        supervisor.run()
    history = supervisor.history
    # Folders of killed processes are swept by the next one that makes its own.
    PrivateDirectory(supervisor.sockets).close()
    history.folders_left = [each.name for each in supervisor.sockets.iterdir() if each.is_dir()]
    return Report(plan, history, account(history.runs, history.redis_lost), growths(history.runs))


def _progress(plan: Plan, counts: Counter[Kind], history: History) -> str:
    now = time.monotonic() - history.began
    phase = f"{now:4.0f} of {plan.seconds:.0f} s" if now < plan.seconds else "draining"
    return (
        f"{phase}: {counts[Kind.COMMITTED]:,} committed, {counts[Kind.DELIVERED]:,} deliveries, "
        f"{counts[Kind.WRONG]} wrong, {counts[Kind.FAILED]:,} failed reads, {history.faults.total()} faults; "
        f"last: {history.log[-1].strip() if history.log else 'none'}"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
