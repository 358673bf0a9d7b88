from dataclasses import replace

import pytest

from dray.errors import ConfigError, ProtocolError
from dray.jobs.queue import JobKeys, RolloutEntry
from dray.jobs.queue.connection import paired

REFERENCE = RolloutEntry("0f" * 16, 7, 3, "rollout-0", 12, reference='{"slot": 0}')
INLINE = RolloutEntry("0f" * 16, 0, 0, "rollout-0", 0, payload=bytes(range(256)))


def encoded(entry: RolloutEntry) -> dict[bytes, bytes]:
    def as_bytes(part: object) -> bytes:
        return part if isinstance(part, bytes) else str(part).encode()

    return paired([as_bytes(part) for part in entry.to_fields()])


@pytest.mark.parametrize(
    "entry",
    [
        REFERENCE,
        INLINE,
        replace(INLINE, payload=b""),
        replace(REFERENCE, payload=b"a copy"),
        replace(REFERENCE, part=2, parts=3, metadata='{"a":"\u00e4"}'),
    ],
)
def test_entry_survives_its_fields(entry: RolloutEntry) -> None:
    assert RolloutEntry.from_fields(encoded(entry)) == entry


@pytest.mark.parametrize(
    "change",
    [
        {"producer": "0F" * 16},
        {"producer": "0f"},
        {"sequence": -1},
        {"sequence": 2**64},
        {"weight_version": -1},
        {"work_item": -1},
        {"reference": None},
        {"part": -1},
        {"part": 1},
        {"part": 3, "parts": 3},
    ],
)
def test_entry_out_of_range_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="entry"):
        replace(REFERENCE, **change)


@pytest.mark.parametrize(
    "name", [b"producer", b"sequence", b"weight_version", b"replica", b"work_item", b"reference"]
)
def test_entry_with_a_missing_or_malformed_field_is_a_protocol_error(name: bytes) -> None:
    fields = encoded(REFERENCE)
    with pytest.raises(ProtocolError):
        RolloutEntry.from_fields({key: value for key, value in fields.items() if key != name})
    with pytest.raises(ProtocolError):
        RolloutEntry.from_fields(fields | {name: b"\xff\xfe"})


def test_entry_of_the_only_payload_of_a_work_item_has_no_fields_for_parts_and_metadata() -> None:
    assert not encoded(REFERENCE).keys() & {b"part", b"parts", b"metadata"}


@pytest.mark.parametrize("metadata", [b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_entry_whose_metadata_is_no_json_object_is_a_protocol_error(metadata: bytes) -> None:
    with pytest.raises(ProtocolError):
        RolloutEntry.from_fields(encoded(REFERENCE) | {b"metadata": metadata})


def test_repr_of_an_entry_leaves_the_payload_out() -> None:
    assert "\\x" not in repr(INLINE)


@pytest.mark.parametrize("job", ["", "a b", "a:b", "{a}", "x" * 65, "ä"])
def test_job_name_that_cannot_be_part_of_a_key_is_refused(job: str) -> None:
    with pytest.raises(ConfigError, match=r"job\.name"):
        JobKeys(job)


def test_all_keys_of_a_job_share_its_hash_slot_and_differ() -> None:
    keys = JobKeys("cartpole-1")
    assert len(set(keys.every)) == len(keys.every) == 8
    assert all(key.startswith("dray:{cartpole-1}:") for key in keys.every)
