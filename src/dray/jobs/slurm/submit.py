"""`dray slurm submit`: creates the folder of a run, with the files that its parts need, and submits the script.

```
<run folder>/
  slurm.json        the state of the run, see `RunRecord`
  slurm-<job>.out   the output of the batch script
  options.json      the options of the submission, see `RunOptions`
  parts/001.1/logs/ one log per process of part 1, attempt 1; `latest` is a symbolic link to the newest
  .slurm/           for its owner only
    job.sh          the batch script
    plan.json       the input of the processes, with the run's secret
    code/           the snapshot
    job_id          Slurm's number of the newest submission
```
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dray.errors import ConfigError
from dray.files import open_own_folder, read_own_file, write_whole
from dray.jobs.config import JobConfig, SlurmTable
from dray.jobs.folder import RunOptions
from dray.jobs.job_file import parse_job
from dray.jobs.launch.output import KEY, RESUME_NEEDS, choose_folder, has_metrics, make_run_folder, remove_empty
from dray.jobs.slurm import scheduler
from dray.jobs.slurm.placement import placements
from dray.jobs.slurm.plan import Plan
from dray.jobs.slurm.run_state import (
    FILE_NAME,
    RunEvent,
    RunRecord,
    RunState,
    cancel_marker,
    read_stopped_run,
    refuse_folder_in_use,
)

# --- snapshot ----------------------------------------------------------------------------------------------------

# A copy of the job file's folder, so that later edits of the code do not affect the job.
#
# Hidden files and folders (repositories, virtual environments, caches), `__pycache__`, `outputs/` and the run's
# folder are left out. Of a symbolic link to a file, the file is copied; a symbolic link to a folder stays one,
# because such a folder is often a data set.

MAX_SNAPSHOT_BYTES = 256 << 20
MAX_SNAPSHOT_FILES = 10_000
_LEFT_OUT = frozenset(("__pycache__", "outputs"))


def take_snapshot(job_file: Path, target: Path, run_folder: Path) -> Path:
    """Copy the folder of `job_file` to `target`, which is replaced; returns the job file in the copy.

    Raises:
        ConfigError: the folder has more than `MAX_SNAPSHOT_BYTES` or `MAX_SNAPSHOT_FILES`, so more than code.
    """
    source = job_file.parent.resolve()
    found = _within_limits(source, _entries(source, run_folder.resolve()))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in found:
        copy = partial / path.relative_to(source)
        if path.is_symlink() and path.is_dir():
            copy.symlink_to(path.resolve())
        elif path.is_dir():
            copy.mkdir()
        else:
            shutil.copy2(path, copy)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target / job_file.name


def _entries(folder: Path, run_folder: Path) -> Iterator[Path]:
    """The files and folders to copy, each folder before its content."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _LEFT_OUT or path.resolve() == run_folder:
            continue
        if path.is_dir():
            yield path
            if not path.is_symlink():
                yield from _entries(path, run_folder)
        elif path.is_file():  # no sockets, pipes or dangling symlinks
            yield path


def _within_limits(source: Path, entries: Iterable[Path]) -> list[Path]:
    found, files, size = [], 0, 0
    for path in entries:
        found.append(path)
        if not path.is_dir():
            files += 1
            size += path.stat().st_size
        if files > MAX_SNAPSHOT_FILES or size > MAX_SNAPSHOT_BYTES:
            allowed = (
                f"{source} has more than {MAX_SNAPSHOT_FILES} files or {MAX_SNAPSHOT_BYTES >> 20} MiB: move "
                "data to another folder, to which a symbolic link may point, or set slurm.snapshot to false"
            )
            raise ConfigError("slurm.snapshot", True, allowed)
    return found


# --- script ------------------------------------------------------------------------------------------------------

GUARD_INTERVAL = 15
"""Seconds between two checks that the batch script's node still belongs to the job."""

END_MARGIN = 15
"""Seconds that the other nodes have beyond `timeouts.shutdown` after the head process has ended."""

_FORBIDDEN = frozenset("\\\"'")


def _batch_script(plan: Plan) -> str:
    """The complete batch script of a run; raises `ConfigError` for times or a folder that cannot be."""
    table, shutdown = plan.table, plan.config.timeouts.shutdown
    limit = scheduler.parse_duration("slurm.time", table.time)
    if not shutdown < table.pre_timeout:
        allowed = f"must be more than timeouts.shutdown, which is {shutdown:g} s"
        raise ConfigError("slurm.pre_timeout", table.pre_timeout, allowed)
    if not table.pre_timeout < limit:
        allowed = f"must be less than slurm.time, which is {limit} s"
        raise ConfigError("slurm.pre_timeout", table.pre_timeout, allowed)
    folder = str(plan.run_folder)
    if not folder.isprintable() or _FORBIDDEN & set(folder):
        allowed = "must be, for Slurm, a folder without quotes and backslashes in its name"
        raise ConfigError("job.output", folder, allowed)
    return scheduler.render(
        "job.sh.j2",
        table=table,
        job_name=f"dray-{plan.config.job.name}",
        nodes=plan.node_count,
        run_folder=folder,
        plan=plan.path,
        # All that is known of an image is that its python3 has dray.
        python="python3" if table.container_image else sys.executable,
        container_mounts=[f"{folder}:{folder}", *table.container_mounts],
        guard_interval=GUARD_INTERVAL,
        end_timeout=int(shutdown) + END_MARGIN,
    )


# --- submit ------------------------------------------------------------------------------------------------------

_PARTITION_OPTIONS = ("-p", "--partition", "-M", "--cluster")
"""Options of sbatch that choose another partition or cluster than `slurm.partition` does."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A checked submission, before its files are written.

    Attributes:
        record: the record that the run will have; None if the run has finished.
        layout: one line for each node, with the processes on it.
        new_folders: the folders that were created for the run, innermost first.
    """

    plan: Plan
    script: str
    record: RunRecord | None
    layout: Sequence[str]
    new_folders: Sequence[Path]


def with_options(config: JobConfig, options: Mapping[str, Any]) -> JobConfig:
    """`config` with `options` applied to `[slurm]`: lists and tables are extended, other values are replaced.

    Args:
        options: values by key; None leaves a key unchanged. ``"nodes"`` is the number of nodes of both roles.

    Raises:
        ConfigError: a value is not allowed.
    """
    table = (config.slurm or SlurmTable()).model_dump(mode="json")
    for key, value in options.items():
        if isinstance(value, list):
            table[key] = [*table[key], *value]
        elif isinstance(value, Mapping):
            table[key] = {**table[key], **value}
        elif value is not None:
            table[key] = value
    nodes = table.pop("nodes", None)
    checked = parse_job({**config.model_dump(mode="json"), "slurm": table})
    if nodes is None:
        return checked
    rollout_nodes = nodes - table["policy_nodes"]
    if rollout_nodes < 0:
        allowed = f"must be at least slurm.policy_nodes, which is {table['policy_nodes']}"
        raise ConfigError("--nodes", nodes, allowed)
    return with_options(checked, {"rollout_nodes": rollout_nodes})


def prepare(config: JobConfig, job_file: Path, *, resume: bool, make: bool = False) -> Submission:
    """The checked submission of a job.

    Args:
        make: create the run's folder now, so that a run that starts at the same time gets another one.

    Raises:
        ConfigError: a value is not allowed, or the folder belongs to another run.
    """
    table = config.slurm or SlurmTable()
    layout = list(_layout_lines(config, [str(node) for node in range(table.policy_nodes + table.rollout_nodes)]))
    made: Sequence[Path] = ()
    if make and not resume:
        root, made = make_run_folder(lambda: run_folder(config, resume=False), new=config.job.output is None)
    else:
        root = run_folder(config, resume=resume)
    with ExitStack() as undo:
        undo.callback(remove_empty, made)
        record = _record(root, table.retries, resume=resume)
        code = root / ".slurm" / "code" / job_file.name if table.snapshot else job_file.absolute()
        plan = Plan(config, code, root, secrets.token_bytes(32))
        submission = Submission(plan, _batch_script(plan), record, layout, made)
        undo.pop_all()
        return submission


def _layout_lines(config: JobConfig, nodes: Sequence[str]) -> Iterator[str]:
    placed = placements(config, nodes)
    for node in nodes:
        shown = ["controller", "Redis"] if node == nodes[0] else []
        for each in placed:
            if node in each.nodes:
                spanned = "" if node == each.node else ", spanned"
                gpus = f" (GPU {','.join(map(str, each.gpus))})" if each.gpus else ""
                shown.append(f"{each.name}{spanned}{gpus}")
        yield f"node {node}: {', '.join(shown)}"


def submit(submission: Submission, job_file: Path, options: RunOptions | None = None) -> int:
    """Write the run's folder and submit its script; returns Slurm's number of the job.

    If the submission fails, the folder is removed if it was created for this submission.

    Args:
        options: the options of the submission, which are kept in the folder.

    Raises:
        ConfigError: the code cannot be copied, or the cluster has too few nodes.
        SlurmError: Slurm rejected the job.
    """
    assert submission.record is not None
    plan, root = submission.plan, submission.plan.run_folder
    try:
        _check_node_count(plan)
    except ConfigError:
        remove_empty(submission.new_folders)
        raise
    made = submission.new_folders or make_run_folder(lambda: root, new=False)[1]
    os.close(open_own_folder(root, KEY))
    previous = RunRecord.read(root) if _was_submitted(root) else None
    try:
        plan.write()
        if plan.job_file != job_file.absolute():
            take_snapshot(job_file, plan.job_file.parent, root)
        script = plan.path.with_name("job.sh")
        write_whole(script, submission.script.encode())
        cancel_marker(root).unlink(missing_ok=True)
        # Written before the submission, because the job may begin at once.
        submission.record.write(root)
        number = scheduler.submit(script)
    except BaseException:
        if made:
            shutil.rmtree(root, ignore_errors=True)
            remove_empty(made)
        elif previous is not None:
            previous.write(root)
        raise
    write_whole(_job_id_file(root), f"{number}\n".encode())
    if options is not None:
        options.write(root)
    return number


def submitted_job(run_folder: Path) -> str:
    """Slurm's number of the run's newest job, or an empty text."""
    try:
        return read_own_file(_job_id_file(run_folder), FILE_NAME).decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


def run_folder(config: JobConfig, *, resume: bool) -> Path:
    """The absolute path of the run's folder, which need not exist.

    Raises:
        ConfigError: the folder has an earlier run, or there is no run to resume.
    """
    needs = "must contain the folder of a submitted run"
    root = choose_folder(config, resume=resume, used=_is_used, resumable=(_was_submitted,), needs=needs)
    if resume and not _is_used(root):
        raise ConfigError("--resume", str(root), RESUME_NEEDS, f"cannot resume the run in {root}")
    return root


def _is_used(root: Path) -> bool:
    return _was_submitted(root) or has_metrics(root)


def _was_submitted(root: Path) -> bool:
    return (root / FILE_NAME).exists()


def _record(root: Path, retries: int, *, resume: bool) -> RunRecord | None:
    """The record that the run will have, None if it has finished; `ConfigError` if it has a job in the queue."""
    if not resume or not _was_submitted(root):
        return RunRecord(RunState.SUBMITTED, retries)
    if RunRecord.read(root).state is RunState.FINISHED:
        return None
    number = submitted_job(root)
    state = scheduler.known_jobs().get(number)
    if state is not None and not scheduler.has_ended(state):
        allowed = f"must be a run without a waiting or running job; `scancel {number}` ends job {number}"
        raise ConfigError("--resume", str(root), allowed, f"cannot resume the run in {root}")
    refuse_folder_in_use(root)
    record = read_stopped_run(root)
    if record.state is RunState.FINISHED:
        return None
    return replace(record.apply(RunEvent.RESUME), remaining_retries=retries)


def _check_node_count(plan: Plan) -> None:
    """Raise `ConfigError` if the job needs more nodes than its partition has: it would never begin."""
    table = plan.table
    if "SBATCH_PARTITION" in os.environ or any(each.startswith(_PARTITION_OPTIONS) for each in table.sbatch_args):
        return
    count = scheduler.partition_nodes(table.partition)
    if count is not None and plan.node_count > count:
        partition = f"partition {table.partition}" if table.partition else "the default partition"
        allowed = f"must be at most {count}, the number of nodes of {partition}"
        raise ConfigError("--nodes", plan.node_count, allowed)


def _job_id_file(root: Path) -> Path:
    return root / ".slurm" / "job_id"
