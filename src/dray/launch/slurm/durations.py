"""Slurm's way to write how long something may take."""

from __future__ import annotations

import re

from dray.errors import ConfigError

_FORM = re.compile(r"(?:(?P<days>\d{1,4})-)?(?P<hours>\d{1,4}):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")
ALLOWED = 'a time longer than nothing as "HH:MM:SS" or "D-HH:MM:SS"'


def parse_duration(key: str, text: str) -> int:
    """The seconds that ``"HH:MM:SS"`` or ``"D-HH:MM:SS"`` stands for.

    Raises:
        ConfigError: it is not of that form, or nothing; it names `key`.
    """
    found = _FORM.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ConfigError(key, text, ALLOWED)
    return total


def format_duration(seconds: int) -> str:
    """`seconds` as Slurm's options take them, e.g. ``"01:30:00"`` or ``"1-00:00:00"``."""
    days, rest = divmod(seconds, 24 * 3600)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock
