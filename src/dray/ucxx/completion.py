"""The completion: what a rollout hands on in place of its trajectory, and the one predicate that recognises it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

from dray.errors import ProtocolError
from dray.wire import PayloadRef

PAYLOAD_KEY = "dray_payload"
"""The key of a completion; its value is `PayloadRef.to_json`. A framework may add keys of its own beside it."""

Completion = dict[str, str]


def completion_for(ref: PayloadRef) -> Completion:
    """The completion that stands for a payload: one JSON-safe entry."""
    return {PAYLOAD_KEY: ref.to_json()}


def is_completion(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether a value stands for a payload. Prefetch and `get_policy_input` both ask this, and nothing else."""
    return isinstance(value, Mapping) and PAYLOAD_KEY in value


def reference_of(completion: Mapping[str, object]) -> PayloadRef:
    """The reference in a completion.

    Raises:
        ProtocolError: what is there is not one.
    """
    text = completion[PAYLOAD_KEY]
    if not isinstance(text, str):
        raise ProtocolError(
            f"a completion's {PAYLOAD_KEY!r} must be a reference as text, got {type(text).__name__}"
        )
    return PayloadRef.from_json(text)
