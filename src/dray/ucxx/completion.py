"""The completion: what a rollout hands on in place of its trajectory, and the one predicate that recognises it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from dray.errors import ProtocolError
from dray.protocol import PayloadRef

PAYLOAD_KEY = "dray_payload"
"""The key of a completion; its value is `PayloadRef.to_json`. A framework may add keys of its own beside it."""

_REFERENCE_KEYS = frozenset("psqne")
_ABSENT = object()

Completion = dict[str, str]


def completion_for(ref: PayloadRef) -> Completion:
    """The completion that stands for a payload: one JSON-safe entry."""
    return {PAYLOAD_KEY: ref.to_json()}


def is_completion(value: object) -> bool:
    """Whether a value stands for a payload. Prefetch and `get_policy_input` both ask this, and nothing else.

    It is one of:

    - a mapping with the key ``"dray_payload"``, as `completion_for` makes it;
    - a `PayloadRef`;
    - the JSON text of either;
    - an object whose attribute ``completion`` is one of these.
    """
    return _carried(value) is not _ABSENT


def reference_of(completion: object) -> PayloadRef:
    """The reference in what `is_completion`.

    Raises:
        ProtocolError: what is there is not a reference.
    """
    carried = _carried(completion)
    if isinstance(carried, PayloadRef):
        return carried
    if isinstance(carried, str):
        return PayloadRef.from_json(carried)
    found = "none" if carried is _ABSENT else type(carried).__name__
    raise ProtocolError(f"a completion's {PAYLOAD_KEY!r} must be a reference as text, got {found}")


def _carried(value: object) -> object:
    """What a value says its reference is, which may be anything; `_ABSENT` where it says nothing of the kind."""
    carried = _carried_itself(value)
    return _carried_itself(getattr(value, "completion", None)) if carried is _ABSENT else carried


def _carried_itself(value: object) -> object:
    if isinstance(value, PayloadRef):
        return value
    if isinstance(value, str):
        parsed = _parsed(value)
        return value if parsed.keys() == _REFERENCE_KEYS else parsed.get(PAYLOAD_KEY, _ABSENT)
    if isinstance(value, Mapping):
        return value.get(PAYLOAD_KEY, _ABSENT)
    return _ABSENT


def _parsed(text: str) -> Mapping[str, object]:
    """A JSON object; empty where the text is not one, as the outputs of most models are."""
    if not text.lstrip().startswith("{"):
        return {}
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
