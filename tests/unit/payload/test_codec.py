import gc
import json
import math
import mmap
import os
import pickle
import struct
import weakref
from types import MappingProxyType

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dray.errors import PayloadFormatError, PayloadTooLargeError, SchemaError
from dray.payload import PayloadSchema, TensorSpec, header, max_nbytes, pack, plan, unpack, unpack_metadata
from dray.payload.codec import plan_rows
from dray.payload.schema import DTYPES

# NumPy 1 has no such dtype.
STRINGS = np.array(["a"], np.dtypes.StringDType() if hasattr(np.dtypes, "StringDType") else np.str_)

SHAPES = [(), (0,), (1,), (7,), (3, 5), (0, 4), (2, 0, 3), (2, 3, 4)]
NUMPY_NATIVE = [name for name in DTYPES if name not in ("BF16", "F8_E4M3", "F8_E5M2")]


def sample(name, shape):
    nbytes = math.prod(shape) * DTYPES[name].itemsize
    if name == "BOOL":
        return np.asarray(np.arange(nbytes) % 3 == 0).reshape(shape)
    return (
        np.frombuffer(bytes(range(1, 60)) * (nbytes // 59 + 1), np.uint8)[:nbytes]
        .view(DTYPES[name])
        .reshape(shape)
    )


def image_of(header, tensors=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + tensors


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}}


def assert_same(left, right):
    assert list(left) == list(right)
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        assert array.shape == right[name].shape, name
        assert array.tobytes() == right[name].tobytes(), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape_round_trips(name, shape):
    arrays = {"x": sample(name, shape)}
    assert_same(unpack(pack(arrays)), arrays)


@pytest.mark.parametrize("name", DTYPES)
def test_the_official_library_reads_what_pack_wrote(name):
    arrays = {f"field {index}": sample(name, shape) for index, shape in enumerate(SHAPES)}
    read = dict(safetensors.deserialize(bytes(pack(arrays))))
    assert read.keys() == arrays.keys()
    for field, array in arrays.items():
        assert read[field]["dtype"] == name
        assert tuple(read[field]["shape"]) == array.shape
        assert bytes(read[field]["data"]) == array.tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_unpack_reads_what_the_official_library_wrote(name):
    arrays = {f"field {index}": sample(name, shape) for index, shape in enumerate(SHAPES)}
    image = safetensors.numpy.save(arrays, {"made": "elsewhere"})
    read = unpack(image)
    assert read.keys() == arrays.keys()
    assert_same({field: read[field] for field in arrays}, arrays)
    assert unpack_metadata(image) == {"made": "elsewhere"}


def test_the_official_numpy_interface_and_dray_agree_on_a_mixed_payload():
    arrays = {name: sample(name, (3, 2)) for name in NUMPY_NATIVE}
    loaded = safetensors.numpy.load(bytes(pack(arrays)))
    assert_same({name: loaded[name] for name in arrays}, arrays)
    read = unpack(safetensors.numpy.save(arrays))
    assert_same({name: read[name] for name in arrays}, arrays)


def test_views_are_aligned_and_the_data_region_starts_at_a_multiple_of_64():
    arrays = {name.lower(): sample(name, (5, 3)) for name in reversed(DTYPES)}
    image = pack(arrays)
    (length,) = struct.unpack_from("<Q", image)
    assert (8 + length) % 64 == 0
    header = json.loads(image[8 : 8 + length])
    starts = [(header[name]["data_offsets"][0], array.itemsize) for name, array in arrays.items()]
    assert [size for _, size in sorted(starts)] == sorted((size for _, size in starts), reverse=True)
    for array in unpack(image).values():
        assert array.flags.aligned


def test_tensors_of_one_item_size_keep_their_order():
    image = pack({"b": np.zeros(2, "f4"), "a": np.zeros(2, "i4"), "wide": np.zeros(1, "f8")})
    header = json.loads(image[8 : 8 + struct.unpack_from("<Q", image)[0]])
    assert sorted(header, key=lambda name: header[name]["data_offsets"]) == ["wide", "b", "a"]
    assert list(unpack(image)) == ["b", "a", "wide"]


def test_no_arrays_make_an_image_of_one_header():
    image = pack({})
    assert len(image) == 64
    assert unpack(image) == {}
    assert safetensors.deserialize(bytes(image)) == []


def test_plan_writes_into_a_larger_target_and_leaves_the_rest_alone():
    planned = plan({"x": np.arange(5.0)})
    target = bytearray(b"\xaa" * (planned.nbytes + 10))
    planned.write(memoryview(target))
    assert unpack(target[: planned.nbytes])["x"].tolist() == [0, 1, 2, 3, 4]
    assert target[planned.nbytes :] == b"\xaa" * 10


@pytest.mark.parametrize("apart", [0, 64], ids=["close", "apart"])
def test_rows_of_columns_are_written_as_the_images_that_pack_makes_of_them(apart):
    columns = {
        "wide": sample("F32", (5, 3, 4)),
        "halves": sample("BF16", (5, 7)),
        "big endian": sample("I32", (5, 2)).astype(">i4"),
        "number": sample("I64", (5,)),
        "flags": sample("BOOL", (5, 9))[:, ::2],
        "empty": sample("F64", (5, 0, 3)),
        "transposed": sample("F64", (4, 5)).T,
    }
    planned = plan_rows(columns)
    assert planned.count == 5
    memory = np.full((7, planned.nbytes + apart), 0xAA, np.uint8)
    planned.write(memory[1:4, : planned.nbytes])
    planned.write(memory[4:6, : planned.nbytes], 3)
    for row in range(5):
        expected = pack({name: column[row, ...] for name, column in columns.items()})
        assert memory[1 + row, : planned.nbytes].tobytes() == bytes(expected)
    assert (memory[[0, 6]] == 0xAA).all()
    assert (memory[:, planned.nbytes :] == 0xAA).all()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"a": np.zeros(2), "b": np.zeros((3, 1))}, "one length"),
        ({"a": np.zeros(())}, "one length"),
        ({}, "one length"),
        ({"a": np.zeros(2, "M8[s]")}, "datetime64"),
    ],
)
def test_columns_without_one_length_or_of_other_dtypes_are_refused(columns, words):
    with pytest.raises(PayloadFormatError, match=words):
        plan_rows(columns)


def test_a_plan_can_be_written_twice():
    planned = plan({"x": np.arange(5.0)})
    first, second = bytearray(planned.nbytes), bytearray(planned.nbytes)
    planned.write(first)
    planned.write(second)
    assert first == second == pack({"x": np.arange(5.0)})


def test_a_target_that_is_too_small_gives_both_sizes_and_is_not_touched():
    planned = plan({"x": np.arange(5.0)})
    target = bytearray(planned.nbytes - 1)
    with pytest.raises(PayloadTooLargeError, match=f"{planned.nbytes}.*{planned.nbytes - 1}"):
        planned.write(target)
    assert not any(target)


def test_a_read_only_target_is_refused():
    planned = plan({"x": np.arange(5.0)})
    with pytest.raises(PayloadFormatError, match="read-only"):
        planned.write(bytes(planned.nbytes))


@pytest.mark.parametrize(
    "source",
    [
        np.arange(24.0).reshape(4, 6)[::2, ::-3],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
        np.broadcast_to(np.arange(3.0), (4, 3)),
        np.arange(5.0)[::-1],
    ],
    ids=["strided", "fortran", "transposed", "broadcast", "reversed"],
)
def test_arrays_that_are_not_contiguous_are_packed_right(source):
    read = unpack(pack({"x": source}))["x"]
    assert read.flags.c_contiguous
    assert np.array_equal(read, source)


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2", ">u8", ">c8"])
def test_big_endian_arrays_become_little_endian(dtype):
    source = np.arange(1, 6).astype(dtype)
    read = unpack(pack({"x": source}))["x"]
    assert read.dtype == np.dtype(dtype).newbyteorder("<")
    assert np.array_equal(read, source)


def test_lists_numbers_and_numpy_scalars_are_arrays_too():
    read = unpack(
        pack({"rewards": [1.0, 0.5], "length": 2, "done": True, "value": np.float32(3), "ids": ((1, 2),)})
    )
    assert read["rewards"].tolist() == [1.0, 0.5]
    assert (read["length"].shape, read["length"].dtype, int(read["length"])) == ((), np.int64, 2)
    assert read["done"].dtype == np.bool_
    assert read["value"].dtype == np.float32
    assert read["ids"].shape == (1, 2)


def test_array_subclasses_are_packed_as_arrays(tmp_path):
    mapped = np.memmap(tmp_path / "file", dtype="f4", mode="w+", shape=(3,))
    mapped[:] = [1, 2, 3]
    assert unpack(pack({"x": mapped}))["x"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(2, np.complex128),
        np.zeros(2, np.longdouble),
        np.array(["a"]),
        np.array([b"a"]),
        np.array([object()]),
        np.array(["2020-01-01"], "M8[D]"),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, ml_dtypes.float8_e4m3b11fnuz),
        np.zeros(2, ml_dtypes.int4),
        STRINGS,
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_other_dtypes_are_an_error_that_names_field_and_dtype(value):
    with pytest.raises(
        PayloadFormatError, match=r"'odd' has dtype " + str(np.asarray(value).dtype).split("[")[0][:3]
    ):
        pack({"fine": np.zeros(2), "odd": value})


class _Opaque: ...


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (_Opaque(), "is a _Opaque"),
        ([[1, 2], [3]], "lists of different lengths"),
        (np.ma.masked_less(np.arange(4.0), 2), "is a masked array, whose mask is not carried"),
        (np.ma.masked, "is a masked array"),
        ([np.ma.masked_less(np.arange(4.0), 2)], "is a list of masked arrays, whose masks are not carried: fill"),
        (([[0.0, 1.0]], [np.ma.masked_less(np.arange(2.0), 1)]), "is a tuple of masked arrays"),
    ],
)
def test_what_is_no_array_is_an_error_that_names_field_and_kind(value, words):
    with pytest.raises(PayloadFormatError) as caught:
        pack({"odd": value})
    assert "field 'odd'" in str(caught.value)
    assert words in str(caught.value)


def test_a_dtype_that_cannot_be_carried_is_an_error_in_a_schema():
    with pytest.raises(PayloadFormatError, match="cannot be carried: give text as str"):
        TensorSpec.of(STRINGS.dtype)


def test_what_is_no_array_is_an_error_with_a_schema_as_well():
    schema = PayloadSchema({"odd": TensorSpec("F32", (None,))})
    for value in (np.ma.masked_less(np.arange(4.0), 2), STRINGS, {"x": 1}):
        with pytest.raises(PayloadFormatError, match="field 'odd'"):
            pack({"odd": value}, schema)


class Raising:
    def __array__(self, dtype=None, copy=None):
        raise ZeroDivisionError("the source is broken")


@pytest.mark.parametrize("value", [[[1, 2], [3]], Raising()], ids=["ragged", "raising"])
def test_a_value_that_is_no_array_is_an_error_that_names_the_field(value):
    with pytest.raises(PayloadFormatError, match="'odd' cannot be read as an array"):
        plan({"odd": value})


@pytest.mark.parametrize("name", ["__metadata__", 3, None, b"x", "\ud800"])
def test_names_that_cannot_be_carried_are_refused(name):
    with pytest.raises(PayloadFormatError):
        pack({name: np.zeros(2)})


@pytest.mark.parametrize("name", ["", " ", 'quote"', "back\\slash", "new\nline", "snow ☃ 𝄞", "\x00"])
def test_unusual_names_round_trip_and_the_official_library_reads_them(name):
    image = pack({name: np.arange(3)}, metadata={name: name})
    assert unpack(image)[name].tolist() == [0, 1, 2]
    assert unpack_metadata(image) == {name: name}
    assert safetensors.deserialize(bytes(image))[0][0] == name


@pytest.mark.parametrize("arrays", [None, [("x", np.zeros(1))], np.zeros(3)], ids=["none", "list", "array"])
def test_arrays_must_be_a_mapping(arrays):
    with pytest.raises(PayloadFormatError, match="mapping"):
        pack(arrays)


def test_any_mapping_is_packed():
    assert list(unpack(pack(MappingProxyType({"x": np.zeros(2)})))) == ["x"]


def test_metadata_is_kept_beside_the_tensors(tmp_path):
    image = pack({"x": np.arange(3)}, metadata={"policy": "7", "note": "é"})
    assert unpack_metadata(image) == {"policy": "7", "note": "é"}
    assert list(unpack(image)) == ["x"]
    (tmp_path / "dump.safetensors").write_bytes(image)
    with safetensors.safe_open(tmp_path / "dump.safetensors", "numpy") as dump:
        assert dump.metadata() == {"policy": "7", "note": "é"}
    assert unpack_metadata(pack({"x": np.arange(3)}, metadata={})) == {}
    assert unpack_metadata(pack({"x": np.arange(3)}, metadata={"long": "l" * 10_000})) == {"long": "l" * 10_000}


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"a": None}, ["a"], {"a": "\ud800"}], ids=str)
def test_metadata_must_map_strings_to_strings(metadata):
    with pytest.raises(PayloadFormatError):
        pack({}, metadata=metadata)


def test_a_header_that_grows_too_long_is_refused():
    with pytest.raises(PayloadFormatError, match="header needs"):
        pack({}, metadata={"x": "x" * header.MAX_HEADER_BYTES})


def test_many_fields_round_trip():
    arrays = {f"layer.{index}": np.full(index % 5, index) for index in range(400)}
    assert_same(unpack(pack(arrays)), arrays)


def test_most_tensors_round_trip_and_one_more_is_refused_on_both_sides():
    empty = np.empty(0, np.uint8)
    arrays = {str(index): empty for index in range(header.MAX_TENSORS)}
    assert len(unpack(pack(arrays))) == header.MAX_TENSORS
    with pytest.raises(PayloadFormatError, match="at most 16384 tensors; this one has 16385"):
        pack({**arrays, "one more": empty})
    described = ",".join(
        f'"{index}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for index in range(header.MAX_TENSORS + 1)
    )
    with pytest.raises(PayloadFormatError, match="at most 16384 tensors; this one has 16385"):
        unpack(image_of(f"{{{described}}}".encode()))


LONG = "\x1b[2Jforged\n" + "x" * 1_000_000


@pytest.mark.parametrize(
    "described",
    [
        {LONG: 0},
        {LONG: {"dtype": LONG, "shape": [], "data_offsets": [0, 4]}},
        {LONG: {"dtype": "F32", "shape": LONG, "data_offsets": [0, 4]}},
        {LONG: {"dtype": "F32", "shape": [], "data_offsets": LONG}},
        {LONG: {"dtype": "F32", "shape": [], "data_offsets": [1, 5]}},
        {LONG: {"dtype": "F32", "shape": [1 << 62, 2], "data_offsets": [0, 4]}},
        {"x": {"dtype": LONG, "shape": [], "data_offsets": [0, 4]}},
        {"__metadata__": LONG},
    ],
)
def test_error_about_an_image_is_one_short_line_whatever_the_image_holds(described):
    with pytest.raises(PayloadFormatError) as caught:
        unpack(image_of(json.dumps(described).encode()))
    assert len(str(caught.value)) < 2000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "arrays", [{LONG: {1: 2}}, {LONG: np.array(["text"])}, {LONG: b"bytes"}, {LONG: [[1], [2, 3]]}]
)
def test_error_about_an_array_is_one_short_line_whatever_its_name(arrays):
    with pytest.raises(PayloadFormatError) as caught:
        pack(arrays)
    assert len(str(caught.value)) < 2000
    assert str(caught.value).isprintable()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


def test_too_many_dimensions_are_refused_on_both_sides():
    with pytest.raises(PayloadFormatError, match="dimensions"):
        header.build_header([("x", np.dtype("f4"), (1,) * 33)], None)
    with pytest.raises(PayloadFormatError, match="shape"):
        unpack(image_of(one(shape=(1,) * 33, offsets=(0, 4)), bytes(4)))
    arrays = {"x": np.zeros((1,) * 32)}
    assert_same(unpack(pack(arrays)), arrays)


# --- views ----------------------------------------------------------------------------------------------------


def test_views_are_writable_exactly_where_the_image_is():
    image = pack({"x": np.zeros(3), "n": 1})
    assert not any(array.flags.writeable for array in unpack(bytes(image)).values())
    assert not any(array.flags.writeable for array in unpack(memoryview(image).toreadonly()).values())
    unpack(image)["x"][:] = 7
    assert unpack(image)["x"].tolist() == [7, 7, 7]


def test_views_lock_a_resizable_image():
    image = pack({"x": np.zeros(3)})
    arrays = unpack(image)
    with pytest.raises(BufferError):
        image.extend(b"more")
    del arrays
    image.extend(b"more")


def test_every_view_keeps_the_root_array_alive():
    image = bytes(pack({name: sample(name, (2, 3)) for name in DTYPES} | {"scalar": 1, "empty": np.zeros((0, 2))}))
    names = set(unpack(image))
    assert names == {*DTYPES, "scalar", "empty"}
    for kept in names:
        root = np.frombuffer(image, np.uint8)
        alive = weakref.ref(root)
        arrays = unpack(root)
        assert all(array.base is root for array in arrays.values())
        del root
        view = arrays.pop(kept)
        del arrays
        part = view[...].reshape(-1)[:1]
        del view
        gc.collect()
        assert alive() is not None, kept
        del part
        assert alive() is None, kept


def test_a_root_on_a_slice_of_a_mapping_is_the_base_of_its_views():
    planned = plan({"x": np.arange(4), "y": np.zeros(3, np.float32)})
    with mmap.mmap(-1, 8192) as memory:
        planned.write(memoryview(memory)[4096 : 4096 + planned.nbytes])
        root = np.frombuffer(memory, np.uint8, planned.nbytes, 4096)
        alive = weakref.ref(root)
        arrays = unpack(root)
        del root
        assert arrays["x"].tolist() == [0, 1, 2, 3]
        assert alive() is not None
        del arrays
        assert alive() is None


def test_a_read_only_mapping_gives_read_only_views():
    planned = plan({"x": np.arange(4)})
    descriptor = os.memfd_create("image")
    try:
        os.ftruncate(descriptor, planned.nbytes)
        with mmap.mmap(descriptor, planned.nbytes) as memory:
            planned.write(memory)
        with mmap.mmap(descriptor, planned.nbytes, prot=mmap.PROT_READ) as memory:
            arrays = unpack(memory)
            assert arrays["x"].tolist() == [0, 1, 2, 3]
            assert not arrays["x"].flags.writeable
            del arrays
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("padding", range(8))
def test_misaligned_tensors_of_foreign_images_are_copied(padding):
    values = np.arange(3.0)
    text = json.dumps(one("F64", (3,), (0, 24))).encode()
    image = image_of(text + b" " * (-len(text) % 8 + padding), values.tobytes())
    for writable in (False, True):
        array = unpack(bytearray(image) if writable else image)["x"]
        assert array.flags.aligned
        assert array.flags.writeable == writable
        assert np.array_equal(array, values)


def test_an_image_that_itself_lies_misaligned_is_read():
    image = pack({"x": np.arange(3.0), "bytes": np.arange(3, dtype=np.uint8)})
    memory = np.zeros(len(image) + 16, np.uint8)
    for shift in range(9):
        memory[shift : shift + len(image)] = np.frombuffer(image, np.uint8)
        arrays = unpack(memory[shift : shift + len(image)])
        assert all(array.flags.aligned for array in arrays.values())
        assert arrays["x"].tolist() == [0, 1, 2]
        assert np.shares_memory(arrays["bytes"], memory)


def test_sources_and_views_larger_than_a_structured_dtype_can_be_are_handled_one_by_one(monkeypatch):
    arrays = {"x": np.arange(6.0).reshape(2, 3), "n": np.asarray(4), "e": np.zeros((0, 2))}
    monkeypatch.setattr(header, "MAX_RECORD_BYTES", 0)
    header.cached_build.cache_clear()
    header.cached_parse.cache_clear()
    try:
        root = np.frombuffer(pack(arrays), np.uint8)
        read = unpack(root)
        assert_same(read, arrays)
        assert all(array.base is root for array in read.values())
    finally:
        header.cached_build.cache_clear()
        header.cached_parse.cache_clear()


def test_an_empty_array_with_a_huge_dimension_round_trips():
    arrays = {"x": np.zeros((0, 1 << 40), np.uint8), "y": np.arange(3)}
    assert_same(unpack(pack(arrays)), arrays)


def test_equal_layouts_share_one_header():
    header.cached_build.cache_clear()
    for _ in range(3):
        pack({"x": np.zeros(3), "y": np.zeros((2, 2), np.int8)})
    assert header.cached_build.cache_info().misses == 1
    pack({"x": np.zeros(4), "y": np.zeros((2, 2), np.int8)})
    pack({"x": np.zeros(4, np.float32), "y": np.zeros((2, 2), np.int8)})
    pack({"x": np.zeros(4, np.float32), "y": np.zeros((2, 2), np.int8)}, metadata={"a": "b"})
    assert header.cached_build.cache_info().misses == 4


def test_the_caches_are_bounded():
    for length in range(header.MAX_CACHED_HEADERS + 50):
        unpack(pack({"x": np.zeros(length, np.uint8)}))
    assert header.cached_build.cache_info().currsize == header.MAX_CACHED_HEADERS
    assert header.cached_parse.cache_info().currsize == header.MAX_CACHED_HEADERS


# --- untrusted images -----------------------------------------------------------------------------------------

DEEP = b'{"x":' * 100_000

BAD_HEADERS = {
    "no object": b"[]",
    "leading space": b' {"x":1}',
    "not JSON": b'{"x":',
    "not UTF-8": b'{"\xff":1}',
    "UTF-16": '{"x":1}'.encode("utf-16-le"),
    "nested without end": DEEP,
    "trailing text": b"{}{}",
    "NaN": b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
    "Infinity": b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}',
    "duplicate tensor": b'{"x":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},'
    b'"x":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
    "duplicate key": b'{"x":{"dtype":"U8","dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
    "lone surrogate": b'{"\\ud800":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
    "integer of many digits": b'{"x":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
    "tensor is a list": {"x": []},
    "tensor is null": {"x": None},
    "missing dtype": {"x": {"shape": [8], "data_offsets": [0, 8]}},
    "unknown key": one(offset=0),
    "unknown dtype": one("F8_E8M0", (8,)),
    "dtype is a number": one(3),
    "dtype is a list": one(["F32"]),
    "shape is a number": {"x": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
    "shape with a float": one(shape=(2.0,)),
    "shape with a bool": one("F64", (True,)),
    "shape with a string": one(shape=("2",)),
    "negative dimensions": one(shape=(-1, -2)),
    "dimensions that overflow": one(shape=(1 << 62, 1 << 62, 2)),
    "dimensions that wrap to the right size": one(shape=(1 << 63, 2), offsets=(0, 8)),
    "huge dimension of an empty tensor": one(shape=(0, 1 << 62, 4), offsets=(0, 0)),
    "dimension beyond 64 bit": one(shape=(0, 1 << 64), offsets=(0, 0)),
    "three offsets": one(offsets=(0, 8, 8)),
    "one offset": one(offsets=(0,)),
    "offsets are an object": {"x": {"dtype": "F32", "shape": [2], "data_offsets": {"0": 0, "1": 8}}},
    "negative offset": one(offsets=(-8, 0)),
    "offset with a bool": one("U8", (7,), (True, 8)),
    "offsets reversed": one(offsets=(8, 0)),
    "size does not fit the shape": one(shape=(3,)),
    "hole at the start": one(shape=(1,), offsets=(4, 8)),
    "beyond the end": one(shape=(4,), offsets=(0, 16)),
    "before the end": one(shape=(1,), offsets=(0, 4)),
    "nothing described": {},
    "overlap": one(shape=(2,)) | {"y": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}},
    "the same place twice": one(shape=(2,)) | {"y": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}},
    "empty tensor inside another": one(shape=(2,)) | {"y": {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]}},
    "hole in the middle": one(shape=(1,), offsets=(0, 4))
    | {"y": {"dtype": "U8", "shape": [2], "data_offsets": [6, 8]}},
    "metadata with a number": one() | {"__metadata__": {"a": 1}},
    "metadata is a list": one() | {"__metadata__": []},
    "metadata is null": one() | {"__metadata__": None},
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_a_malformed_header_is_a_format_error(fault):
    image = image_of(BAD_HEADERS[fault], bytes(8))
    with pytest.raises(PayloadFormatError):
        unpack(image)
    with pytest.raises(PayloadFormatError):
        unpack_metadata(image)


@pytest.mark.parametrize("length", [9, 100, header.MAX_HEADER_BYTES + 1, 1 << 31, 1 << 63, (1 << 64) - 1])
def test_a_header_longer_than_the_image_is_refused_before_it_is_read(length):
    with pytest.raises(PayloadFormatError, match="claims"):
        unpack(image_of(b"{}      ", length=length))


def test_a_header_above_the_cap_is_refused_even_where_the_image_holds_it():
    image = bytes(header.MAX_HEADER_BYTES + 100)
    image = struct.pack("<Q", header.MAX_HEADER_BYTES + 1) + image[8:]
    with pytest.raises(PayloadFormatError, match="claims"):
        unpack(image)


@pytest.mark.parametrize("image", [b"", b"1234567", bytes(8)], ids=len)
def test_an_image_too_short_for_a_header_is_refused(image):
    with pytest.raises(PayloadFormatError):
        unpack(image)


@pytest.mark.parametrize(
    "image",
    [None, "text", 3, np.zeros(64, np.int8), np.zeros((8, 8), np.uint8), np.zeros(64, np.uint8)[::2]],
    ids=["none", "text", "number", "int8", "two-dimensional", "strided"],
)
def test_what_is_not_a_buffer_of_bytes_is_refused(image):
    with pytest.raises(PayloadFormatError):
        unpack(image)


def test_a_strided_memoryview_is_refused():
    with pytest.raises(PayloadFormatError):
        unpack(memoryview(bytes(64))[::2])


def test_bytes_after_the_last_tensor_or_missing_ones_are_refused():
    image = bytes(pack({"x": np.arange(3)}))
    for wrong in (image + b"\0", image[:-1], image[:64]):
        with pytest.raises(PayloadFormatError, match="bytes"):
            unpack(wrong)


def test_a_long_header_is_read_without_the_cache():
    image = pack({"x" * header.MAX_CACHED_HEADER_BYTES: np.arange(3)})
    assert [array.tolist() for array in unpack(image).values()] == [[0, 1, 2]]


# --- with a schema --------------------------------------------------------------------------------------------

SCHEMA = PayloadSchema(
    {
        "observations": TensorSpec("F32", (None, 4), max_length=10),
        "rewards": TensorSpec("F32", (None,)),
        "note": TensorSpec("U8", (), optional=True),
    }
)


def test_pack_casts_straight_into_the_image_and_unpack_checks_it():
    image = pack({"observations": np.ones((3, 4)), "rewards": [1, 2.5, 3]}, SCHEMA)
    read = unpack(image, SCHEMA)
    assert read["observations"].dtype == read["rewards"].dtype == np.float32
    assert read["rewards"].tolist() == [1, 2.5, 3]


def test_unpack_refuses_what_does_not_fit_the_schema():
    with pytest.raises(SchemaError, match="'rewards'"):
        unpack(pack({"observations": np.ones((3, 4), "f4")}), SCHEMA)
    with pytest.raises(SchemaError, match="'rewards' has dtype"):
        unpack(pack({"observations": np.ones((3, 4), "f4"), "rewards": np.ones(3)}), SCHEMA)


def test_a_cast_that_meets_a_value_out_of_range_fails_and_the_next_write_works():
    target = bytearray(1024)
    bad = plan({"observations": np.full((3, 4), 1e300), "rewards": [0.0]}, SCHEMA)
    with pytest.raises(SchemaError, match="'observations' has values outside the range of F32"):
        bad.write(target)
    good = plan({"observations": np.full((3, 4), 1e3), "rewards": [0.0]}, SCHEMA)
    good.write(target)
    assert unpack(target[: good.nbytes], SCHEMA)["observations"].max() == 1e3


def test_max_nbytes_is_the_size_of_the_largest_image_that_fits():
    schema = PayloadSchema(
        {
            "observations": TensorSpec("F32", (None, 4), max_length=10),
            "rewards": TensorSpec("F64", (None,), max_length=10),
            "note": TensorSpec("U8", (), optional=True),
        }
    )
    largest = {"observations": np.ones((10, 4), "f4"), "rewards": np.ones(10), "note": np.uint8(1)}
    assert max_nbytes(schema) == len(pack(largest, schema))
    assert max_nbytes(schema) >= len(pack({"observations": np.ones((9, 4), "f4"), "rewards": np.ones(9)}, schema))
    with pytest.raises(SchemaError, match="'rewards'"):
        max_nbytes(SCHEMA)
