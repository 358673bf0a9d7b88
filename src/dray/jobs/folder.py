"""The description of a job that every process reads, and the layout of the output folder."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dray.errors import ConfigError
from dray.files import read_private_file, write_json
from dray.jobs.config import JobConfig


@dataclass(frozen=True, slots=True)
class JobFolder:
    """The layout of an output folder. A run that takes several attempts has a folder of logs for each."""

    root: Path
    attempt: str | None = None

    @property
    def logs(self) -> Path:
        return (self.root if self.attempt is None else self.root / "parts" / self.attempt) / "logs"

    @property
    def newest_logs(self) -> Path:
        """The folder of logs of the run, of its newest attempt if it takes several."""
        return self.latest / "logs" if self.latest.is_dir() else self.logs

    @property
    def latest(self) -> Path:
        """A symbolic link to the folder of the newest attempt."""
        return self.root / "latest"

    @property
    def run(self) -> Path:
        """Exists while the job runs, for its owner only: secrets, sockets, addresses."""
        return self.root / ".run"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    @property
    def spec(self) -> Path:
        return self.run / "job.json"

    @property
    def controller_address(self) -> Path:
        return self.run / "controller.json"

    @property
    def head_address(self) -> Path:
        """Where the job's other nodes find its supervisor."""
        return self.run / "head.json"

    @property
    def outcome(self) -> Path:
        """The last status of the job, written by the controller when the outcome is decided and at its end."""
        return self.run / "outcome.json"

    @property
    def group_epoch(self) -> Path:
        """The policy group's newest epoch, and how many payloads were committed before it."""
        return self.run / "group_epoch.json"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def record(self) -> Path:
        """What ran, with which configuration and which packages; see `write_run_record`."""
        return self.root / "run.json"

    @property
    def trace(self) -> Path:
        """The folder with the stages of payloads, a file or two of each process."""
        return self.root / "trace"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"


_WRITTEN_AS_THEY_ARE = ("redis_url", "job_id", "resume", "first_work_item", "chosen_token")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job as its processes see it. Holds the secret: it is kept in memory and in one file of mode 0600.

    Attributes:
        chosen_token: the controller's token if the user has chosen one.
    """

    config: JobConfig
    job_file: Path
    folder: JobFolder
    secret: bytes = field(repr=False)
    redis_url: str = field(repr=False)
    job_id: str
    resume: bool
    first_work_item: int
    chosen_token: str | None = field(default=None, repr=False)

    @property
    def token(self) -> str:
        """What the controller asks for; unless chosen it follows from the secret, and does not disclose it."""
        if self.chosen_token is not None:
            return self.chosen_token
        return hmac.new(self.secret, b"dray controller token", hashlib.sha256).hexdigest()

    def write(self) -> None:
        """Write to the folder's `spec`, readable by the owner only."""
        document = {
            # Without the configured folder, which `folder` stands for: its name need not be text.
            "config": self.config.model_dump(mode="json", exclude={"job": {"output"}}),
            "job_file": str(self.job_file),
            "output": str(self.folder.root),
            "secret": self.secret.hex(),
            **{name: getattr(self, name) for name in _WRITTEN_AS_THEY_ARE},
        }
        write_json(self.folder.spec, document, mode=0o600)

    @classmethod
    def read(cls, path: Path) -> JobSpec:
        """Read what `write` wrote.

        Raises:
            FileNotFoundError: there is none.
            ConfigError: another user may have written or read it.
        """
        document = json.loads(read_private_file(path, "the description of the job"))
        return cls(
            config=JobConfig.model_validate(document["config"]),
            job_file=Path(document["job_file"]),
            folder=JobFolder(Path(document["output"])),
            secret=bytes.fromhex(document["secret"]),
            **{name: document[name] for name in _WRITTEN_AS_THEY_ARE},
        )


def finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """`values` for JSON, which has no NaN and no infinity: these become None, which is written as null."""
    return {name: None if value is None or not math.isfinite(value) else value for name, value in values.items()}


def short_path(path: Path) -> str:
    """`path` as people are shown it: relative where it lies below the current folder."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


# --- options -----------------------------------------------------------------------------------------------------

OPTIONS_NAME = "options.json"
"""The file in the output folder with the `RunOptions`, for its owner only."""

# Their values may hold a password.
_NOT_SHOWN = ("redis.", "slurm.environment", "rollout.args", "policy.args")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run was started with on the command line. It may hold secrets of the user: it is not for a log.

    A run that is resumed has the same options, except for those that are given again.

    Attributes:
        job_file: absolute.
        job_text: the content of the job file at that time.
        settings: each --set, as table.key=value; options such as --log-level are among them under their keys.
        slurm: options of `dray slurm submit` that were given, by the key of [slurm] that they set, and nodes.
    """

    job_file: Path
    job_text: str = field(default="", repr=False)
    settings: tuple[str, ...] = field(default=(), repr=False)
    slurm: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, root: Path) -> RunOptions | None:
        """What `write` wrote to the output folder `root`, None if that has nothing of the kind.

        Raises:
            ConfigError: the file may be another user's doing, or is damaged.
        """
        path = root / OPTIONS_NAME
        try:
            text = read_private_file(path, "--resume")
        except FileNotFoundError:
            return None
        try:
            document = json.loads(text)
            return cls(
                job_file=Path(document["job_file"]),
                job_text=str(document["job_text"]),
                settings=tuple(map(str, document["settings"])),
                slurm=dict(document["slurm"]),
            )
        except (ValueError, TypeError, KeyError) as error:
            allowed = f"the options of a run, as this version writes them ({type(error).__name__})"
            raise ConfigError("--resume", str(path), allowed) from None

    def write(self, root: Path) -> None:
        """Write to the output folder `root`, whole or not at all, readable by the owner only."""
        write_json(root / OPTIONS_NAME, {**asdict(self), "job_file": str(self.job_file)}, mode=0o600)

    def over(self, kept: RunOptions) -> RunOptions:
        """These options, and those of `kept` that they do not replace."""
        return replace(
            self,
            settings=(*_without(kept.settings, map(_key, self.settings)), *self.settings),
            slurm={**kept.slurm, **self.slurm},
        )

    def kept_lines(self, kept: RunOptions) -> Iterator[str]:
        """The lines about the options of `kept` that apply beside these."""
        settings = _without(kept.settings, map(_key, self.settings))
        shown = [_shown(_key(each), each.partition("=")[2].strip()) for each in settings]
        shown += [_shown(f"slurm.{key}", value) for key, value in kept.slurm.items() if key not in self.slurm]
        if shown:
            yield f"options kept from the start of the run: {', '.join(shown)}"
        if kept.job_text != self.job_text:
            yield f"{short_path(self.job_file)} has changed since the start of the run; its new content applies"


def _key(setting: str) -> str:
    return setting.partition("=")[0].strip()


def _without(settings: Iterable[str], keys: Iterable[str]) -> list[str]:
    replaced = set(keys)
    return [setting for setting in settings if _key(setting) not in replaced]


def _shown(key: str, value: object) -> str:
    return key if key.startswith(_NOT_SHOWN) else f"{key}={value}"
