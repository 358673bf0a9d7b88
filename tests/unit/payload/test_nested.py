"""Nested values: what is packed comes back equal, and what cannot be trusted or carried is refused."""

import enum
import json
import math
import struct
import typing

import numpy as np
import pytest
import safetensors.numpy
from values import assert_same

from dray import PayloadSchema, Ragged, RaggedSpec, TensorSpec, TextSpec, pack, unpack
from dray.errors import PayloadFormatError, SchemaError
from dray.payload import max_nbytes, unpack_metadata
from dray.payload.tree import MAX_DEPTH, MAX_NODES

SAMPLE = {
    "prompt": "Sort: 3 1 2",
    "tokens": np.arange(7, dtype=np.int32),
    "info": {
        "reward": 1.5,
        "length": 12,
        "done": True,
        "nothing": None,
        "texts": ["ä", "", "🙂 two"],
        "numbers": [1, 2, 3],
        "floats": [0.5, math.inf, -0.0],
        "flags": [True, False],
        "mixed": [1, 2.0, "three", None, [4]],
        "wide": [-1, 2**63],
        "pair": (np.zeros((2, 3), np.float32), "second"),
        "empty": {},
        "none": [],
    },
    "images": {"left": np.ones((2, 2, 3), np.uint8), "right": np.zeros((0, 4), np.float64)},
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}],
    "turns": Ragged.from_rows([np.arange(3), np.arange(0), np.arange(5)]),
}


def test_nested_values_come_back_as_they_were():
    assert_same(unpack(pack(SAMPLE)), SAMPLE)


def test_arrays_inside_are_views_of_the_image():
    image = pack(SAMPLE)
    values = unpack(image)
    views = (values["images"]["left"], values["info"]["pair"][0], values["turns"].values, values["tokens"])
    memory = np.frombuffer(image, np.uint8)
    assert all(np.shares_memory(view, memory) for view in views)


def test_the_official_library_opens_nested_payloads_and_shows_paths_as_names():
    tensors = safetensors.numpy.load(bytes(pack({"a.b": np.zeros(1), "a": {"b": np.ones(2), "c": ["x", "y"]}})))
    assert sorted(tensors) == ["a.b", "a.c", "a.c\\offsets", "a\\.b"]
    assert tensors["a.b"].tolist() == [1, 1]
    assert bytes(tensors["a.c"]) == b"xy"


@pytest.mark.parametrize("key", ["a.b", "a\\.b", "", ".", "\\offsets", "0", "ключ", "__metadata__", "dray.tree"])
def test_any_key_comes_back(key):
    values = {"a": {"b": np.zeros(1), key: {key: np.ones(2)}, "x": {key: ["t", "u"]}}, "a.b": "text"}
    assert_same(unpack(pack(values)), values)


def test_fields_of_arrays_alone_have_no_description_and_keep_their_names():
    image = pack({"layer.0.weight": np.zeros(2), "steps": [1, 2], "reward": 1.0})
    assert sorted(safetensors.numpy.load(bytes(image))) == ["layer.0.weight", "reward", "steps"]
    assert b"dray.tree" not in image
    values = unpack(image)
    assert isinstance(values["reward"], np.ndarray)
    assert isinstance(values["steps"], np.ndarray)


def test_a_number_that_is_a_field_is_an_array_and_one_inside_a_value_is_a_number():
    values = unpack(pack({"reward": 1.0, "info": {"reward": 1.0}}))
    assert isinstance(values["reward"], np.ndarray)
    assert type(values["info"]["reward"]) is float


@pytest.mark.parametrize("number", [0, -1, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1])
def test_integers_of_64_bits_come_back_exactly(number):
    assert_same(unpack(pack({"n": {"one": number, "many": [number, 0]}}))["n"]["one"], number)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308])
def test_floats_come_back_bit_for_bit(number):
    found = unpack(pack({"n": {"x": number}}))["n"]["x"]
    assert struct.pack("d", found) == struct.pack("d", number)


def test_metadata_is_kept_beside_nested_values():
    image = pack({"a": {"b": 1}}, metadata={"version": "7"})
    assert unpack_metadata(image) == {"version": "7"}
    assert unpack(image) == {"a": {"b": 1}}
    with pytest.raises(PayloadFormatError, match=r"'dray\.tree' cannot be a name in the metadata"):
        pack({"a": np.zeros(1)}, metadata={"dray.tree": "{}"})


class Colour(enum.IntEnum):
    RED = 1


class Pair(typing.NamedTuple):
    x: int
    y: int


class Texts(str):
    __slots__ = ()


def deep(levels):
    value = 1
    for _ in range(levels):
        value = {"x": value}
    return value


CYCLE: list = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1: 2}, "key 1 of field 'odd' is not text"),
        ({"x": {None: 2}}, "key None of field 'odd.x' is not text"),
        ({"x": [2**64]}, "field 'odd.x.0' is an integer that does not fit into 64 bits"),
        ({"x": -(2**63) - 1}, "field 'odd.x' is an integer that does not fit into 64 bits"),
        ({"x": Colour.RED}, "field 'odd.x' is a Colour, which would come back as another type"),
        ({"x": Pair(1, 2)}, "field 'odd.x' is a Pair, which would come back as another type"),
        ({"x": [Texts("a")]}, "field 'odd.x.0' is a Texts, which would come back as another type"),
        ({"x": "\ud800"}, "field 'odd.x' is text that is not valid Unicode"),
        ({"x": ["a", "\ud800"]}, "field 'odd.x' is text that is not valid Unicode"),
        ({"\ud800": 1}, "not valid Unicode"),
        ({"x": {1, 2}}, "field 'odd.x' is a set"),
        ({"x": b"bytes"}, "field 'odd.x' has dtype"),
        ({"x": 1j}, "field 'odd.x' has dtype complex128"),
        ({"x": [CYCLE]}, f"is nested more than {MAX_DEPTH} levels deep"),
        (deep(MAX_DEPTH), f"is nested more than {MAX_DEPTH} levels deep"),
        ({"x": [None] * MAX_NODES}, f"more than {MAX_NODES} values; use arrays"),
        ({f"{i},": None for i in range(MAX_NODES // 2 + 10)} | {"[" * 70_000: None}, "is too large"),
    ],
)
def test_what_would_not_come_back_is_an_error_with_its_path(value, words):
    with pytest.raises(PayloadFormatError) as caught:
        pack({"odd": value})
    assert words in str(caught.value)


def test_the_deepest_and_the_largest_tree_come_back():
    for values in ({"x": deep(MAX_DEPTH - 1)}, {"x": {"many": [None] * (MAX_NODES - 3)}}):
        assert_same(unpack(pack(values)), values)


# --- images that are not trusted --------------------------------------------------------------------------------


def image_of(description, tensors=None):
    """An image with this description, and tensors of it: name → (dtype, shape, bytes)."""
    tensors = {"x": ("F32", [1], bytes(4))} if tensors is None else tensors
    text = description if isinstance(description, str) else json.dumps(description)
    header: dict = {"__metadata__": {"dray.tree": text}}
    content = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(content), len(content) + len(data)]}
        content += data
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content


TEXTS = {"x": ("U8", [2], b"ab"), "x\\offsets": ("I64", [3], struct.pack("<3q", 0, 1, 2))}


def test_an_image_made_by_hand_is_understood():
    assert unpack(image_of({"x": "a"}))["x"].shape == (1,)
    assert unpack(image_of({"x": "S"}, TEXTS)) == {"x": ["a", "b"]}
    assert unpack(image_of({"x": ["l", None, {"y": "i"}]}, {"x.1.y": ("I64", [], bytes(8))})) == {
        "x": [None, {"y": 0}]
    }


@pytest.mark.parametrize(
    ("description", "tensors"),
    [
        ("", None),
        ("nonsense", None),
        ("[" * 200_000, None),
        ("[" * 2_000 + "]" * 2_000, None),
        ('{"x":' * 3_000 + "null" + "}" * 3_000, None),
        ('{"x":"a","x":"a"}', None),
        ('{"x":"a","\\ud800":null}', None),
        ('{"x":NaN}', None),
        ("[1,2]", None),
        ('"a"', None),
        ("null", None),
        ({"x": "q"}, None),
        ({"x": 1}, None),
        ({"x": True}, None),
        ({"x": []}, None),
        ({"x": ["d"]}, None),
        ({"x": [["l"]]}, None),
        ({"x": ["l", "a"]}, None),
        ({"y": "a"}, None),
        ({"x": "a", "y": "a"}, None),
        ({}, None),
        ({"x": "i"}, None),
        ({"x": "i"}, {"x": ("I32", [], bytes(4))}),
        ({"x": "i"}, {"x": ("I64", [1], bytes(8))}),
        ({"x": "I"}, {"x": ("I64", [1, 1], bytes(8))}),
        ({"x": "f"}, {"x": ("F32", [], bytes(4))}),
        ({"x": "s"}, {"x": ("I8", [1], b"a")}),
        ({"x": "s"}, {"x": ("U8", [1], b"\xff")}),
        ({"x": "S"}, {"x": ("U8", [1], b"a")}),
        ({"x": "S"}, {**TEXTS, "x\\offsets": ("I64", [3], struct.pack("<3q", 0, 2, 1))}),
        ({"x": "S"}, {**TEXTS, "x\\offsets": ("I64", [3], struct.pack("<3q", 1, 1, 2))}),
        ({"x": "S"}, {**TEXTS, "x\\offsets": ("I64", [3], struct.pack("<3q", 0, 1, 3))}),
        ({"x": "S"}, {**TEXTS, "x\\offsets": ("I64", [3], struct.pack("<3q", 0, -1, 2))}),
        ({"x": "S"}, {**TEXTS, "x\\offsets": ("I64", [0], b"")}),
        ({"x": "S"}, {**TEXTS, "x\\offsets": ("I64", [1, 3], struct.pack("<3q", 0, 1, 2))}),
        ({"x": "S"}, {**TEXTS, "x\\offsets": ("U64", [3], struct.pack("<3q", 0, 1, 2))}),
        ({"x": "S"}, {"x": ("U8", [3], "aé".encode()), "x\\offsets": ("I64", [3], struct.pack("<3q", 0, 2, 3))}),
        ({"x": "r"}, {**TEXTS, "x\\offsets": ("I64", [2], struct.pack("<2q", 0, 3))}),
        ({"x": "r"}, {"x": ("F32", [], bytes(4)), "x\\offsets": ("I64", [1], bytes(8))}),
    ],
)
def test_g2_a_description_that_does_not_fit_its_tensors_is_an_error(description, tensors):
    with pytest.raises(PayloadFormatError):
        unpack(image_of(description, tensors))


# --- ragged arrays ----------------------------------------------------------------------------------------------


def test_a_ragged_array_is_a_sequence_of_its_rows():
    ragged = Ragged.from_rows([[1, 2], [], [3]])
    assert [row.tolist() for row in ragged] == [[1, 2], [], [3]]
    assert ragged.lengths.tolist() == [2, 0, 1]
    assert (len(ragged), ragged[-1].tolist(), [row.tolist() for row in ragged[:2]]) == (3, [3], [[1, 2], []])
    assert ragged.values.dtype == np.int64
    with pytest.raises(IndexError, match="row 3 of a ragged array of 3 rows"):
        ragged[3]


def test_rows_of_a_ragged_array_are_views_and_may_have_more_dimensions():
    ragged = Ragged.from_rows([np.zeros((2, 3)), np.ones((1, 3))])
    assert ragged.values.shape == (3, 3)
    assert np.shares_memory(ragged[0], ragged.values)
    assert Ragged.from_rows([], np.float32).values.dtype == np.float32
    assert Ragged.from_rows([[], []]).offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("values", "offsets", "words"),
    [
        (np.zeros(3), [0, 2], "end with 3"),
        (np.zeros(3), [1, 3], "begin with 0"),
        (np.zeros(3), [0, 2, 1, 3], "never fall"),
        (np.zeros(3), [], "offsets"),
        (np.zeros(3), [0.0, 3.0], "must be integers"),
        (np.zeros(()), [0], "no dimension"),
    ],
)
def test_offsets_that_are_none_are_an_error(values, offsets, words):
    with pytest.raises(PayloadFormatError, match=words):
        Ragged(values, offsets)


@pytest.mark.parametrize("rows", [[1, 2], [np.zeros((2, 2)), np.zeros((1, 3))], ["a", [1]]])
def test_rows_that_do_not_go_together_are_an_error(rows):
    with pytest.raises(PayloadFormatError):
        Ragged.from_rows(rows)


# --- schemas ----------------------------------------------------------------------------------------------------

SCHEMA = PayloadSchema(
    {
        "tokens": RaggedSpec("I32", max_rows=8, max_values=100),
        "prompt": TextSpec(max_bytes=20),
        "names": TextSpec(many=True, max_bytes=50, max_rows=4, optional=True),
        "info": PayloadSchema({"reward": TensorSpec("F32", ())}),
        "mask": TensorSpec("BOOL", (None,), max_length=10),
    }
)
FITTING = {
    "tokens": [[1, 2], [3]],
    "prompt": "text",
    "names": ["a", "b"],
    "info": {"reward": 0.5},
    "mask": [True],
}


def test_a_schema_covers_nested_values_and_casts_them():
    values = unpack(pack(FITTING, SCHEMA), SCHEMA)
    assert values["tokens"].values.dtype == np.int32
    assert values["info"]["reward"].dtype == np.float32
    assert (values["prompt"], values["names"]) == ("text", ["a", "b"])
    without = {name: value for name, value in FITTING.items() if name != "names"}
    assert "names" not in unpack(pack(without, SCHEMA), SCHEMA)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": np.zeros(3)}, "field 'tokens' is a ndarray, expected ragged"),
        ({"tokens": [[0]] * 9}, "field 'tokens' has 9 rows, at most 8"),
        ({"tokens": [[0] * 101]}, "field 'tokens' has length 101, at most 100"),
        ({"tokens": [[0.5]]}, "field 'tokens' has dtype float64, which is not cast to I32"),
        ({"tokens": [np.zeros((1, 2), np.int32)]}, "field 'tokens' has shape"),
        ({"prompt": 3}, "field 'prompt' is a int, expected text"),
        ({"prompt": ["a"]}, "field 'prompt' is a list, expected text"),
        ({"prompt": "ä" * 11}, "field 'prompt' has 22 bytes of text, at most 20"),
        ({"names": "a"}, "field 'names' is a str, expected a list of texts"),
        ({"names": ["a"] * 5}, "field 'names' has 5 texts, at most 4"),
        ({"info": 3}, "field 'info' is a int, expected a mapping"),
        ({"info": {}}, "field 'info.reward' is missing"),
        ({"info": {"reward": 0.5, "x": 1}}, "field 'info.x' is not in the schema, which has reward"),
        ({"info": {"reward": "text"}}, "field 'info.reward'"),
        ({"other": 1}, "field 'other' is not in the schema"),
    ],
)
def test_a_nested_value_that_does_not_fit_its_schema_is_an_error_with_its_path(change, words):
    with pytest.raises((SchemaError, PayloadFormatError)) as caught:
        pack({**FITTING, **change}, SCHEMA)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [np.zeros(3, np.int32), "x"]}, "field 'tokens' is a list, expected ragged"),
        ({"tokens": Ragged.from_rows([[1]])}, "field 'tokens' has dtype int64, expected I32"),
        ({"prompt": {"x": 1}}, "field 'prompt' is a dict, expected text"),
        ({"info": "x"}, "field 'info' is a str, expected a mapping"),
        ({"info": {"reward": 0.5}}, "field 'info.reward' is a float, expected an array"),
        ({"mask": "x"}, "field 'mask' is a str, expected an array"),
    ],
)
def test_a_nested_payload_of_another_schema_is_an_error_when_it_is_read(change, words):
    fitting = {**unpack(pack(FITTING, SCHEMA)), **change}
    with pytest.raises(SchemaError) as caught:
        unpack(pack(fitting), SCHEMA)
    assert words in str(caught.value)


def test_the_largest_payload_of_a_nested_schema_has_the_size_that_is_computed():
    largest = {
        "tokens": [[0] * 100, *[[]] * 7],
        "prompt": "x" * 20,
        "names": ["y" * 50, "", "", ""],
        "info": {"reward": 1.0},
        "mask": [True] * 10,
    }
    assert len(pack(largest, SCHEMA)) == max_nbytes(SCHEMA)
    with pytest.raises(SchemaError, match="'text' has a dimension without a limit"):
        max_nbytes(PayloadSchema({"text": TextSpec()}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: TextSpec(max_bytes=-1),
        lambda: TextSpec(max_rows=2),
        lambda: TextSpec(many=True, max_rows=True),
        lambda: RaggedSpec("F32", max_rows=-1),
        lambda: RaggedSpec("F32", max_values="many"),
        lambda: RaggedSpec("F32", (-1,)),
        lambda: PayloadSchema({"x": {"y": TensorSpec("F32", ())}}),
    ],
)
def test_a_limit_that_is_none_is_an_error(make):
    with pytest.raises(SchemaError):
        make()


def test_a_schema_of_nested_values_has_no_arrays_to_check():
    with pytest.raises(SchemaError, match="field 'prompt' is described by TextSpec"):
        PayloadSchema({"prompt": TextSpec()}).check({"prompt": "x"})
