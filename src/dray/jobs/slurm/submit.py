"""`dray slurm submit`: makes a run's folder, with all that its parts need, and hands the batch script to Slurm.

```
<run folder>/
  slurm.json        what is known about the run, see `run_record`
  slurm-<job>.out   the output of the batch script
  options.json      what the run was submitted with, see `RunOptions`
  parts/001.1/logs/ one log per process of part 1, attempt 1, and so on; `latest` leads to the newest
  .slurm/           for its owner only
    job.sh          the batch script
    plan.json       what the processes are told, with the run's secret
    code/           the snapshot
    job_id          of the newest submission
```
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dray.errors import ConfigError
from dray.jobs.config import JobConfig, SlurmTable
from dray.jobs.files import open_own_folder, read_own_file, write_whole
from dray.jobs.folder import RunOptions
from dray.jobs.job_file import parse_job
from dray.jobs.launch.output import KEY, RESUME_NEEDS, choose_folder, has_metrics, make_run_folder, remove_empty
from dray.jobs.slurm import scheduler
from dray.jobs.slurm.batch_cli import cancel_marker, read_settled, refuse_folder_in_use
from dray.jobs.slurm.placement import layout_of, placements, rollout_nodes_of
from dray.jobs.slurm.plan import Plan
from dray.jobs.slurm.run_state import FILE_NAME, RunRecord, RunState
from dray.jobs.slurm.script import batch_script

# --- snapshot ----------------------------------------------------------------------------------------------------

# A copy of the code beside the job file, so that what is edited after a submission does not reach the job.
#
# Copied is the folder of the job file, with what is below it. Left out are hidden files and folders (a
# repository's
# own, virtual environments, caches), `__pycache__`, `outputs/` and the run's folder. A link to a file becomes a
# copy of the file, a link to a folder a link to that same folder: data sets are often linked so.

MAX_SNAPSHOT_BYTES = 256 << 20
MAX_SNAPSHOT_FILES = 10_000
_LEFT_OUT = frozenset(("__pycache__", "outputs"))


def take_snapshot(job_file: Path, target: Path, run_folder: Path) -> Path:
    """Copy the folder of `job_file` to `target`, in the place of what is there; returns the job file in it.

    Raises:
        ConfigError: there is more than `MAX_SNAPSHOT_BYTES` or `MAX_SNAPSHOT_FILES` files: that is not only code.
    """
    source = job_file.parent.resolve()
    found = _within_bounds(source, _entries(source, run_folder.resolve()))
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
    """What is copied, a folder before its content."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _LEFT_OUT or path.resolve() == run_folder:
            continue
        if path.is_dir():
            yield path
            if not path.is_symlink():
                yield from _entries(path, run_folder)
        elif path.is_file():  # no sockets, pipes or links that lead nowhere
            yield path


def _within_bounds(source: Path, entries: Iterable[Path]) -> list[Path]:
    found, files, size = [], 0, 0
    for path in entries:
        found.append(path)
        if not path.is_dir():
            files += 1
            size += path.stat().st_size
        if files > MAX_SNAPSHOT_FILES or size > MAX_SNAPSHOT_BYTES:
            allowed = (
                f"{source} has more than {MAX_SNAPSHOT_FILES} files, or than {MAX_SNAPSHOT_BYTES >> 20} MiB: "
                "keep data elsewhere, link its folder, or set it to false"
            )
            raise ConfigError("slurm.snapshot", True, allowed)
    return found


# --- submit ------------------------------------------------------------------------------------------------------

_ELSEWHERE = ("-p", "--partition", "-M", "--cluster")
"""Options of sbatch that choose another partition or cluster than `slurm.partition` does."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What is to be submitted, decided and checked; nothing is written yet.

    Attributes:
        record: of the run as it will be; None if it has finished, and nothing is left to do.
        made: the folders that were made for the run, innermost first.
    """

    plan: Plan
    script: str
    record: RunRecord | None
    made: Sequence[Path] = ()

    def layout_lines(self) -> Iterator[str]:
        """What runs where, one line for each node."""
        names = [str(number) for number in range(self.plan.node_count)]
        placed = placements(self.plan, names)
        for name in names:
            shown = ["controller", "Redis"] if name == names[0] else []
            for each in placed:
                if name in each.nodes:
                    spanned = "" if name == each.node else ", spanned"
                    gpus = f" (GPU {','.join(map(str, each.gpus))})" if each.gpus else ""
                    shown.append(f"{each.name}{spanned}{gpus}")
            yield f"node {name}: {', '.join(shown)}"


def with_options(config: JobConfig, options: Mapping[str, Any], nodes: int | None = None) -> JobConfig:
    """`config` with keys of `[slurm]` replaced: lists and tables are added to, the others take the new value.

    Args:
        options: what is None is left as it is.
        nodes: how many there are in all; those that the policy does not take are for rollouts.

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
    checked = parse_job({**config.model_dump(mode="json"), "slurm": table})
    if nodes is None:
        return checked
    assert checked.slurm is not None
    rollout_nodes = rollout_nodes_of(nodes, checked.slurm.policy_nodes)
    return with_options(checked, {"rollout_nodes": rollout_nodes})


def prepare(config: JobConfig, job_file: Path, *, resume: bool, make: bool = False) -> Submission:
    """Decide everything about a submission.

    Args:
        make: make the run's folder, so that no other run that starts at the same time has it, too.

    Raises:
        ConfigError: something does not fit, or the folder is another run's.
    """
    table = config.slurm or SlurmTable()
    layout = layout_of(config)
    made: Sequence[Path] = ()
    if make and not resume:
        root, made = make_run_folder(lambda: run_folder(config, resume=False), new=config.job.output is None)
    else:
        root = run_folder(config, resume=resume)
    with ExitStack() as undo:
        undo.callback(remove_empty, made)
        record = _record(root, table.retries, resume=resume)
        plan = Plan(
            config=config,
            job_file=_code_folder(root) / job_file.name if table.snapshot else job_file.absolute(),
            run_folder=root,
            secret=secrets.token_bytes(32),
            policy=layout.policy,
            rollout=layout.rollout,
            interface=table.interface,
            retries=table.retries,
            environment=table.environment,
        )
        submission = Submission(plan, batch_script(plan), record, made)
        undo.pop_all()
        return submission


def submit(submission: Submission, job_file: Path, options: RunOptions | None = None) -> int:
    """Write the run's folder and submit its script; returns Slurm's number of the job.

    A folder of a run that Slurm does not take is removed again, if it was made here.

    Args:
        options: what the run was submitted with; kept in its folder.

    Raises:
        ConfigError: the code cannot be copied, or the cluster does not have as many nodes.
        SlurmError: Slurm does not take it.
    """
    assert submission.record is not None
    plan, root = submission.plan, submission.plan.run_folder
    _check_node_count(plan)
    made = submission.made or make_run_folder(lambda: root, new=False)[1]
    is_new = bool(made)
    os.close(open_own_folder(root, KEY))
    previous = RunRecord.read(root) if _was_submitted(root) else None
    try:
        plan.write()
        if plan.job_file != job_file.absolute():
            take_snapshot(job_file, plan.job_file.parent, root)
        script = plan.path.with_name("job.sh")
        write_whole(script, submission.script.encode())
        cancel_marker(root).unlink(missing_ok=True)
        # Before Slurm has it: the job may begin at once.
        submission.record.write(root)
        number = scheduler.submit(script)
    except BaseException:
        if is_new:
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
    """The folder that the run is to have, absolute; it need not be there.

    Raises:
        ConfigError: it is an earlier run's and this is another one, or there is no run to go on with.
    """
    needs = "must have the folder of a run that was submitted before"
    root = choose_folder(config, resume=resume, used=_is_used, resumable=(_was_submitted,), needs=needs)
    if resume and not _is_used(root):
        raise ConfigError("--resume", str(root), RESUME_NEEDS, f"cannot go on in {root}")
    return root


def _was_submitted(root: Path) -> bool:
    return (root / FILE_NAME).exists()


def _is_used(root: Path) -> bool:
    return _was_submitted(root) or has_metrics(root)


def _record(root: Path, retries: int, *, resume: bool) -> RunRecord | None:
    """The run's record as it is to be, None if the run has finished.

    Raises:
        ConfigError: a job of this run waits or runs.
    """
    if not resume or not _was_submitted(root):
        return RunRecord(RunState.SUBMITTED, retries)
    if RunRecord.read(root).state is RunState.FINISHED:
        return None
    if (number := submitted_job(root)) in scheduler.waiting_or_running():
        allowed = f"must be a run whose job is over; scancel {number} ends this one's"
        raise ConfigError("--resume", str(root), allowed, f"cannot go on in {root}")
    refuse_folder_in_use(root)
    record = read_settled(root, retries)
    return None if record.state is RunState.FINISHED else record.resume(retries)


def _check_node_count(plan: Plan) -> None:
    """Refuse a job that would wait for ever, for more nodes than its partition has."""
    table = plan.config.slurm or SlurmTable()
    if "SBATCH_PARTITION" in os.environ or any(each.startswith(_ELSEWHERE) for each in table.sbatch_args):
        return
    count = scheduler.partition_nodes(table.partition)
    if count is not None and plan.node_count > count:
        partition = f"partition {table.partition}" if table.partition else "the default partition"
        raise ConfigError("--nodes", plan.node_count, f"at most {count}, all that {partition} has")


def _code_folder(root: Path) -> Path:
    return root / ".slurm" / "code"


def _job_id_file(root: Path) -> Path:
    return root / ".slurm" / "job_id"
