"""Options with which every command that takes a job file changes it."""

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

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Override a key of the job file, for example policy.batch_size=32; may be given several times.",
    ),
]
LogLevelOption = Annotated[
    str | None,
    typer.Option(
        "--log-level",
        metavar="debug|info|warning|error",
        help="How much the processes of the job log, the supervisor included; by default job.log_level of the job "
        "file, else info.",
    ),
]


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A job as a command asks for it.

    Attributes:
        draft: what the job file and the options say together, with the mistakes in it.
        options: what was given on the command line, and kept from the start of the run if it is resumed.
        lines: what to tell the user about options that were kept.
    """

    draft: JobDraft
    options: RunOptions
    lines: tuple[str, ...] = ()

    @property
    def config(self) -> JobConfig:
        """What the job file and the options say together.

        Raises:
            ConfigError: a key or a value is not allowed; every mistake is named.
        """
        return self.draft.checked()

    def resumed(self, root: Path) -> Self:
        """The same for the run in the folder `root`, with the options that it was started with under those given.

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
    """What a job file says with the options of a command; `output` and `log_level` have the last word.

    Args:
        slurm: options for keys of [slurm]; None for those that were not given. They are noted and not applied.

    Raises:
        ConfigError: the file cannot be read, or the name of the folder is not allowed.
    """
    given = [*(settings or []), *([f"job.log_level={log_level}"] if log_level is not None else [])]
    draft = draft_job(job, given)
    if output is not None:
        if not output:
            raise ConfigError("--output", output, "the name of a folder")
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
