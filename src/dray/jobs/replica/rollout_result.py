"""What a worker's `rollout` returns: one payload or several, each perhaps with metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dray.jobs.api import Rollout
from dray.jobs.replica.user_code import UserValueError, call_name, returned_arrays

MAX_METADATA: Final = 16 << 10
"""Bytes of the metadata of one payload, as JSON."""

MAX_PAYLOADS: Final = 1 << 20
"""Payloads of one work item."""


@dataclass(frozen=True, slots=True)
class ReturnedPayload:
    """One payload.

    Attributes:
        metadata: a JSON object; empty if there is none.
    """

    arrays: Mapping[str, Any]
    metadata: str


def returned_payloads(worker: object, found: object, expected: int | None) -> list[ReturnedPayload]:
    """The payloads that `rollout` of `worker` returned, at least one.

    Args:
        expected: `rollout.payloads_per_work_item`.

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
        payloads.append(ReturnedPayload(arrays, _encoded(call, metadata)))
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
