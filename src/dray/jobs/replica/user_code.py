"""Calls of the user's classes: what such a call raises or returns wrongly is named as the user's own mistake.

Every call goes through `call_user` or `await_user`, and what it returns through `returned_payloads` or
`returned_arrays`, and `carried`, or `returned_metrics`. Their errors are one printable line that names the class,
the method, the part and what is allowed; the process then ends with the error's `exit_code`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from dray.errors import PayloadError
from dray.forking import parent_only
from dray.jobs.api import Rollout
from dray.jobs.exit_codes import ExitCode
from dray.jobs.messages.channel import GroupLostError
from dray.text import printable, printable_value

if TYPE_CHECKING:
    from dray.jobs.queue import RolloutEntry

MAX_REASON: Final = 800
"""Characters of the line about a user's mistake."""

_NOT_THE_USERS = (f"{Path(__file__).parents[1]}{os.sep}", "<frozen ")
"""What the file names of frames begin with that are of no use to a user."""

_ARRAYS = "it must return a mapping of names to arrays"
_METRICS = "it must return a mapping of metric names to numbers"


class UserCodeError(Exception):
    """A call of the user's class raised; the cause is its exception."""

    exit_code: ClassVar[ExitCode] = ExitCode.USER_CODE

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, MAX_REASON))


class UserValueError(UserCodeError):
    """A call of the user's class returned what cannot be used, and would do so again."""

    exit_code: ClassVar[ExitCode] = ExitCode.USER_VALUE


def make_user_object(found: type[Any]) -> Any:
    """An instance of the user's class.

    Raises:
        UserCodeError: its constructor raised.
    """
    with _user_code(found, f"{found.__name__}()"):
        return found()


def call_user(user: object, method: str, *arguments: object) -> Any:
    """Call a method of the user's object and return what it returns.

    Raises:
        UserCodeError: it raised, or would leave the interpreter.
        UserValueError: its code has not run, as what it returned is a coroutine or a generator.
        GroupLostError: it waited for another policy replica, which is gone.
    """
    with _user_code(type(user), f"{type(user).__name__}.{method}()"):
        found = getattr(user, method)(*arguments)
    kind = _unstarted(found)
    if kind:
        raise UserValueError(f"{call_name(user, method)} returned {kind}: it must not be async, nor use yield")
    return found


async def await_user(user: object, method: str, *arguments: object) -> Any:
    """Call a method of the user's object, which may be async, and return what it returns.

    Cancelling the calling task cancels the method.

    Raises:
        UserCodeError: it raised, or would leave the interpreter.
        UserValueError: its code has not run, as what it returned is a generator.
    """
    with _user_code(type(user), f"{type(user).__name__}.{method}()"):
        found = getattr(user, method)(*arguments)
        if inspect.isawaitable(found):
            found = await found
    kind = _unstarted(found)
    if kind:
        raise UserValueError(f"{call_name(user, method)} returned {kind}: it must not use yield")
    return found


def is_async(found: object, method: str) -> bool:
    """Whether `method` of the user's class or object is an async function."""
    return inspect.iscoroutinefunction(getattr(found, method, None))


def returned_arrays(user: object, method: str, found: object, where: str = "") -> dict[str, Any]:
    """The named arrays that `method` of `user` returned, whatever they hold.

    Args:
        where: what they were found in, for errors, such as ``"a list whose item 0 is "``.

    Raises:
        UserValueError: they are no mapping, or an empty one.
    """
    if not isinstance(found, Mapping):
        raise UserValueError(f"{call_name(user, method)} returned {where}{_kind(found)}: {_ARRAYS}")
    with _user_code(type(user), f"the mapping that {call_name(user, method)} returned"):
        arrays = dict(found)
    if not arrays:
        raise UserValueError(
            f"{call_name(user, method)} returned {where}an empty mapping: it must hold at least one array"
        )
    return arrays


@contextmanager
def carried(user: object, method: str) -> Iterator[None]:
    """Where arrays that `method` of `user` returned are packed: what cannot be is the user's mistake.

    Raises:
        UserValueError: a name, dtype or value cannot be carried, or there is too much of it.
    """
    try:
        yield
    except PayloadError as error:
        raise UserValueError(f"{call_name(user, method)} returned what cannot be carried: {error}") from error


def returned_metrics(user: object, method: str, found: object) -> dict[str, float]:
    """The metrics that `method` of `user` returned, as floats; NaN and infinity are among them.

    Raises:
        UserValueError: they are no mapping of names to single numbers; the message names the metric.
    """
    call = call_name(user, method)
    if not isinstance(found, Mapping):
        raise UserValueError(f"{call} returned {_kind(found)}: {_METRICS}")
    with _user_code(type(user), f"the mapping that {call} returned"):
        items = list(found.items())
    metrics = {}
    for name, value in items:
        if not isinstance(name, str):
            raise UserValueError(f"{call} returned the metric name {printable_value(name, 60)}: names are text")
        number = _number(value)
        if number is None:
            metric = printable_value(name, 100)
            raise UserValueError(f"{call} returned metric {metric} as {_described(value)}: it must be one number")
        metrics[name] = number
    return metrics


def save_into(user: object, folder: Path) -> None:
    """Have the user's trainer save into `folder`, which exists and is empty.

    Raises:
        UserCodeError: it raised.
        UserValueError: the folder is gone.
    """
    call_user(user, "save", folder)
    if not folder.is_dir():
        raise UserValueError(
            f"{call_name(user, 'save')} removed the folder that it was given: it must write into it"
        )


def described_error(error: BaseException, file: str | None) -> str:
    """`error` in one line: type, text, and where in `file` or beside it, else anywhere, it was raised."""
    text = printable(_text_of(error))
    return f"{type(error).__name__}{': ' if text else ''}{text}{_place(error, file)}"


def file_of(found: type[Any]) -> str | None:
    """The file of the module that has the class, if there is one."""
    return getattr(sys.modules.get(found.__module__), "__file__", None)


@contextmanager
def _user_code(found: type[Any], what: str) -> Iterator[None]:
    try:
        with parent_only():
            yield
    except (GroupLostError, GeneratorExit):
        raise
    except BaseException as error:  # leaving the interpreter is one of its mistakes
        if isinstance(error, asyncio.CancelledError) and _is_cancelled():
            raise
        raise UserCodeError(f"{what} raised {described_error(error, file_of(found))}") from error


def _is_cancelled() -> bool:
    """Whether dray has cancelled the task that runs, and not the user's code itself."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs
        return False
    return task is not None and task.cancelling() > 0


def call_name(user: object, method: str) -> str:
    """What errors call a method of the user's object: ``Worker.rollout() of worker.py``."""
    file = file_of(type(user))
    return f"{type(user).__name__}.{method}()" + (f" of {Path(file).name}" if file else "")


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - the text of a foreign exception raises whatever it likes
        return "(its text cannot be shown)"


def _place(error: BaseException, file: str | None) -> str:
    """The innermost line beside `file`, or of any but dray's and the importer's, that `error` came through."""
    frames = [
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith(_NOT_THE_USERS)
    ]
    own = [each for each in frames if file is not None and Path(each[0]).parent == Path(file).parent]
    if not frames:
        return ""
    name, line, function = (own or frames)[-1]
    where = "" if function == "<module>" else f" in {function}"
    return f" ({printable(f'{Path(name).name}:{line}{where}', 200)})"


def _unstarted(found: object) -> str:
    """What `found` is called if it stands for code that has not run."""
    if inspect.iscoroutine(found):
        found.close()
        return "a coroutine"
    if inspect.isawaitable(found):
        return "an awaitable"
    return "a generator" if inspect.isgenerator(found) or inspect.isasyncgen(found) else ""


def _kind(found: object) -> str:
    return "None" if found is None else f"a {type(found).__name__}"


def _described(value: object) -> str:
    shape = getattr(value, "shape", None)
    if shape:
        return f"an array of shape {printable_value(tuple(shape), 60)}"
    return printable_value(value, 60)


def _number(value: Any) -> float | None:
    """`value` as a float, if it is one number."""
    if isinstance(value, str | bytes | bytearray):
        return None
    try:
        # An array or tensor of one element is a number, whatever its shape.
        return float(value.item() if hasattr(value, "item") else value)
    except Exception:  # noqa: BLE001 - whatever a foreign object raises, it is no number
        return None


# --- rollout result ----------------------------------------------------------------------------------------------

MAX_METADATA: Final = 16 << 10
"""Bytes of the metadata of one payload, as JSON."""

MAX_PAYLOADS: Final = 1 << 20
"""Payloads of one work item."""


@dataclass(frozen=True, slots=True)
class RolloutPayload:
    """One payload of a finished rollout.

    Attributes:
        weight_version: of the weights with which the rollout began.
        part: which of the `parts` payloads of the work item it is, from 0.
        metadata: a JSON object; empty for none.
        times: when the rollout began and ended, on the monotonic clock.
    """

    arrays: dict[str, Any]
    work_item: int
    weight_version: int
    part: int = 0
    parts: int = 1
    metadata: str = ""
    times: tuple[float, float] = (0.0, 0.0)

    def entry(
        self,
        replica: str,
        producer: str,
        sequence: int,
        *,
        reference: str | None = None,
        image: bytes | None = None,
    ) -> RolloutEntry:
        """Its entry of the rollout stream, with a reference, the packed `image`, or both."""
        from dray.jobs.queue import RolloutEntry  # here: the check of a job's classes needs no Redis client

        return RolloutEntry(
            producer=producer,
            sequence=sequence,
            weight_version=self.weight_version,
            replica=replica,
            work_item=self.work_item,
            part=self.part,
            parts=self.parts,
            metadata=self.metadata,
            reference=reference,
            payload=image,
        )


def returned_payloads(
    worker: object,
    found: object,
    expected: int | None,
    work_item: int,
    weight_version: int,
    times: tuple[float, float] = (0.0, 0.0),
) -> list[RolloutPayload]:
    """The payloads that `rollout` of `worker` returned for a work item, at least one.

    Args:
        expected: `rollout.payloads_per_work_item`.
        weight_version: of the weights with which the rollout began.
        times: when it began and ended, on the monotonic clock.

    Raises:
        UserValueError: it is neither a mapping nor a list of them, or there are fewer or more than expected.
        UserCodeError: a mapping raised.
    """
    several = isinstance(found, list | tuple)
    results: list[Any] = list(found) if isinstance(found, list | tuple) else [found]
    call = call_name(worker, "rollout")
    if not results:
        raise UserValueError(f"{call} returned an empty {type(found).__name__}: it must hold at least one mapping")
    if len(results) > MAX_PAYLOADS:
        raise UserValueError(f"{call} returned {len(results):,} payloads: at most {MAX_PAYLOADS:,} are allowed")
    if expected is not None and len(results) != expected:
        count = "1 payload" if len(results) == 1 else f"{len(results):,} payloads"
        raise UserValueError(f"{call} returned {count}: rollout.payloads_per_work_item is {expected}")
    payloads = []
    for index, returned in enumerate(results):
        where = f"a {type(found).__name__} whose item {index} is " if several else ""
        found_arrays: object = returned
        metadata: object = {}
        if isinstance(returned, Rollout):
            found_arrays, metadata = returned.arrays, returned.metadata
            where += "a Rollout whose arrays are "
        arrays = returned_arrays(worker, "rollout", found_arrays, where)
        encoded = _encoded(call, metadata)
        payloads.append(RolloutPayload(arrays, work_item, weight_version, index, len(results), encoded, times))
    return payloads


def _encoded(call: str, metadata: object) -> str:
    if isinstance(metadata, Mapping) and not metadata:
        return ""
    allowed = "it must be a mapping of names to what JSON can carry"
    if not isinstance(metadata, Mapping) or not all(isinstance(name, str) for name in metadata):
        raise UserValueError(f"{call} returned metadata that cannot be carried: {allowed}")
    try:
        text = json.dumps(dict(metadata), allow_nan=False, separators=(",", ":"))
    except Exception as error:  # the objects of a user raise whatever they like
        raise UserValueError(f"{call} returned metadata that cannot be carried ({error}): {allowed}") from error
    if len(text) > MAX_METADATA:
        raise UserValueError(
            f"{call} returned {len(text):,} bytes of metadata: at most {MAX_METADATA:,} are allowed; "
            "what is larger belongs into an array"
        )
    return text


def decoded_metadata(text: str) -> dict[str, Any]:
    """The metadata that an entry of the stream carries."""
    found: dict[str, Any] = json.loads(text) if text else {}
    return found
