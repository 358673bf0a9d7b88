"""Checkpoints: a folder that is there as a whole or not at all.

```
checkpoint/
  state.json     the fields of `CheckpointState`
  trainer/       what the trainer's save wrote; trainer-1/, trainer-2/, … for the other ranks of a policy group
```
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dray.errors import ConfigError
from dray.files import FOLDER_MODE, check_own_tree, output_errors, read_own_file, write_json

_KEY = "--resume"


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """How far the job was.

    Args:
        outcome: empty unless the job had ended: ``"solved"`` or ``"finished"``.
        contributed: payloads that the weights were trained on.
        committed: payloads whose commit was confirmed, those of weights that were lost in a crash included.
        unconfirmed: ``producer:sequence`` of each payload that the weights were trained on and whose commit was
            not confirmed; a policy that resumes from here commits these and does not train on them.
        unfreed: likewise of each payload that was committed and is not known to be freed: published again, after
            Redis was restarted empty, it would be taken for a new one.
        ranks: how many policy replicas have written their part.
        totals: further figures, such as ``bytes`` and ``seconds``, which continue from here.
    """

    step: int
    weight_version: int
    next_work_item: int
    outcome: str = ""
    contributed: int = 0
    committed: int = 0
    unconfirmed: tuple[str, ...] = ()
    unfreed: tuple[str, ...] = ()
    ranks: int = 1
    totals: Mapping[str, float] = field(default_factory=dict)


def save_checkpoint(folder: Path, state: CheckpointState, save_trainer: Callable[[Path], None]) -> None:
    """Put a new checkpoint in the place of the one at `folder`, which stays whole until then.

    Raises:
        OutputError: it cannot be written.
    """
    partial, previous = _partial(folder), _previous(folder)
    with output_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        trainer = trainer_folder(partial, 0)
        try:
            partial.mkdir(FOLDER_MODE)
            trainer.mkdir(FOLDER_MODE)
            save_trainer(trainer)
            _sync_tree(partial)
            write_json(partial / "state.json", asdict(state))
        except BaseException:
            # On a full disk this is the space that the rest of the job's end needs.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        # A folder cannot be replaced at once: between the two renames only `previous` is there, where it is looked
        # for as well.
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        partial.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)


def record_committed(place: Path, state: CheckpointState, committed: int) -> CheckpointState:
    """Note at the checkpoint `place` that `committed` payloads are committed, among them those that `state` has as
    unconfirmed; returns the new state.

    From here on this number depends neither on Redis nor on the metrics of steps that were rolled back.
    """
    new = replace(state, committed=committed, unconfirmed=(), unfreed=(*state.unfreed, *state.unconfirmed))
    if new != state:
        write_json(place / "state.json", asdict(new))
        _sync(place)
    return new


def sweep_partial(folder: Path) -> None:
    """Remove what a process that was killed while it saved has left beside the checkpoint at `folder`."""
    shutil.rmtree(_partial(folder), ignore_errors=True)
    if folder.exists():
        shutil.rmtree(_previous(folder), ignore_errors=True)


def find_checkpoint(folder: Path) -> tuple[Path, CheckpointState] | None:
    """The newest whole checkpoint at `folder`, or None.

    Raises:
        ConfigError: there is one, but its state cannot be read, or another user may have written it.
    """
    for place in (folder, _previous(folder)):
        try:
            text = read_own_file(place / "state.json", _KEY)
        except FileNotFoundError:
            continue
        try:
            fields = json.loads(text)
            lists = {name: tuple(fields.get(name, ())) for name in ("unconfirmed", "unfreed")}
            totals = {name: float(value) for name, value in fields.get("totals", {}).items()}
            return place, CheckpointState(**{**fields, **lists, "totals": totals})
        except (ValueError, TypeError, AttributeError) as error:
            allowed, problem = f"must be a checkpoint of dray ({error})", f"cannot resume from {place}"
            raise ConfigError(_KEY, str(place), allowed, problem) from error
    return None


def check_checkpoint(place: Path) -> None:
    """Refuse, with a `ConfigError`, what another user may have written at `place`: a trainer may run it."""
    check_own_tree(place, _KEY)


def trainer_folder(folder: Path, rank: int) -> Path:
    """Where rank `rank` of the policy group has its part of the checkpoint at `folder`."""
    return folder / (f"trainer-{rank}" if rank else "trainer")


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
