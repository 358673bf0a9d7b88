"""Any selection equals the same part of the whole: in an image, and over every lane."""

import contextlib

import numpy as np
import safetensors
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_nested_roundtrip import payloads as nested_payloads
from test_payload_roundtrip import payloads as flat_payloads
from values import assert_same

from dray import PayloadClient, PayloadServer, SharedRingBuffer, make_secret, pack, unpack
from dray.errors import SelectionError
from dray.payload.selection import Selection, part_of
from dray.protocol.frames import MAX_ADDED_BYTES
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE

payloads = flat_payloads | nested_payloads
SECRET = make_secret()


def written(path):
    """A path of keys as a program writes it."""
    if len(path) == 1:
        return path[0]
    return ".".join(key.replace("\\", "\\\\").replace(".", "\\.") for key in path)


def paths_of(values, prefix=()):
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths_of(value, (*prefix, key))


@st.composite
def ranges_of(draw, length):
    bounds = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
    pairs = list(zip(bounds[::2], bounds[1::2], strict=False))
    if draw(st.booleans()):
        pairs.append((bounds[-1] if bounds else 0, None))
    return pairs


@st.composite
def selections(draw, values):
    """Fields that do not overlap, and rows of the plain arrays among them."""
    chosen = None
    if draw(st.booleans()):
        chosen = []
        for path in draw(st.permutations(list(paths_of(values)))):
            free = all(path[: len(each)] != each and each[: len(path)] != path for each in chosen)
            if free and draw(st.booleans()):
                assume(len(path) == 1 or written(path) not in values)
                chosen.append(path)
    rows = {}
    for name, value in values.items():
        whole = chosen is None or (name,) in chosen
        if whole and isinstance(value, np.ndarray) and value.ndim and draw(st.booleans()):
            rows[name] = draw(ranges_of(len(value)))
    return chosen, rows


def part(values, paths):
    """The part of the values that begins with one of the paths, in the order of the whole."""
    found = {}
    for key, value in values.items():
        if (key,) in paths:
            found[key] = value
        elif any(path[0] == key for path in paths):
            found[key] = part(value, {path[1:] for path in paths if path[0] == key})
    return found


def expected_of(values, chosen, rows):
    found = dict(values) if chosen is None else part(values, set(chosen))
    for name, ranges in rows.items():
        array = values[name]
        taken = [array[slice(*each)] for each in ranges]
        found[name] = np.concatenate(taken) if taken else array[:0]
    return found


def arguments(chosen, rows):
    return {"fields": None if chosen is None else [written(path) for path in chosen], "rows": rows}


@settings(deadline=None)
@given(payloads, st.data())
def test_any_selection_of_an_image_equals_the_same_part_of_the_whole(values, data):
    chosen, rows = data.draw(selections(values))
    expected = expected_of(values, chosen, rows)
    image = pack(values)
    root = np.frombuffer(image, np.uint8)
    selection = Selection.of(**arguments(chosen, rows))
    assert Selection.decode(selection.text) == selection
    assert_same(unpack(image, selection=selection), expected)
    found = part_of(root, selection)
    separate = np.empty(found.nbytes, np.uint8)
    found.write(root, separate)
    assert_same(unpack(separate), expected)
    assert b"".join(found.views(memoryview(image))) == separate.tobytes()
    assert found.nbytes <= len(image) + MAX_ADDED_BYTES
    safetensors.deserialize(separate.tobytes())


@settings(deadline=None)
@given(payloads, st.text(max_size=8), st.integers(0, 9), st.integers(0, 9))
def test_what_a_payload_does_not_have_is_a_selection_error_or_a_part_of_it(values, name, start, stop):
    image = pack(values)
    for selected in ({"fields": [name]}, {"rows": {name: (start, stop)}}, {"fields": [name, name]}):
        with contextlib.suppress(SelectionError):
            assert len(unpack(image, selection=Selection.of(**selected))) <= len(values)


# --- lanes ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exchange():
    """A server, and a client for each way to it; payloads come whole and inline for the last one alone."""
    lanes = ("shm", "tcp", "ucx") if UCXX_AVAILABLE else ("shm", "tcp")
    with contextlib.ExitStack() as opened:
        ring = opened.enter_context(SharedRingBuffer(4, 1 << 20))
        server = opened.enter_context(PayloadServer(ring, lane=lanes, threads=1, secret=SECRET, drain_timeout=0.5))
        options = [{"lane": lane} for lane in lanes]
        options += [{"lane": "shm", "direct": False}, {"lane": "tcp", "inline_bytes": 1 << 14}]
        yield (
            server,
            [
                opened.enter_context(PayloadClient(secret=SECRET, **{"inline_bytes": 0, **each}))
                for each in options
            ],
        )


class _Needed(Exception):
    """The payload is released, not consumed."""


def test_any_selection_over_any_lane_equals_the_same_part_of_the_whole():
    with exchange() as (server, clients):

        @settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
        @given(payloads, st.data())
        def compare(values, data):
            chosen, rows = data.draw(selections(values))
            expected, selected = expected_of(values, chosen, rows), arguments(chosen, rows)
            ref = server.put(values)
            for client in clients:
                assert_same(client.read(ref, consume=False, **selected), expected)
                first, second = client.read_many([ref, ref], consume=False, **selected)
                assert_same(first.payload, expected)
                assert_same(second.payload, expected)
                with contextlib.suppress(_Needed), client.lease(ref, **selected) as found:
                    assert_same(found, expected)
                    raise _Needed
            assert clients[0].consume([ref]) == 1

        compare()
