"""What a ring does when it is full, and what it keeps."""

from __future__ import annotations

from typing import Final, Literal, get_args

from dray.errors import ConfigError
from dray.ring.layout import checked_int

OnFull = Literal["block", "error", "overwrite"]
"""Wait for a slot, raise at once, or drop the oldest payload that nobody is reading."""

Retain = Literal["unread", "newest"]
"""Keep each payload until it is consumed, or keep the one committed last."""

MAX_READERS: Final = 64


def check_policy(slots: int, on_full: str, readers: int, retain: str) -> None:
    """Raise `ConfigError` unless these go together; `SharedRingBuffer` says what they mean."""
    checked_int("readers", readers, 1, MAX_READERS)
    for key, value, allowed in (("on_full", on_full, get_args(OnFull)), ("retain", retain, get_args(Retain))):
        if value not in allowed:
            raise ConfigError(key, value, f"one of {', '.join(allowed)}")
    if retain == "newest" and slots < 2:
        raise ConfigError("slots", slots, 'at least 2 with retain = "newest"')
    if retain == "newest" and on_full == "overwrite":
        raise ConfigError("on_full", on_full, 'block or error with retain = "newest", which drops by itself')
