"""From the text of a job file to a `JobConfig`, or to an error with one line for each mistake in it.

A line names the key, the value found and what would have been right. Unknown keys are errors. A value that may
hold a credential is not shown: whatever stands where the URL of Redis belongs, any URL, text under an unknown key.
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from dray.errors import ConfigError
from dray.jobs.config import MAX_NUMBER, TABLES, JobConfig, Table, broken_rules
from dray.text import printable, printable_value, text_of

MAX_MISTAKES: Final = 50
"""Mistakes of one job file that are reported."""

_MAX_DEPTH = 64
_TRANSFERS = {"ucxx": "reference", "redis": "inline"}
"""Values of `job.payload_transfer`, as `job.transfer` was called, and their names now."""
_REDIS = ["redis"]
_URL_MARK = "://"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_Location = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JobDraft:
    """A job file as far as it can be used, and what is wrong with it.

    Attributes:
        notes: lines about keys that have another name now.
        config: the content of the file. In the place of a value with a mistake it has the default; a required key
            without a value is not there at all.
        mistakes: every mistake of the file.
        unusable: the keys with mistakes, and the required ones without a value, such as ``"policy.batch_size"``.
    """

    config: JobConfig
    mistakes: tuple[ConfigError, ...] = ()
    unusable: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def knows(self, *keys: str) -> bool:
        """Whether `config` has the values of the file under all these keys."""
        return self.unusable.isdisjoint(keys)

    def checked(self) -> JobConfig:
        """The configuration.

        Raises:
            ConfigError: keys or values are not allowed; all of them are named.
        """
        if self.mistakes:
            raise ConfigError.of(self.mistakes[:MAX_MISTAKES])
        return self.config


def load_job(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read the job file at `path`, apply `overrides` (each ``"table.key=value"``) and check everything.

    Raises:
        ConfigError: the file cannot be read or is not TOML, or keys or values are not allowed; all of them are
            named.
    """
    return draft_job(path, overrides).checked()


def draft_job(path: Path, overrides: Sequence[str] = ()) -> JobDraft:
    """The same, with what is usable of a file that has mistakes.

    Raises:
        ConfigError: the file cannot be read or is not TOML.
    """
    try:
        document = _toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"{path} cannot be read"
        raise ConfigError("job file", str(path), error.strerror or str(error), problem) from error
    except UnicodeDecodeError as error:
        raise ConfigError("job file", str(path), "must be text in UTF-8", f"{path} cannot be read") from error
    except _NotToml as error:
        raise ConfigError("job file", str(path), f"must be TOML; {error}", f"{path} cannot be read") from error
    mistakes = [mistake for override in overrides for mistake in _apply_override(document, override)]
    return _drafted(document, mistakes)


def parse_job(document: Mapping[str, Any]) -> JobConfig:
    """Check `document`, the content of a job file.

    Raises:
        ConfigError: keys or values are not allowed; all of them are named.
    """
    return _drafted(document, []).checked()


def _drafted(document: Mapping[str, Any], mistakes: list[ConfigError]) -> JobDraft:
    """Check `document`, of which `mistakes` are known already."""
    document, notes = _with_new_names(document)
    unfit = dict(_unfit_values(document, []))
    mistakes += unfit.values()
    wrong = set(unfit)
    try:
        config = JobConfig.model_validate(dict(document))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        # Where a value cannot be carried at all, that is what is wrong with its key.
        mistakes += [_mistake(each) for each in found if not _is_about(unfit, each["loc"])]
        wrong |= {tuple(map(str, each["loc"])) for each in found}
        config = _usable(document, wrong)
    unusable = frozenset(key for location in wrong for key in _keys_at(location))
    mistakes += broken_rules(config, unusable)
    return JobDraft(config, tuple(mistakes), unusable, notes)


def _with_new_names(document: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """`document` with the names that keys have now, and a line about each that had an earlier one."""
    job = document.get("job")
    if not isinstance(job, Mapping) or "payload_transfer" not in job or "transfer" in job:
        return document, ()
    job = dict(job)
    value = job.pop("payload_transfer")
    job["transfer"] = _TRANSFERS.get(value, value) if isinstance(value, str) else value
    name = "job.transfer"
    note = f"job.payload_transfer is read as {name}, its new name: {name} = {job['transfer']!r}"
    return {**document, "job": job}, (note,)


def _usable(document: Mapping[str, Any], wrong: Collection[_Location]) -> JobConfig:
    """What remains of `document` without what is `wrong` in it."""
    tables: dict[str, Any] = {}
    keys = {location[:2] for location in wrong}
    for name, model in TABLES.items():
        found = document.get(name, {})
        if (name,) in wrong or not isinstance(found, Mapping):
            found = {}
        right = {key: value for key, value in found.items() if (name, key) not in keys}
        if right or JobConfig.model_fields[name].is_required():
            tables[name] = model.model_construct(**right)
    return JobConfig.model_construct(**tables)


def _keys_at(location: _Location) -> Iterator[str]:
    """The keys of tables that a value at `location` has or is part of."""
    if len(location) > 1:
        yield ".".join(location[:2])
    elif location[0] in TABLES:
        yield from (f"{location[0]}.{key}" for key in TABLES[location[0]].model_fields)


class _NotToml(Exception):
    """A text is not TOML; the message has the reason."""


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise _NotToml("it is nested too deeply") from error
    except ValueError as error:  # besides its own errors, those of numbers with too many digits
        raise _NotToml(printable(str(error))) from error


def _unfit_values(value: Any, location: Sequence[str]) -> Iterator[tuple[_Location, ConfigError]]:
    """What does not reach the processes of a job as it is: they get the configuration as JSON."""
    here, key = tuple(location), _dotted(location)
    if len(location) > _MAX_DEPTH:
        yield (
            here,
            ConfigError(key, None, f"tables and lists go {_MAX_DEPTH} deep at most", "is nested too deeply"),
        )
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _unfit_values(inner, [*location, str(name)])
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unfit_values(inner, [*location, str(index)])
    elif isinstance(value, int) and not -MAX_NUMBER - 1 <= value <= MAX_NUMBER:
        problem = f"is an integer of {value.bit_length()} bits"
        yield here, ConfigError(key, None, "integers have at most 64 bits", problem)
    elif len(location) <= 2:  # the keys of tables have types of their own
        return
    elif isinstance(value, datetime.date | datetime.time):
        yield here, ConfigError(key, value.isoformat(), "a date or time is written as text, in quotes")
    elif isinstance(value, float) and not math.isfinite(value):
        yield here, ConfigError(key, value, "numbers are finite")


def _is_about(unfit: Mapping[_Location, ConfigError], location: Sequence[int | str]) -> bool:
    """Whether one of the `unfit` values is at `location`, or within what is there."""
    wanted = tuple(str(part) for part in location)
    return any(each[: len(wanted)] == wanted for each in unfit)


def _apply_override(document: dict[str, Any], override: str) -> Iterator[ConfigError]:
    """Put the value of `override` into `document`; what is wrong with it is yielded."""
    override = text_of(override)
    try:
        override.encode()
    except UnicodeEncodeError:
        yield _not_an_override(override, "must be text in UTF-8")
        return
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or len(names) < 2 or not all(names):
        yield _not_an_override(override, "must be TABLE.KEY=VALUE, for example job.lane=tcp")
        return
    table = document
    for depth, name in enumerate(names[:-1], start=1):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            allowed = f"must be TABLE.KEY=VALUE; {_dotted(names[:depth])} is not a table"
            yield _not_an_override(override, allowed)
            return
    table[names[-1]] = _override_value(text.strip())


def _not_an_override(override: str, allowed: str) -> ConfigError:
    key, equals, _ = override.partition("=")
    if not key.strip().startswith(_REDIS[0]) and _is_shown([], key):
        return ConfigError("--set", f"{key}=…" if equals else override, allowed)
    return ConfigError("--set", None, allowed, "is not allowed")


def _is_shown(location: Sequence[str], value: Any) -> bool:
    """Whether the `value` at `location` certainly holds no credential."""
    return location[:1] != _REDIS and _URL_MARK not in printable_value(value)


def _override_value(text: str) -> Any:
    """`text` as a TOML value, or as a plain string where it is none: ``tcp`` needs no quotes."""
    try:
        parsed = _toml(f"value = {text}")
    except _NotToml:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _mistake(error: Mapping[str, Any]) -> ConfigError:
    """One of pydantic's errors as a `ConfigError`."""
    location = [str(part) for part in error["loc"] if part != "[key]"]
    key = _dotted(location)
    if error["type"] == "extra_forbidden":
        parent = _dotted(location[:-1])
        known = sorted(_table_at(location[:-1]).model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        where = f"[{parent}]" if parent else "a job file"
        shown = isinstance(error["input"], bool | int | float)
        return _not_allowed(location, error["input"], f"unknown key{hint}; {where} has {', '.join(known)}", shown)
    allowed = f"must be {_allowed(location)}"
    if error["type"] != "missing":
        return _not_allowed(location, error["input"], allowed)
    if len(location) == 1:
        needed = [name for name, field in _table_at(location).model_fields.items() if field.is_required()]
        return ConfigError(f"[{key}]", None, f"the table needs {', '.join(needed)}", "is missing")
    return ConfigError(key, None, allowed, "is missing")


def _not_allowed(location: Sequence[str], value: Any, allowed: str, shown: bool = True) -> ConfigError:
    key = _dotted(location)
    if shown and _is_shown(location, value):
        return ConfigError(key, value, allowed)
    return ConfigError(key, None, allowed, "is not allowed")


def _dotted(location: Sequence[str]) -> str:
    """The key at `location` as TOML writes it, in one line."""
    hidden = ["(URL)" if _URL_MARK in part else part for part in location]
    shown = [part if _BARE_KEY.fullmatch(part) else json.dumps(part) for part in hidden]
    return printable(".".join(shown))


def _allowed(location: Sequence[str]) -> str:
    """What the sentence of the key at `location` allows."""
    table = _table_at(location[:1]) if len(location) > 1 else JobConfig
    name = location[1] if len(location) > 1 else location[0]
    return table.model_fields[name].description or "a valid value"


def _table_at(location: Sequence[str]) -> type[Table]:
    return TABLES[location[0]] if location else JobConfig
