"""What a run was started with on the command line: `options.json` in its output folder, for its owner only.

```
job_file   the job file, absolute
job_text   its content at that time
settings   each --set, as table.key=value; options such as --log-level are among them under the key that they set
slurm      options of dray slurm submit, by the key of [slurm] that they set, and nodes
```

A run that is resumed has the same options, except for those that are given again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dray.errors import ConfigError
from dray.jobs.files import read_private_file, write_json
from dray.jobs.folder import short_path

FILE_NAME = "options.json"
_KEY = "--resume"
# Their values may hold a password.
_NOT_SHOWN = ("redis.", "slurm.environment", "rollout.args", "policy.args")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of one run. They may hold secrets of the user: no part of them is for a log.

    Attributes:
        slurm: without those that were not given.
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
        path = root / FILE_NAME
        try:
            text = read_private_file(path, _KEY)
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
            raise ConfigError(_KEY, str(path), allowed) from None

    def write(self, root: Path) -> None:
        """Write to the output folder `root`, whole or not at all, readable by the owner only."""
        write_json(root / FILE_NAME, {**asdict(self), "job_file": str(self.job_file)}, mode=0o600)

    def over(self, kept: RunOptions) -> RunOptions:
        """These options, and those of `kept` that they do not replace."""
        return replace(
            self,
            settings=(*_without(kept.settings, map(_key, self.settings)), *self.settings),
            slurm={**kept.slurm, **self.slurm},
        )

    def kept_lines(self, kept: RunOptions) -> Iterator[str]:
        """What to tell the user about the options of `kept` that apply beside these."""
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
