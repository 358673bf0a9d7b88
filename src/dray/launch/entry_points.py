"""Whether the user's classes can be imported, found out before anything of the job is started."""

from __future__ import annotations

import json
import os
import selectors
import signal
from collections.abc import Callable
from pathlib import Path

from dray.clock import Deadline
from dray.config import JobDraft
from dray.errors import ConfigError
from dray.launch.children import Child
from dray.launch.signals import SignalInbox
from dray.runtime.descendants import child_pids, kill_orphans
from dray.runtime.exit_codes import meaning
from dray.text import bytes_of

NOTICE_AFTER = 2.0
"""Seconds that an import takes before there is a line about it; another one follows whenever that has doubled."""


def check_entry_points(
    draft: JobDraft, job_file: Path, folder: Path, inbox: SignalInbox, *, say: Callable[[str], None]
) -> list[signal.Signals]:
    """Import the user's classes in a process of their own, so that nothing of them stays in this one.

    Args:
        draft: classes that it does not know are not checked.
        folder: for this user only; the report and the output of the process go there.
        say: shows a line to the user.

    Returns:
        Signals that came meanwhile; with them nothing is known.

    Raises:
        ConfigError: they cannot be imported.
    """
    config, report = draft.config, folder / "entry_points.json"
    worker = config.rollout.worker if draft.knows("rollout.worker") else ""
    trainer = config.policy.trainer if draft.knows("policy.trainer") else ""
    if not worker and not trainer:
        return []
    named = [each for each in (worker, trainer) if each]
    # They may name files: arguments of a process are bytes, as paths are.
    classes = [os.fsdecode(bytes_of(each)) for each in (worker, trainer)]
    strangers = child_pids()
    child = Child(
        "check",
        "dray.runtime.check_entry_points",
        [str(job_file.parent), *classes, str(report)],
        folder / "check.log",
    )
    deadline = Deadline.after(config.timeouts.start)
    notice = NOTICE_AFTER
    signals: list[signal.Signals] = []
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(inbox, selectors.EVENT_READ)
            selector.register(child.pidfd, selectors.EVENT_READ)
            while child.collect() is None and not signals and not deadline.expired:
                selector.select(min(deadline.remaining, notice - deadline.elapsed))
                signals += inbox.take()
                if deadline.elapsed >= notice:
                    notice *= 2
                    say(
                        f"importing {' and '.join(named)} "
                        f"({deadline.elapsed:.0f} s so far, at most {config.timeouts.start:g} s)"
                    )
    finally:
        child.kill_group()
        child.collect(5.0)
        kill_orphans(frozenset(strangers), 1.0)
    if signals:
        return signals
    try:
        mistakes = json.loads(report.read_text(encoding="utf-8"))["mistakes"]
    except (OSError, ValueError) as error:
        keys = [key for key, text in (("rollout.worker", worker), ("policy.trainer", trainer)) if text]
        why = f"importing them took longer than timeouts.start = {config.timeouts.start:g} s"
        if not deadline.expired:
            why = f"importing them ended the process ({meaning(child.exit_code or 0)})"
        raise ConfigError(", ".join(keys), ", ".join(named), why, "cannot be used") from error
    if mistakes:
        raise ConfigError.of([ConfigError(**each) for each in mistakes])
    return []
