"""From texts of the job file to what they name: the user's classes, and the rows of the data set.

``python -m dray.jobs.replica.entry_points`` checks all of it before the job starts, in a process of its own: no
code of the user's stays in the supervisor.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from dray.errors import ConfigError
from dray.files import write_json
from dray.forking import parent_only
from dray.jobs.api import PolicyTrainer, RolloutWorker
from dray.jobs.config import ENTRY_POINT_FORM, WORK_ITEMS_FORM, WorkTable
from dray.jobs.process import begin_process
from dray.jobs.replica.user_code import described_error, is_async
from dray.resources import Closing
from dray.text import path_of, printable, text_of

# --- classes -----------------------------------------------------------------------------------------------------


def load_entry_point(key: str, text: str, folder: Path) -> type[Any]:
    """Import the class that `text` names; a file is looked for in `folder`.

    Args:
        key: the job file's key, for the error.

    Raises:
        ConfigError: the module cannot be found or imported, or has no such class.
    """
    module, class_name = _load_module(key, text, folder, ENTRY_POINT_FORM)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = sorted(
            name for name, value in vars(module).items() if isinstance(value, type) and name[0] != "_"
        )
        names = ", ".join(classes) or "none"
        raise _unusable(key, text, f"{text.partition(':')[0]} has no class {class_name}, but {names}")
    return found


def load_object(key: str, text: str, folder: Path, form: str) -> Any:
    """Import whatever `text` names; a file is looked for in `folder`.

    Args:
        key: the job file's key, for the error.
        form: what the key allows, for the error.

    Raises:
        ConfigError: the module cannot be found or imported, or has nothing of that name.
    """
    module, name = _load_module(key, text, folder, form)
    if not hasattr(module, name):
        raise _unusable(key, text, f"{text.partition(':')[0]} has no {name}; must be {form}")
    return getattr(module, name)


def _load_module(key: str, text: str, folder: Path, form: str) -> tuple[ModuleType, str]:
    """The module that `text` names, and the name in it."""
    module_name, _, name = text.partition(":")
    if module_name.endswith(".py"):
        return _file(key, text, folder / path_of(module_name), form), name
    try:
        with parent_only():
            return importlib.import_module(module_name), name
    except (Exception, SystemExit) as error:
        raise _unusable(key, text, f"importing it raised {described_error(error, None)}") from error


def check_entry_points(worker: str | None, trainer: str | None, folder: Path, *, concurrency: int = 1) -> None:
    """Import both classes and see that they can be made, and called, as the runtime does it.

    Args:
        worker: None if it is not known: then the other one alone is checked.
        trainer: the same.
        concurrency: `rollout.concurrency`, which a worker with a plain `rollout` cannot have above 1.

    Raises:
        ConfigError: one cannot be imported, or does not fit; every mistake of both is named.
    """
    mistakes = []
    for key, text, contract in (
        ("rollout.worker", worker, RolloutWorker),
        ("policy.trainer", trainer, PolicyTrainer),
    ):
        if text is None:
            continue
        try:
            found = load_entry_point(key, text, folder)
        except ConfigError as error:
            mistakes.append(error)
        else:
            mistakes += [_unusable(key, text, reason) for reason in misfits(found, contract)]
            if contract is RolloutWorker and concurrency > 1 and not mistakes and not is_async(found, "rollout"):
                allowed = (
                    f"must be 1, as {found.__name__}.rollout() is a plain function, which works on one work item "
                    "at a time: make it an async function, or set rollout.replicas"
                )
                mistakes.append(ConfigError("rollout.concurrency", concurrency, allowed))
    if mistakes:
        raise ConfigError.of(mistakes)


def misfits(found: type[Any], contract: type[Any]) -> Iterator[str]:
    """What about the class `found` does not fit the Protocol `contract`, each in a few words.

    Nothing of the class is run. What cannot be known without that, such as the signature of a method in C, is
    taken to fit.
    """
    yield from _constructor_misfits(found)
    methods = {name: each for name, each in vars(contract).items() if inspect.isfunction(each) and name[0] != "_"}
    missing = [name for name in methods if not callable(getattr(found, name, None))]
    asynchronous = contract is RolloutWorker and is_async(found, "rollout")
    if missing:
        yield f"it lacks {', '.join(missing)}; the methods must be {', '.join(methods)}"
    for name, wanted in methods.items():
        if name not in missing:
            if is_async(found, name) and not (asynchronous and name in _MAY_BE_ASYNC):
                yield _async_misfit(contract, name)
            yield from _method_misfits(found, name, list(inspect.signature(wanted).parameters))


_MAY_BE_ASYNC = ("rollout", "load_weights")
"""Methods of an asynchronous worker that dray awaits."""


def _async_misfit(contract: type[Any], name: str) -> str:
    if contract is RolloutWorker and name in _MAY_BE_ASYNC:
        return (
            f"{name}() is an async function, and rollout() is not: make both async, or {name}() a plain function"
        )
    return f"{name}() is an async function, and dray does not await it: make it a plain function"


def _constructor_misfits(found: type[Any]) -> Iterator[str]:
    name = found.__name__
    if inspect.isabstract(found):
        yield f"{name} is abstract: it lacks {', '.join(sorted(found.__abstractmethods__))}"
    for signature, reason in _refusal(found, 0):
        yield f"{name}{signature} cannot be made without arguments: {reason}"


def _method_misfits(found: type[Any], name: str, parameters: list[str]) -> Iterator[str]:
    """Those of one method, which is called with `parameters`, `self` among them, by position."""
    method, static = getattr(found, name), inspect.getattr_static(found, name)
    if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
        yield f"{name}() is a generator, as it uses yield: return the value instead"
    takes_self = inspect.isfunction(static)
    if not takes_self and not isinstance(static, staticmethod | classmethod):
        return  # an object or a descriptor: it may be anything
    given = parameters if takes_self else parameters[1:]
    for signature, reason in _refusal(method, len(given)):
        yield f"{name}{signature} cannot be called with ({', '.join(given)}): {reason}"


def _refusal(function: Any, count: int) -> Iterator[tuple[inspect.Signature, str]]:
    """The signature, and why it cannot be called with `count` arguments by position; nothing if it may be."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return  # it cannot be known
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        yield inspect.Signature(plain), str(error)


def _file(key: str, text: str, path: Path, form: str) -> ModuleType:
    name = f"dray_job_{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    if not path.is_file():
        raise _unusable(key, text, f"there is no file {path}; must be {form}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made; siblings of the file are importable as in a script.
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        with parent_only():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _unusable(key, text, f"importing it raised {described_error(error, str(path))}") from error
    return module


def _unusable(key: str, text: str, reason: str) -> ConfigError:
    return ConfigError(key, text, printable(reason, 1000), f"= {text!r} cannot be used")


# --- rows --------------------------------------------------------------------------------------------------------

# Row i modulo the number of rows belongs to work item i. Every process that needs rows reads them by itself: of a
# file it keeps where each line begins, of an iterable the JSON text of each element.

KEY: Final = "work.items"
MAX_ROWS: Final = 10_000_000
"""Elements of an iterable, which are held in memory."""

MAX_ROW_BYTES: Final = 64 << 20
"""Bytes of one line of a file."""

_ROUNDS = 4


class FileRows:
    """The lines of a file, each of which is a JSON object: at least one. A row is another object each time.

    Args:
        text: the value in the job file, for errors.

    Raises:
        ConfigError: the file cannot be read, or has no line.
    """

    def __init__(self, text: str, path: Path) -> None:
        self._text = text
        self._path = path
        self._ends = array("Q")
        try:
            with path.open("rb") as lines:
                end = 0
                # In pieces: a file that is one line must not be held in memory.
                while line := lines.readline(MAX_ROW_BYTES):
                    end += len(line)
                    if not line.endswith(b"\n") and len(line) == MAX_ROW_BYTES:
                        number = len(self._ends) + 1
                        raise self._error(f"line {number} has more than {MAX_ROW_BYTES:,} bytes")
                    self._ends.append(end)
            if not self._ends:
                raise self._error(f"{path} is empty; it must have at least one line")
            self._file = path.open("rb")
        except OSError as error:
            reason = f"{path}: {error.strerror}; must be {WORK_ITEMS_FORM}"
            raise self._error(reason) from error

    def __len__(self) -> int:
        return len(self._ends)

    def row(self, number: int) -> Any:
        begin = self._ends[number - 1] if number else 0
        try:
            line = os.pread(self._file.fileno(), self._ends[number] - begin, begin)
            found = json.loads(line)
        except OSError as error:
            raise self._error(f"{self._path}, line {number + 1}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise self._error(f"{self._path}, line {number + 1} is not text in UTF-8") from error
        except (ValueError, RecursionError) as error:
            reason = f"{self._path}, line {number + 1} is not JSON ({error}); each line must be a JSON object"
            raise self._error(reason) from error
        if not isinstance(found, dict):
            kind = "null" if found is None else f"of type {type(found).__name__}"
            raise self._error(f"{self._path}, line {number + 1} is {kind}; each line must be a JSON object")
        return found

    def close(self) -> None:
        self._file.close()

    def _error(self, reason: str) -> ConfigError:
        return _unusable(KEY, self._text, reason)


class ObjectRows:
    """The elements of an iterable, as JSON texts: what a worker does with one does not reach the next one."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def row(self, number: int) -> Any:
        return json.loads(self._texts[number])

    def close(self) -> None:
        """There is no file."""


Rows = FileRows | ObjectRows


def open_rows(text: str, folder: Path) -> Rows:
    """The rows that `text` names; a file is looked for in `folder`. Lines of a file are read when they are needed.

    Raises:
        ConfigError: there is no such file or iterable, it has no rows, or an element is not what JSON can carry.
    """
    if text.endswith(".jsonl"):
        return FileRows(text, folder / path_of(text))
    return ObjectRows(list(_element_texts(text, load_object(KEY, text, folder, WORK_ITEMS_FORM))))


def check_rows(text: str, folder: Path) -> None:
    """See that every row can be read.

    Raises:
        ConfigError: one cannot; the message names the first.
    """
    with closing(open_rows(text, folder)) as rows:
        for number in range(len(rows)):
            rows.row(number)


class WorkItemRows(Closing):
    """The row of each work item.

    Args:
        table: ``[work]`` of the job file.
        folder: of the job file.
        seed: of the job; decides the order if rows are shuffled.

    Raises:
        ConfigError: as `open_rows`.
    """

    def __init__(self, table: WorkTable, folder: Path, seed: int) -> None:
        self._rows = None if table.items is None else open_rows(table.items, folder)
        self._shuffles = table.shuffle
        self._seed = seed

    def row(self, index: int) -> Any:
        """The row of work item `index`; None without a data set.

        Raises:
            ConfigError: it is not there any more.
        """
        if self._rows is None:
            return None
        epoch, number = divmod(index, len(self._rows))
        if self._shuffles:
            number = shuffled(number, len(self._rows), f"{self._seed}:{epoch}")
        return self._rows.row(number)

    def close(self) -> None:
        """Close the file; twice is fine."""
        if self._rows is not None:
            self._rows.close()


def shuffled(number: int, count: int, order: str) -> int:
    """The place of `number` in a permutation of 0 … `count` - 1 that depends on the text `order` alone.

    It takes no memory: a Feistel network permutes the numbers of so many bits, and is applied again to a result
    that is too large.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = number >> half, number & mask
        for turn in range(_ROUNDS):
            digest = hashlib.blake2b(f"{order}:{turn}:{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        number = left << half | right
        if number < count:
            return number


def _element_texts(text: str, found: Any) -> Iterator[str]:
    try:
        with parent_only():
            elements: Iterable[Any] = found() if callable(found) and not isinstance(found, Iterable) else found
            iterator = iter(elements)
    except (Exception, SystemExit) as error:
        allowed = "it must be an iterable, or a function without arguments that returns one"
        raise _unusable(KEY, text, f"{described_error(error, None)}; {allowed}") from error
    number = 0
    while True:
        try:
            with parent_only():
                element = next(iterator)
        except StopIteration:
            break
        except (Exception, SystemExit) as error:
            raise _unusable(KEY, text, f"row {number} raised {described_error(error, None)}") from error
        try:
            yield json.dumps(element, allow_nan=False, separators=(",", ":"))
        except Exception as error:  # the objects of a user raise whatever they like
            reason = f"row {number} is not what JSON can carry ({printable(str(error))})"
            raise _unusable(KEY, text, reason) from error
        number += 1
        if number > MAX_ROWS:
            reason = f"it has more than {MAX_ROWS:,} rows, which are held in memory; use a .jsonl file"
            raise _unusable(KEY, text, reason)
    if number == 0:
        raise _unusable(KEY, text, "it has no rows; there must be at least one")


# --- the check before a job starts -------------------------------------------------------------------------------


def main() -> int:
    """``FOLDER WORKER TRAINER CONCURRENCY ITEMS REPORT``: write to REPORT the parts of each mistake.

    The classes and the items may be empty text: they are not checked.
    """
    begin_process("check")
    worker, trainer, items = (text_of(sys.argv[number]) for number in (2, 3, 5))
    folder, concurrency, report = Path(sys.argv[1]), int(sys.argv[4]), Path(sys.argv[6])
    mistakes: list[ConfigError] = []
    try:
        check_entry_points(worker or None, trainer or None, folder, concurrency=concurrency)
    except ConfigError as error:
        mistakes += error.mistakes
    try:
        if items:
            check_rows(items, folder)
    except ConfigError as error:
        mistakes += error.mistakes
    parts = [{name: getattr(each, name) for name in ("key", "value", "allowed", "problem")} for each in mistakes]
    write_json(report, {"mistakes": parts})
    return 0


if __name__ == "__main__":
    sys.exit(main())
