"""``python -m soak.streams``: kill storms for streams, and an account of every payload."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from soak.streams.plan import Way, draw_round
from soak.streams.report import Report
from soak.streams.storm import Storm

_WAYS = {"name": (Way.NAME,), "steady": (Way.STEADY,), "tcp": (Way.TCP,), "all": tuple(Way)}


def main(
    minutes: Annotated[float, typer.Option(min=0.05, help="How long rounds begin.")] = 2.0,
    seed: Annotated[int | None, typer.Option(help="Of the plans; by default a random one.")] = None,
    ways: Annotated[str, typer.Option(help=f"How processes find each other: {', '.join(_WAYS)}.")] = "all",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file, too.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End with the first round that shows a fault.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep journals and logs even if all is well.")] = False,
) -> None:
    """Run a storm; exit code 1 if a payload is wrong, lost, or handed out as it must not be, or anything is left."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    console = Console(highlight=False)
    if ways not in _WAYS:
        raise typer.BadParameter(f"one of {', '.join(_WAYS)}", param_hint="--ways")
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="dray-storm-"))
    runtime = folder / "r"
    runtime.mkdir(mode=0o700)
    scope = f"storm {secrets.token_hex(4)}"
    os.environ |= {"DRAY_RUNTIME_DIR": str(runtime), "DRAY_SCOPE": scope}
    rng = random.Random(seed)
    report = Report(seed)
    storm = Storm(folder, runtime, scope, seed)
    until = time.monotonic() + minutes * 60
    console.print(f"seed {seed}")
    storm.open()
    try:
        for index in itertools.count():
            left = until - time.monotonic()
            if left <= 0 or (stop and report.problems):
                break
            plan = draw_round(rng, index, _WAYS[ways], max(1.5, left) if minutes > 1 else minutes * 20)
            outcome = storm.run(plan)
            report.add(outcome)
            verdict = f"{len(outcome.account.problems)} problems" if outcome.account.problems else "ok"
            console.print(
                f"round {index}, {plan.way.value}: {outcome.processes} processes, "
                f"{outcome.faults.total()} faults, {outcome.account.counts['payloads put']:,} payloads, "
                f"{outcome.seconds:.0f} s, longest drain {outcome.account.longest_drain:.1f} s: {verdict}",
                style="red" if outcome.account.problems else "",
            )
    finally:
        report.problems += storm.close()
        report.show(console)
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(report.document(), indent=1), encoding="utf-8")
        if keep or report.failed:
            console.print(f"journals and logs: {folder}")
        else:
            shutil.rmtree(folder)
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    typer.run(main)
