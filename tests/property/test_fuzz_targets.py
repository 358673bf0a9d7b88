"""The targets of tests/fuzz over inputs that are valid, nearly valid, or anything.

A coverage-guided fuzzer finds its way by small steps; here, whole messages are put together in any order.
"""

import json
import logging
from collections.abc import Iterator

import pytest
from fuzz import (
    fuzz_client,
    fuzz_config,
    fuzz_control,
    fuzz_controller,
    fuzz_handshake,
    fuzz_payload,
    fuzz_reference,
    fuzz_segment,
    fuzz_selection,
    fuzz_server_session,
    fuzz_stream_entry,
    fuzz_subscriber,
)
from fuzz.fuzzer import TARGETS, load
from hypothesis import given, settings
from hypothesis import strategies as st

from dray.jobs.config import JobConfig


@pytest.fixture(autouse=True, scope="module")
def _no_warnings() -> Iterator[None]:
    """A record of a warning would hold the error, and through it the memory that was in use."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


u8 = st.integers(0, 255)
texts = st.text(max_size=8)
numbers = st.integers(-2, 5) | st.integers() | st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def joined(parts: st.SearchStrategy[bytes], most: int) -> st.SearchStrategy[bytes]:
    return st.lists(parts, max_size=most).map(b"".join)


@pytest.mark.parametrize("target", TARGETS)
@settings(deadline=None)
@given(st.data())
def test_any_bytes_are_taken_or_refused(target: str, data: st.DataObject) -> None:
    run, seeds = load(target)
    around = data.draw(st.binary(max_size=40))
    run(around)
    seed = data.draw(st.sampled_from(seeds))
    cut = data.draw(st.integers(0, len(seed)))
    run(seed[:cut] + around + seed[data.draw(st.integers(0, len(seed))) :])


def test_every_target_takes_what_it_comes_with() -> None:
    for target in TARGETS:
        run, seeds = load(target)
        for seed in seeds:
            run(seed)


# --- connections ------------------------------------------------------------------------------------------------

small = st.integers(0, 3)
readers, flags = st.integers(0, 2), st.sampled_from([0, 0, 1, 4])
frames = st.builds(fuzz_server_session.frame, small, small, small, small, readers, flags)
cut_frames = st.tuples(frames, st.integers(0, 63)).map(lambda pair: pair[0][:1] + bytes([pair[1]]) + pair[0][2:])
any_frames = st.binary(min_size=9, max_size=9).map(lambda tail: bytes([fuzz_server_session.FRAME_OP, 0]) + tail)
pieces = st.binary(max_size=130).map(lambda raw: bytes([fuzz_server_session.BYTES_OP, len(raw)]) + raw)
part_reads = st.builds(
    fuzz_server_session.read_part,
    st.sampled_from([b'{"fields":["b"]}', b'{"rows":{"a":[[3,5],[9,null]]}}', b"{}", b'{"fields":["z"]}', b"no"]),
    st.sampled_from([2, 2, 2, 0, 9]),
    st.sampled_from([2, 2, 2, 0, 9]),
    small,
    st.sampled_from([None, None, None, 0, 64, 128, 65]),
)
steps = st.sampled_from([fuzz_server_session.DELIVER, fuzz_server_session.READ])
sessions = st.builds(
    fuzz_server_session.options, st.integers(0, 2), secret=st.booleans(), reset=st.booleans(), raw=st.just(False)
)


@settings(deadline=None, max_examples=200)
@given(sessions, joined(frames | cut_frames | part_reads | steps, 40))
def test_plausible_requests_in_any_pieces_are_answered_in_order(session: bytes, story: bytes) -> None:
    fuzz_server_session.run(session + story)


@settings(deadline=None, max_examples=200)
@given(sessions, joined(frames | any_frames | part_reads | pieces | steps, 30))
def test_any_requests_are_answered_or_end_the_connection_and_nothing_else(session: bytes, story: bytes) -> None:
    fuzz_server_session.run(session + story)


consumer_frames = st.builds(
    fuzz_subscriber.frame, st.integers(0, 2), small, st.integers(0, 8) | u8, small, st.sampled_from([0, 32, 0, 1])
)
operations = st.sampled_from([fuzz_subscriber.PUT, fuzz_subscriber.TIME, fuzz_subscriber.RENEW])
consumer_steps = operations.map(lambda operation: bytes([operation]))
garbage = st.tuples(st.sampled_from([0, 1, 2, 3, 66, 67]), st.integers(0, 9) | u8).map(
    lambda pair: bytes([fuzz_subscriber.WORD, *pair])
)


@settings(deadline=None, max_examples=200)
@given(joined(consumer_steps | consumer_frames | garbage, 30))
def test_a_hostile_consumer_harms_its_own_share_of_the_stream_only(story: bytes) -> None:
    fuzz_subscriber.run(story)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["pid", "command", "producer", "groups", "schema", "endpoints"]),
        values | st.sampled_from(["0f" * 16, ["default"], ["unix:/a"], ["unix:"], ["tcp:h:1"], float("inf")]),
    )
)
def test_any_entry_is_that_of_a_producer_or_is_ignored(changed: dict[str, object]) -> None:
    fuzz_stream_entry.run(fuzz_stream_entry.entry(**changed))


statuses = st.builds(
    lambda step, code, flags, nbytes, changes: fuzz_client.status(step, code, flags, nbytes, *sum(changes, ())),
    st.sampled_from([1, 1, 1, 0, 2]),
    st.integers(0, 6),
    st.sampled_from([0, 0, 2, 4, 6, 255]),
    st.sampled_from([0, 5, 6, 255]) | u8,
    st.lists(st.tuples(u8, u8), max_size=2),
)
payloads = st.sampled_from([b"hello", b"other"]).map(fuzz_client.payload) | st.binary(max_size=60).map(
    fuzz_client.raw
)
wanted = st.lists(st.sampled_from([0, 5, 5, 200]), max_size=3).map(lambda sizes: bytes([len(sizes), *sizes, 1]))


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 3) | st.integers(16, 27), wanted, joined(statuses | payloads, 12))
def test_any_answers_are_what_was_asked_for_or_a_typed_error(options: int, reads: bytes, words: bytes) -> None:
    fuzz_client.run(bytes([options]) + reads + words)


@given(st.integers(0, 15), st.lists(st.tuples(u8, u8), max_size=4))
def test_any_change_on_the_way_of_a_handshake_is_noticed_or_harmless(
    sides: int, changes: list[tuple[int, int]]
) -> None:
    fuzz_handshake.run(bytes([sides | fuzz_handshake.VALID, *sum(changes, ())]))


@given(
    st.integers(0, 3), st.lists(st.tuples(st.integers(0, 63), u8), max_size=3), st.sampled_from(fuzz_segment.SEEDS)
)
def test_any_segment_is_mapped_according_to_its_header_or_refused(
    form: int, changes: list[tuple[int, int]], seed: bytes
) -> None:
    header = bytearray(seed[1:])
    for at, byte in changes:
        header[at % len(header)] = byte
    fuzz_segment.run(bytes([form]) + bytes(header))


# --- texts ------------------------------------------------------------------------------------------------------

addresses = st.builds(
    lambda scheme, host, port: f"{scheme}:{host}:{port}",
    st.sampled_from(["tcp", "ucx", "unix", "shm", ""]),
    st.sampled_from(["127.0.0.1", "::1", "[::1]", "a..b", "a" * 64, "\ud800", "é" * 60, "/x\0y"]) | texts,
    numbers | texts,
)


@given(st.lists(addresses | texts, max_size=4), numbers, st.text(max_size=40))
def test_any_endpoints_in_a_reference_are_addresses_or_refused(
    endpoints: list[str], slot: int, producer: str
) -> None:
    fields = {"p": "0f" * 16, "s": 0, "q": 2**64 - 1, "n": 1, "e": endpoints}
    for each in (fields, {**fields, "s": slot}, {**fields, "p": producer}):
        fuzz_reference.run(json.dumps(each).encode())
        fuzz_reference.run(json.dumps(each, ensure_ascii=False).encode(errors="surrogatepass"))


names = st.sampled_from(["a", "b", "a.b", "c", "c.a", "c.d\\.e", "c.d\\.e.f", "c.l", "r", "c.l.0"]) | texts
row_lists = st.lists(st.lists(st.none() | st.integers(0, 6) | numbers, min_size=2, max_size=2), max_size=3)


@given(
    st.integers(0, 2),
    st.fixed_dictionaries(
        {},
        optional={
            "fields": st.lists(names, max_size=4) | values,
            "rows": st.dictionaries(names, row_lists, max_size=2),
        },
    )
    | values,
)
def test_any_selection_is_a_part_of_a_payload_or_refused(image: int, selection: object) -> None:
    fuzz_selection.run(bytes([image]) + json.dumps(selection).encode(errors="surrogatepass"))


tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "I64", "F9"]),
        "shape": st.lists(st.integers(0, 4) | numbers, max_size=4),
        "data_offsets": st.lists(st.integers(0, 40) | numbers, min_size=2, max_size=2),
    }
)
fields = st.sampled_from(["observations", "actions", "rewards", "episode_length", "__metadata__", "x"]) | texts


@given(st.dictionaries(fields, tensors | values, max_size=4))
def test_any_header_describes_arrays_within_the_image_or_is_refused(header: dict[str, object]) -> None:
    fuzz_payload.run(fuzz_payload.WITH_LENGTH + json.dumps(header).encode(errors="surrogatepass"))


@given(
    st.dictionaries(
        st.sampled_from(fuzz_control.NAMES),
        st.sampled_from([b"0f" * 16, b"7", b"-1", b"18446744073709551616", b"1_0", b"\xd9\xa3", b"1e3"])
        | values.map(lambda value: json.dumps(value).encode()[:200])
        | st.binary(max_size=40),
    ).map(lambda changed: {b"producer": b"0f" * 16, b"replica": b"r", b"work_item": b"1", **changed})
)
def test_any_entry_or_command_is_one_or_a_protocol_error(found: dict[bytes, bytes]) -> None:
    fuzz_control.run(fuzz_control.fields(found))


bodies = st.fixed_dictionaries(
    {"name": st.sampled_from(["rollout-0", "policy-0"]), "incarnation": st.just("a")},
    optional={
        "role": st.sampled_from(["rollout", "policy", "x"]),
        "pid": numbers,
        "progress": st.fixed_dictionaries(
            {"doing": texts, "seconds": st.floats() | numbers},
            optional={
                "counters": st.dictionaries(texts, st.floats() | numbers, max_size=3),
                "labels": st.dictionaries(texts, texts, max_size=2),
            },
        ),
        "settled": st.lists(numbers, max_size=3),
        "published": st.lists(numbers, max_size=3),
        "want": numbers,
        "reason": texts,
        "kind": st.sampled_from(["solved", "failed", "x"]),
    },
)
REGISTER = fuzz_controller.request("/register", name="rollout-0", incarnation="a", role="rollout", pid=7)
HEARTBEAT = st.builds(
    lambda seconds, counters, labels: fuzz_controller.request(
        "/heartbeat",
        name="rollout-0",
        incarnation="a",
        progress={"doing": "x", "seconds": seconds, "counters": counters, "labels": labels},
    ),
    st.floats(),
    st.dictionaries(texts, st.floats(), max_size=3),
    st.dictionaries(texts, texts, max_size=2),
)


@settings(deadline=None)
@given(
    st.lists(
        HEARTBEAT
        | st.tuples(st.integers(0, 9), bodies | values).map(lambda t: f"{t[0]}{json.dumps(t[1])}".encode()),
        max_size=3,
    )
)
def test_any_request_to_the_controller_has_an_answer(requests: list[bytes]) -> None:
    fuzz_controller.run(b"\0".join([REGISTER, *requests]))


KEYS = [
    f"{table}.{key}"
    for table, field in JobConfig.model_fields.items()
    for key in getattr(field.annotation, "model_fields", {"metric": None, "at_least": None})
]
scalars = (
    st.sampled_from(
        ["inf", "nan", "-0", "1e400", "1979-05-27", "07:32:00", "true", "'a'", '""', "[]", "{}", "[[1]]"]
    )
    | st.integers().map(str)
    | st.floats(allow_nan=False, allow_infinity=False).map(str)
    | texts.map(json.dumps)
    | st.integers(60, 20_000).map(lambda bits: hex(1 << bits))
)
settable = st.sampled_from([*KEYS, "rollout.args.x", "rollout.args.x.y", "policy.args.'a b'", '"a\\nb".c']) | texts
assignments = st.builds("{} = {}".format, settable, scalars)


@settings(deadline=None)
@given(st.lists(assignments, max_size=3), st.lists(assignments | texts, max_size=2))
def test_any_job_file_is_a_configuration_or_a_config_error(lines: list[str], overrides: list[str]) -> None:
    content = "\n".join([*lines, fuzz_config.WHOLE_FILE.decode(), "[policy.args]", *lines]).replace("\0", "")
    for text in (content, fuzz_config.WHOLE_FILE.decode()):
        fuzz_config.run(text.encode() + b"\0" + "\n".join(overrides).encode(errors="surrogatepass"))
