"""The controller's token from a file, so that it stays the same over runs: `controller.token_file`."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dray.errors import ConfigError
from dray.jobs.files import read_private_file

MIN_TOKEN_BYTES = 16
MAX_TOKEN_BYTES = 512
_KEY = "controller.token_file"
# What an Authorization header carries as it is.
_TOKEN = re.compile(rb"[!-~]+")


def token_from_file(path: Path) -> str:
    """The token in the file at `path`; where there is no file, one is made, with mode 600 and a fresh token.

    Raises:
        ConfigError: the file is not for its owner only, has no token of this kind, or cannot be made.
    """
    path = path.absolute()
    try:
        content = read_private_file(path, _KEY)
    except FileNotFoundError:
        with _fresh_file(path) as partial, suppress(FileExistsError):  # the token of another process is used
            os.link(partial, path)
        content = _read_created(path)
    return _token_in(content, path)


def check_token_file(path: Path) -> None:
    """Make sure that `token_from_file` would give a token; no file is made.

    Raises:
        ConfigError: it would not.
    """
    path = path.absolute()
    try:
        content = read_private_file(path, _KEY)
    except FileNotFoundError:
        with _fresh_file(path):
            return
    _token_in(content, path)


def _token_in(content: bytes, path: Path) -> str:
    token = content.strip()
    if not MIN_TOKEN_BYTES <= len(token) <= MAX_TOKEN_BYTES or not _TOKEN.fullmatch(token):
        allowed = f"a file with one token of {MIN_TOKEN_BYTES} to {MAX_TOKEN_BYTES} printable ASCII characters"
        raise ConfigError(_KEY, str(path), allowed)
    return token.decode()


@contextmanager
def _fresh_file(path: Path) -> Iterator[Path]:
    """A whole file with a fresh token in the folder of `path`, which is removed at the end of the block."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(f"{secrets.token_hex(32)}\n")
            yield partial
        finally:
            partial.unlink()
    except OSError as error:
        allowed = f"a file that exists, or one that can be made ({error.strerror})"
        raise ConfigError(_KEY, str(path), allowed) from error


def _read_created(path: Path) -> bytes:
    try:
        return read_private_file(path, _KEY)
    except FileNotFoundError as error:
        raise ConfigError(_KEY, str(path), "a file that stays where it is; it was removed again") from error
