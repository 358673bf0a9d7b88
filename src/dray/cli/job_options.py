"""The options by which a command changes the job file, the same for every command that reads one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from dray.errors import ConfigError
from dray.jobs.config import JobConfig
from dray.jobs.folder import RunOptions
from dray.jobs.job_file import JobDraft, draft_job
from dray.text import text_of

JobArgument = Annotated[Path, typer.Argument(help="The job file, TOML.", show_default=False)]
OutputOption = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Output folder. Default: a new one under outputs/<job name>/.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Override a key of the job file, for example policy.batch_size=32. Repeatable.",
    ),
]
LogLevelOption = Annotated[
    str | None,
    typer.Option(
        "--log-level",
        metavar="debug|info|warning|error",
        help="Log level of the job's processes, the supervisor included. Default: job.log_level, else info.",
    ),
]


@dataclass(frozen=True, slots=True)
class JobRequest:
    """The job file of a command, with the command's options.

    Attributes:
        draft: the job file with the options applied, and the mistakes in it.
        options: the options of the command line; in a resumed run, also those that the run was started with.
        lines: messages to the user about options that were kept.
    """

    draft: JobDraft
    options: RunOptions
    lines: tuple[str, ...] = ()

    @property
    def config(self) -> JobConfig:
        """The job file with the options applied.

        Raises:
            ConfigError: a key or a value is not allowed; the error has every mistake.
        """
        return self.draft.checked()

    def resumed(self, root: Path) -> Self:
        """This request for the run in the folder `root`: options given now override those of its start.

        Raises:
            ConfigError: the options of the run, or its job file, cannot be trusted or read.
        """
        kept = RunOptions.read(root)
        if kept is None:
            return replace(self, draft=_with_output(self.draft, text_of(root)))
        options = self.options.over(kept)
        draft = _with_output(draft_job(options.job_file, options.settings), text_of(root))
        return replace(self, draft=draft, options=options, lines=tuple(self.options.kept_lines(kept)))


def read_job(
    job: Path,
    settings: list[str] | None,
    output: str | None,
    log_level: str | None,
    slurm: Mapping[str, Any] | None = None,
) -> JobRequest:
    """Read a job file and apply the options of a command; `output` and `log_level` override `settings`.

    Args:
        slurm: options for keys of [slurm], None for those that were not given. They are recorded, not applied.

    Raises:
        ConfigError: the file cannot be read, or the name of the folder is not allowed.
    """
    given = [*(settings or []), *([f"job.log_level={log_level}"] if log_level is not None else [])]
    draft = draft_job(job, given)
    if output is not None:
        if not output:
            raise ConfigError("--output", output, "must be the name of a folder")
        draft = _with_output(draft, text_of(output))
    options = RunOptions(
        job_file=job.absolute(),
        job_text=job.read_text(encoding="utf-8"),
        settings=tuple(given),
        slurm={key: value for key, value in (slurm or {}).items() if value not in (None, [], {})},
    )
    return JobRequest(draft, options)


def _with_output(draft: JobDraft, output: str) -> JobDraft:
    job = draft.config.job.model_copy(update={"output": output})
    return replace(draft, config=draft.config.model_copy(update={"job": job}))
