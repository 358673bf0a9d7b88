"""What an error of redis-py means: the server cannot serve at the moment, or it will not.

redis-py has exception classes for some of the error codes with which a server begins such an answer. The others,
and the code inside the error of a script, are found in the answer itself: the code is a field of the protocol.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

TEMPORARY_CODES: Final = frozenset(
    (
        "READONLY",  # a replica, or a server that has become one
        "MASTERDOWN",
        "LOADING",
        "CLUSTERDOWN",
        "TRYAGAIN",
        "UNBLOCKED",  # a command that blocked while the server became a replica
        "NOREPLICAS",
        "MISCONF",  # the server cannot save its data
        "OOM",
        "BUSY",  # a script blocks the server
    )
)
"""Codes of answers that say: not now."""

# A class comes before its own base class.
_CODES: Final[Mapping[type[RedisError], str]] = MappingProxyType(
    {
        ReadOnlyError: "READONLY",
        MasterDownError: "MASTERDOWN",
        BusyLoadingError: "LOADING",
        ClusterDownError: "CLUSTERDOWN",
        TryAgainError: "TRYAGAIN",
        OutOfMemoryError: "OOM",
        MovedError: "MOVED",
        AskError: "ASK",
        NoPermissionError: "NOPERM",
    }
)
# Up to version 6, the error of a script quotes that of its command, with a minus sign before the code.
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -([A-Z]+)(?: |$)")
_FIRST_WORD = re.compile(r"([A-Z]+)(?: |$)")


def error_code(error: RedisError) -> str:
    """The code of the server's answer, such as ``"READONLY"``; empty if it has none, or if there was no answer."""
    found = next((code for kind, code in _CODES.items() if isinstance(error, kind)), "")
    if found or not isinstance(error, ResponseError):
        return found
    text = str(error)
    match = _IN_SCRIPT.search(text) or _FIRST_WORD.match(text)
    return match[1] if match else ""


def is_temporary(error: RedisError) -> bool:
    """Whether `error` is an answer that says: not now."""
    return error_code(error) in TEMPORARY_CODES


def answer_text(error: RedisError) -> str:
    """The server's answer with its code, which redis-py leaves out of the exceptions that it has classes for."""
    code, text = error_code(error), str(error)
    return text if not code or text.startswith(code) or _IN_SCRIPT.search(text) else f"{code} {text}"
