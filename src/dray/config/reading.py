"""From the text of a job file to a `JobConfig`, or to one line that says what is wrong with it.

The line names the key, the value found and what would have been right. Unknown keys are errors.
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dray.config.tables import LARGEST, TABLES, JobConfig, Table, check_together
from dray.errors import ConfigError

_DEEPEST = 64
_LONGEST_SHOWN = 400
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class Unshown:
    """Stands for a value that is not there, or cannot be shown as it is."""

    def __init__(self, words: str) -> None:
        self._words = words

    def __repr__(self) -> str:
        return self._words


def load_job(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read the job file at `path`, apply `overrides` (each ``"table.key=value"``) and check everything.

    Raises:
        ConfigError: the file cannot be read or is not TOML, or a key or value is not allowed.
    """
    try:
        document = _toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("job file", str(path), f"a readable TOML file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError("job file", str(path), "a TOML file in UTF-8") from error
    except _NotToml as error:
        raise ConfigError("job file", str(path), f"valid TOML ({error})") from error
    for override in overrides:
        _apply_override(document, override)
    return parse_job(document)


def parse_job(document: Mapping[str, Any]) -> JobConfig:
    """Check `document`, the content of a job file.

    Raises:
        ConfigError: for the first key or value that is not allowed.
    """
    _check_plain(document, [])
    try:
        config = JobConfig.model_validate(dict(document))
    except ValidationError as error:
        raise _config_error(error) from error
    check_together(config)
    return config


class _NotToml(Exception):
    """A text is not TOML; says why."""


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise _NotToml("it is nested too deeply") from error
    except ValueError as error:  # besides its own errors, those of numbers with too many digits
        raise _NotToml(_shortened(str(error))) from error


def _check_plain(value: Any, location: Sequence[str]) -> None:
    """Only what reaches the processes of a job as it is: they get the configuration as JSON."""
    if len(location) > _DEEPEST:
        raise ConfigError(_dotted(location), Unshown("(a value)"), f"tables and lists go {_DEEPEST} deep at most")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_plain(inner, [*location, str(name)])
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_plain(inner, [*location, str(index)])
    elif isinstance(value, int) and not -LARGEST - 1 <= value <= LARGEST:
        shown = Unshown(f"(an integer of {value.bit_length()} bits)")
        raise ConfigError(_dotted(location), shown, "integers have at most 64 bits")
    elif len(location) <= 2:  # the keys of tables have types of their own
        return
    elif isinstance(value, datetime.date | datetime.time):
        raise ConfigError(_dotted(location), value.isoformat(), "a date or time is written as text, in quotes")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(_dotted(location), value, "numbers are finite")


def _apply_override(document: dict[str, Any], override: str) -> None:
    try:
        override.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("--set", _shown(override), "text in UTF-8") from error
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or len(names) < 2 or not all(names):
        raise ConfigError("--set", _shown(override), "table.key=value, for example job.lane=tcp")
    table = document
    for depth, name in enumerate(names[:-1], start=1):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(
                "--set", _shown(override), f"table.key=value; {_dotted(names[:depth])} is not a table"
            )
    table[names[-1]] = _override_value(text.strip())


def _override_value(text: str) -> Any:
    """`text` as a TOML value, or as a plain string where it is none: ``tcp`` needs no quotes."""
    try:
        parsed = _toml(f"value = {text}")
    except _NotToml:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _config_error(error: ValidationError) -> ConfigError:
    """The first of pydantic's errors as a `ConfigError`."""
    first = error.errors(include_url=False, include_context=False)[0]
    location = [str(part) for part in first["loc"] if part != "[key]"]
    key, value = _dotted(location), _shown(first["input"])
    if first["type"] == "extra_forbidden":
        parent = _dotted(location[:-1])
        known = sorted(_table_at(location[:-1]).model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        where = f"[{parent}]" if parent else "a job file"
        return ConfigError(key, value, f"unknown key{hint}; {where} has {', '.join(known)}")
    if first["type"] == "missing":
        value = Unshown("(missing)")
    return ConfigError(key, value, f"must be {_allowed(location)}")


def _dotted(location: Sequence[str]) -> str:
    """The key at `location` as TOML writes it, in one line."""
    shown = [part if _BARE_KEY.fullmatch(part) else json.dumps(part) for part in location]
    return _shortened(".".join(shown))


def _shown(value: Any) -> Any:
    """`value`, or what stands for it where it would fill a screen."""
    words = repr(value)
    return value if len(words) <= _LONGEST_SHOWN else Unshown(_shortened(words))


def _shortened(words: str) -> str:
    return words if len(words) <= _LONGEST_SHOWN else f"{words[:_LONGEST_SHOWN]}…"


def _allowed(location: Sequence[str]) -> str:
    """What the sentence of the key at `location` allows."""
    table = _table_at(location[:1]) if len(location) > 1 else JobConfig
    name = location[1] if len(location) > 1 else location[0]
    return table.model_fields[name].description or "a valid value"


def _table_at(location: Sequence[str]) -> type[Table]:
    return TABLES[location[0]] if location else JobConfig
