"""Selections that cannot be made, and what those that can find in an image."""

import copy
import re
from typing import Any

import numpy as np
import pytest

from dray import Ragged, pack, unpack
from dray.errors import PayloadError, SelectionError
from dray.payload.header import MAX_HEADER_BYTES, MAX_TENSORS
from dray.payload.selection import MAX_SELECTED, MAX_SELECTION_BYTES, Selection, part_of
from dray.protocol.client_session import MAX_PAYLOAD_MESSAGES
from dray.protocol.frames import MAX_ADDED_BYTES, MAX_BODY_BYTES

WHOLE = {
    "obs": np.arange(60, dtype=np.float32).reshape(10, 6),
    "a.b": np.arange(4),
    "scalar": np.float64(1.5),
    "info": {"x.y": "text", "deep": {"k": np.ones(3)}, "list": [{"k": 1}]},
    "rows": Ragged.from_rows([np.arange(2), np.arange(3)]),
    "a": {"b": "another"},
}
IMAGE = pack(WHOLE)


def selected(fields: Any = None, rows: Any = None, image: Any = IMAGE) -> dict[str, Any]:
    return unpack(image, selection=Selection.of(fields, rows))


def test_nothing_selected_is_no_selection() -> None:
    assert Selection.of() is None


def test_fields_come_in_the_order_of_the_payload() -> None:
    assert list(selected(("rows", "obs"))) == ["obs", "rows"]
    assert selected(()) == {}


def test_paths_select_a_part_of_the_tree() -> None:
    found = selected(("info.deep.k", "info.x\\.y"))
    assert found["info"]["x.y"] == "text"
    assert list(found) == ["info"]
    assert list(found["info"]) == ["x.y", "deep"]


def test_a_name_of_the_first_level_comes_before_a_path() -> None:
    assert np.array_equal(selected(("a.b",))["a.b"], WHOLE["a.b"])


@pytest.mark.parametrize(
    ("ranges", "indices"),
    [
        ((2, 4), [2, 3]),
        (slice(None, 2), [0, 1]),
        (slice(8, None), [8, 9]),
        ([(0, 1), slice(3, 5), (np.int64(9), None)], [0, 3, 4, 9]),
        ([[0, 1], [1, 2]], [0, 1]),
        ([(4, 4)], []),
        ([], []),
        ((10, None), []),
    ],
)
def test_rows_are_slices_pairs_or_several_of_them(ranges: Any, indices: list[int]) -> None:
    found = selected(("obs",), {"obs": ranges})["obs"]
    assert np.array_equal(found, WHOLE["obs"][indices])


def test_rows_alone_leave_the_other_fields_whole() -> None:
    found = selected(rows={"obs": (1, 2)})
    assert list(found) == list(WHOLE)
    assert found["obs"].shape == (1, 6)
    assert found["info"]["list"] == [{"k": 1}]


def test_one_range_is_a_view_and_several_are_a_copy() -> None:
    image = np.frombuffer(IMAGE, np.uint8)
    assert np.shares_memory(selected(("obs",), {"obs": (1, 3)}, image)["obs"], image)
    assert not np.shares_memory(selected(("obs",), {"obs": [(1, 3), (4, 5)]}, image)["obs"], image)


@pytest.mark.parametrize(
    ("fields", "rows", "problem"),
    [
        (
            ("nope",),
            None,
            "the payload has no field 'nope'; its fields: 'obs', 'a.b', 'scalar', 'info', 'rows', 'a'",
        ),
        (("info.z",), None, "field 'info' has no field 'z'; its fields: 'x.y', 'deep', 'list'"),
        (("info.list.0",), None, "field 'info.list.0' is in a list, which can be selected as a whole only"),
        (("obs.x",), None, "field 'obs.x' is not in a mapping"),
        (("info", "info.deep"), None, "field 'info.deep' is part of another one that is selected"),
        (("info.deep", "info"), None, "field 'info' is selected twice, as a whole or in part"),
        (("obs", "obs"), None, "field 'obs' is selected twice, as a whole or in part"),
        (None, {"obs": (0, 11)}, "rows 0 to 11 of 'obs' are selected, which has 10"),
        (None, {"obs": (11, None)}, "rows 11 to 10 of 'obs' are selected, which has 10"),
        (None, {"rows": (0, 1)}, "rows of 'rows' are selected, which is not an array with rows"),
        (None, {"info": (0, 1)}, "rows of 'info' are selected, which is not an array with rows"),
        (None, {"scalar": (0, 1)}, "rows of 'scalar' are selected, which is not an array with rows"),
        (("a.b",), {"obs": (0, 1)}, "rows of 'obs' are selected, which is no selected field of the first level"),
        (None, {"info.deep.k": (0, 1)}, "rows of 'info.deep.k' are selected, which is no selected field"),
    ],
)
def test_what_a_payload_does_not_have_is_named(fields: Any, rows: Any, problem: str) -> None:
    with pytest.raises(SelectionError, match=f"^{re.escape(problem)}"):
        selected(fields, rows)


@pytest.mark.parametrize(
    ("fields", "rows", "problem"),
    [
        ("obs", None, "fields = 'obs' is one name; give a tuple of names"),
        ((1,), None, "1 is not the name of a field, which is text"),
        (None, [("obs", (0, 1))], "rows must be a mapping of field to ranges, not list"),
        (None, {1: (0, 1)}, "1 is not the name of a field, which is text"),
        (None, {"obs": 3}, "3 is no range of rows of 'obs': a range is (start, stop)"),
        (None, {"obs": "ab"}, "'ab' is no range of rows of 'obs'"),
        (None, {"obs": [0, 1]}, "0 is no range of rows of 'obs'"),
        (None, {"obs": (0.0, 1.0)}, "0.0 is no range of rows of 'obs'"),
        (None, {"obs": [(0.5, 1)]}, "(0.5, 1) is no range of rows of 'obs'"),
        (None, {"obs": slice(0, 4, 2)}, "slice(0, 4, 2) is no range of rows of 'obs'"),
        (None, {"obs": (-1, 2)}, "(-1, 2) is no range of rows of 'obs'"),
        (None, {"obs": (3, 2)}, "(3, 2) is no range of rows of 'obs'"),
        (None, {"obs": (0, 2**63)}, "(0, 9223372036854775808) is no range of rows of 'obs'"),
        (None, {"obs": [(2, 4), (3, 5)]}, "rows 3 to 5 of 'obs' begin before the range before them ends"),
        (None, {"obs": [(2, None), (9, 10)]}, "rows 9 to 10 of 'obs' begin before the range before them ends"),
        (("\ud800",), None, "the name of a field is not valid Unicode"),
    ],
)
def test_what_no_payload_can_have_is_refused_at_once(fields: Any, rows: Any, problem: str) -> None:
    with pytest.raises(SelectionError, match=f"^{re.escape(problem)}"):
        Selection.of(fields, rows)


def test_g1_a_selection_has_a_limit_on_its_parts_and_on_its_text() -> None:
    assert Selection.of(None, {"obs": [(row, row) for row in range(MAX_SELECTED)]}) is not None
    with pytest.raises(SelectionError, match="1025 fields and ranges are selected; at most 1024 can be"):
        Selection.of(("obs",), {"obs": [(row, row) for row in range(MAX_SELECTED)]})
    with pytest.raises(SelectionError, match=f"bytes of text; at most {MAX_SELECTION_BYTES} fit"):
        Selection.of(("x" * MAX_SELECTION_BYTES,))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 60_000,
        b'{"other":1}',
        b'{"fields":null}',
        b'{"fields":{"a":1}}',
        b'{"fields":[1]}',
        b'{"rows":[]}',
        b'{"rows":{"a":[[0,1.0]]}}',
        b'{"rows":{"a":[[true,1]]}}',
        b'{"rows":{"a":[[0,1,2]]}}',
        b'{"rows":{"a":[0,1]}}',
        b'{"rows":{"a":[[0,1]],"a":[[1,2]]}}',
        b'{"rows":{"a":[[1,0]]}}',
        b'{"rows":{"a":[[0,%s]]}}' % (b"9" * 60_000),
        b'{"rows":{"a":[[0,NaN]]}}',
        b'{"rows":{"a":[%s]}}' % b",".join([b"[0,0]"] * 1025),
    ],
)
def test_a_text_that_is_no_selection_is_refused(text: bytes) -> None:
    with pytest.raises(SelectionError):
        Selection.decode(text)


def test_a_text_is_read_with_the_spaces_that_fill_it_up() -> None:
    selection = Selection.of(("obs", "é"), {"obs": [(0, 5), (7, None)]})
    assert selection is not None
    assert selection.text == '{"fields":["obs","é"],"rows":{"obs":[[0,5],[7,null]]}}'.encode()
    assert Selection.decode(selection.text + b" " * 20) == selection
    assert Selection.of(**selection.arguments) == selection
    assert copy.copy(selection) == selection


def test_bytes_that_are_no_payload_have_nothing_to_select() -> None:
    for image in (b"", bytes(100), b"\xff" * 100):
        with pytest.raises(SelectionError, match="the payload has no fields to select: "):
            part_of(np.frombuffer(image, np.uint8), Selection.decode(b"{}"))
    assert issubclass(SelectionError, PayloadError)


def test_spans_that_follow_each_other_are_one() -> None:
    image = pack({name: np.full(100, index) for index, name in enumerate("abcd")})
    root = np.frombuffer(image, np.uint8)
    part = part_of(root, Selection.decode(b'{"fields":["b","c"],"rows":{"c":[[0,10],[10,20],[30,40]]}}'))
    offset = len(image) - 3 * 800
    assert part.spans == ((offset, 800 + 160), (offset + 800 + 240, 80))


def test_metadata_of_the_whole_is_not_part_of_a_selection() -> None:
    root = np.frombuffer(pack({"a": np.arange(3), "b": [1]}, metadata={"note": "x" * 1000}), np.uint8)
    part = part_of(root, Selection.decode(b'{"fields":["a"]}'))
    assert part.nbytes < 500
    assert b"note" not in part.header.tobytes()


def test_the_limits_of_the_protocol_are_those_of_payloads() -> None:
    assert MAX_BODY_BYTES == MAX_SELECTION_BYTES
    assert MAX_ADDED_BYTES == MAX_HEADER_BYTES + 8
    assert MAX_PAYLOAD_MESSAGES > 1 + MAX_TENSORS + MAX_SELECTED
