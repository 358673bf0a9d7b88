import copy
import logging

import ml_dtypes
import numpy as np
import pytest

from dray.errors import PayloadFormatError, SchemaError
from dray.payload import PayloadSchema, TensorSpec
from dray.payload.schema import DTYPES, cast_between


def schema_of(dtype, shape=(None,), **more):
    return PayloadSchema({"x": TensorSpec(dtype, shape, **more)})


@pytest.mark.parametrize("name", DTYPES)
def test_a_spec_is_built_from_names_and_from_numpy_dtypes(name):
    spec = TensorSpec.of(DTYPES[name], (None, 4), max_length=3, optional=True)
    assert spec == TensorSpec(name, (None, 4), 3, True)
    assert spec.numpy_dtype == DTYPES[name]


def test_a_spec_takes_what_numpy_takes_as_dtype():
    assert TensorSpec.of(">f4").dtype == "F32"
    assert TensorSpec.of(bool).dtype == "BOOL"
    assert TensorSpec.of(ml_dtypes.bfloat16, [2, 3]).shape == (2, 3)


@pytest.mark.parametrize("dtype", [np.complex128, "nonsense", object, "M8[s]"])
def test_a_spec_of_another_dtype_is_refused(dtype):
    with pytest.raises(PayloadFormatError):
        TensorSpec.of(dtype)


@pytest.mark.parametrize("dtype", ["float32", "f32", ""])
def test_a_spec_of_an_unknown_name_is_refused(dtype):
    with pytest.raises(PayloadFormatError, match="known are BOOL"):
        TensorSpec(dtype, ())


@pytest.mark.parametrize(
    ("shape", "max_length"),
    [((-1,), None), ((2.0,), None), ((True,), None), ((), 3), ((None,), -1), ((None,), 2.0), ((1,) * 33, None)],
)
def test_a_shape_that_makes_no_sense_is_refused(shape, max_length):
    with pytest.raises(SchemaError):
        TensorSpec("F32", shape, max_length)


@pytest.mark.parametrize(
    ("spec", "largest"),
    [
        (TensorSpec("F32", ()), ()),
        (TensorSpec("F32", (3, 4)), (3, 4)),
        (TensorSpec("F32", (None, 4), 7), (7, 4)),
        (TensorSpec("F32", (3, 4), 2), (2, 4)),
        (TensorSpec("F32", (None, 4)), None),
        (TensorSpec("F32", (3, None)), None),
    ],
)
def test_the_largest_shape_of_a_spec(spec, largest):
    assert spec.max_shape == largest


def test_a_schema_is_a_mapping():
    spec = TensorSpec("F32", (None,))
    schema = PayloadSchema({"x": spec})
    assert schema["x"] is spec
    assert list(schema) == ["x"]
    assert len(schema) == 1
    assert schema == {"x": spec}
    assert "TensorSpec" in repr(schema)
    assert copy.deepcopy(schema) == schema


@pytest.mark.parametrize("fields", [{1: TensorSpec("F32", ())}, {"x": "F32"}, {"x": None}], ids=str)
def test_a_schema_of_anything_else_is_refused(fields):
    with pytest.raises(SchemaError):
        PayloadSchema(fields)


def test_an_array_that_fits_is_passed_on_without_a_copy():
    array = np.zeros((3, 2), np.float32)
    assert schema_of("F32", (None, 2)).check({"x": array})["x"] is array


def test_a_big_endian_array_comes_back_in_the_dtype_of_the_field():
    checked = schema_of("F32").check({"x": np.arange(3, dtype=">f4")})["x"]
    assert checked.dtype == np.dtype("<f4")
    assert checked.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ((3,), TensorSpec("F32", (None, 4)), r"'x' has shape \(3,\), expected \(None, 4\)"),
        ((3, 5), TensorSpec("F32", (None, 4)), r"'x' has shape \(3, 5\)"),
        ((3, 4, 1), TensorSpec("F32", (None, 4)), "'x' has shape"),
        ((3, 4), TensorSpec("F32", (2, 4)), "'x' has shape"),
        ((), TensorSpec("F32", (None,)), "'x' has shape"),
        ((11, 4), TensorSpec("F32", (None, 4), max_length=10), "'x' has length 11, at most 10"),
    ],
)
def test_a_shape_that_does_not_fit_is_an_error_that_names_the_field(shape, spec, message):
    schema = PayloadSchema({"x": spec})
    with pytest.raises(SchemaError, match=message):
        schema.check({"x": np.zeros(shape, np.float32)})
    with pytest.raises(SchemaError, match=message):
        schema.verify({"x": np.zeros(shape, np.float32)})


def test_missing_and_unknown_fields_are_errors_that_name_them():
    schema = PayloadSchema({"a": TensorSpec("F32", ()), "b": TensorSpec("F32", (), optional=True)})
    one = np.float32(1)
    assert list(schema.check({"a": one})) == ["a"]
    assert list(schema.check({"b": one, "a": one})) == ["b", "a"]
    schema.verify({"a": np.asarray(one)})
    for call in (schema.check, schema.verify):
        with pytest.raises(SchemaError, match="'a' is missing"):
            call({"b": np.asarray(one)})
        with pytest.raises(SchemaError, match="'c' is not in the schema"):
            call({"a": np.asarray(one), "c": np.asarray(one)})


def test_verify_casts_nothing():
    with pytest.raises(SchemaError, match="'x' has dtype float64, expected F32"):
        schema_of("F32").verify({"x": np.zeros(3)})


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (np.float32, "F64"),
        (np.float16, "F32"),
        (ml_dtypes.bfloat16, "F32"),
        (ml_dtypes.float8_e4m3fn, "F16"),
        (ml_dtypes.float8_e5m2, "BF16"),
        (np.int32, "I64"),
        (np.uint8, "I16"),
        (np.bool_, "F32"),
        (np.bool_, "U8"),
        (np.int32, "F64"),
        (np.float32, "C64"),
    ],
)
def test_a_cast_that_keeps_every_value_is_silent(source, target, caplog):
    checked = schema_of(target).check({"x": np.asarray([0, 1, 1]).astype(source)})["x"]
    assert checked.dtype == DTYPES[target]
    assert checked.tolist() == [0, 1, 1]
    assert not caplog.records


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (np.float64, "F32"),
        (np.float32, "BF16"),
        (np.float64, "F8_E4M3"),
        (ml_dtypes.bfloat16, "F16"),
        (np.int64, "I32"),
        (np.int64, "U8"),
        (np.int64, "F32"),
        (np.longdouble, "F64"),
        (np.complex128, "C64"),
        (">f8", "F32"),
    ],
)
def test_a_narrowing_cast_is_done_and_warned_about_once_per_field(source, target, caplog):
    schema = PayloadSchema({"x": TensorSpec(target, (None,)), "y": TensorSpec(target, (None,))})
    for _ in range(3):
        checked = schema.check({name: np.asarray([0, 1, 2]).astype(source) for name in "xy"})
        assert checked["x"].dtype == DTYPES[target]
        assert checked["x"].tolist() == [0, 1, 2]
    assert [(record.name, record.levelno) for record in caplog.records] == [("dray.payload", logging.WARNING)] * 2
    assert "'x' is narrowed" in caplog.records[0].getMessage()
    assert "'y' is narrowed" in caplog.records[1].getMessage()


def test_lists_and_numbers_take_the_dtype_of_the_field_without_a_warning(caplog):
    schema = PayloadSchema(
        {
            "rewards": TensorSpec("F32", (None,)),
            "length": TensorSpec("I32", ()),
            "done": TensorSpec("BOOL", (None,)),
        }
    )
    checked = schema.check({"rewards": [1, 0.5], "length": 2, "done": [True, False]})
    assert checked["rewards"].dtype == np.float32
    assert checked["length"].dtype == np.int32
    assert not caplog.records


@pytest.mark.parametrize("target", DTYPES)
def test_an_empty_list_fits_every_dtype(target):
    assert schema_of(target).check({"x": []})["x"].dtype == DTYPES[target]


@pytest.mark.parametrize(
    ("value", "target"),
    [
        (np.ones(2), "I64"),
        (np.ones(2), "BOOL"),
        (np.ones(2, np.int64), "BOOL"),
        (np.ones(2, np.complex64), "F64"),
        ([0.5], "U8"),
        ([1], "BOOL"),
    ],
)
def test_a_cast_to_a_poorer_kind_is_refused(value, target):
    with pytest.raises(SchemaError, match="'x' has dtype .* not cast to " + target):
        schema_of(target).check({"x": value})


@pytest.mark.parametrize(
    ("value", "target"),
    [
        (np.array([300]), "U8"),
        (np.array([-1]), "U64"),
        ([256], "U8"),
        (np.array([2**40]), "I32"),
        (np.array([2**63], np.uint64), "I64"),
        (np.array([1e300]), "F32"),
        (np.array([1e5]), "F16"),
        (np.array([1e4]), "F8_E4M3"),
        (np.array([100_000]), "F16"),
        ([1e300], "F32"),
    ],
)
def test_a_value_outside_the_range_is_refused_instead_of_changed(value, target):
    with pytest.raises(SchemaError, match="'x' has values .*outside the range of " + target):
        schema_of(target).check({"x": value})


def test_infinities_and_nan_survive_a_narrowing_cast():
    checked = schema_of("F32").check({"x": np.array([np.inf, -np.inf, np.nan, 1.0])})["x"]
    assert np.array_equal(checked, np.array([np.inf, -np.inf, np.nan, 1], np.float32), equal_nan=True)


@pytest.mark.parametrize(
    "value",
    [np.array(["a"]), np.array([object()]), np.zeros(1, ml_dtypes.int4)],
    ids=["strings", "objects", "int4"],
)
def test_what_is_not_a_number_is_a_format_error_that_names_the_field(value):
    with pytest.raises(PayloadFormatError, match="'x' has dtype"):
        schema_of("F32").check({"x": value})


def test_empty_integer_arrays_narrow():
    assert schema_of("I32").check({"x": np.zeros(0, np.int64)})["x"].dtype == np.int32


def test_every_pair_of_dtypes_is_classified():
    for source in DTYPES.values():
        for target in DTYPES.values():
            cast = cast_between("x", source, target)
            assert (cast == "same") == (source == target)
            if cast == "widening":
                assert np.array([0, 1]).astype(source).astype(target).tolist() == [0, 1]
