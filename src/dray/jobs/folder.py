"""The description of a job that every process reads, and the layout of the output folder."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dray.jobs.config import JobConfig
from dray.jobs.files import read_private_file, write_json


@dataclass(frozen=True, slots=True)
class JobFolder:
    """The layout of an output folder. A run that takes several attempts has a folder of logs for each."""

    root: Path
    attempt: str | None = None

    @property
    def logs(self) -> Path:
        return (self.root if self.attempt is None else self.root / "parts" / self.attempt) / "logs"

    @property
    def latest(self) -> Path:
        """A link to the folder of the newest attempt."""
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
    def summary(self) -> Path:
        return self.root / "summary.json"


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
            "redis_url": self.redis_url,
            "job_id": self.job_id,
            "resume": self.resume,
            "first_work_item": self.first_work_item,
            "chosen_token": self.chosen_token,
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
            redis_url=document["redis_url"],
            job_id=document["job_id"],
            resume=document["resume"],
            first_work_item=document["first_work_item"],
            chosen_token=document["chosen_token"],
        )


def finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """`values` for JSON, which has no NaN and no infinity: these become None, which is written as null."""
    return {name: None if value is None or not math.isfinite(value) else value for name, value in values.items()}


def short_path(path: Path) -> str:
    """`path` as people are shown it: relative where it lies below the current folder."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
