"""The dtypes that a payload can carry, and the schema that its values are checked against.

Dtypes have the names of the safetensors format. bfloat16 and the 8-bit floats are dtypes of `ml_dtypes`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from dray.errors import PayloadFormatError, SchemaError
from dray.payload import torch_interop
from dray.payload.ragged import Ragged

Array: TypeAlias = npt.NDArray[Any]

Arrays: TypeAlias = dict[str, Array]
"""The content of a payload: arrays by name."""

Values: TypeAlias = dict[str, Any]
"""The content of a payload by name: arrays, `Ragged`, text, numbers, None; mappings, lists and tuples of these."""

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "I8": np.dtype(np.int8),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
"""safetensors name → NumPy dtype, for every dtype that a payload can carry."""

DTYPE_NAMES: Mapping[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items()}
"""NumPy dtype → safetensors name."""

MAX_DIMENSIONS = 32
"""Limit on the dimensions of an array. It is the limit of NumPy 1, so every consumer can hold the array."""

_log = logging.getLogger("dray.payload")

Cast: TypeAlias = Literal["same", "widening", "narrowing"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The dtype and shape that one field of a payload must have.

    Args:
        dtype: safetensors name: ``"F32"``, ``"BF16"``, ``"BOOL"``, …
        shape: one entry for each dimension; ``None`` allows any length.
        max_length: limit on the first dimension.
        optional: the field may be absent.

    Raises:
        PayloadFormatError: a payload cannot carry `dtype`.
        SchemaError: `shape` or `max_length` is invalid.
    """

    dtype: str
    shape: tuple[int | None, ...]
    max_length: int | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise PayloadFormatError(f"dtype {self.dtype!r} cannot be carried; known are {', '.join(DTYPES)}")
        object.__setattr__(self, "shape", tuple(self.shape))
        for length in self.shape:
            if length is not None and (type(length) is not int or length < 0):
                raise SchemaError(f"shape {self.shape} is not made of None and non-negative integers")
        if len(self.shape) > MAX_DIMENSIONS:
            raise SchemaError(f"shape has {len(self.shape)} dimensions; at most {MAX_DIMENSIONS} can be carried")
        if self.max_length is not None:
            if type(self.max_length) is not int or self.max_length < 0:
                raise SchemaError(f"max_length {self.max_length!r} is not a non-negative integer")
            if not self.shape:
                raise SchemaError("max_length limits the first dimension, but the shape has none")

    @classmethod
    def of(
        cls,
        dtype: npt.DTypeLike,
        shape: tuple[int | None, ...] = (),
        *,
        max_length: int | None = None,
        optional: bool = False,
    ) -> TensorSpec:
        """Return a spec for anything that NumPy accepts as a dtype: ``np.float32``, ``ml_dtypes.bfloat16``, …"""
        try:
            found = np.dtype(dtype)
        except TypeError as error:
            raise PayloadFormatError(f"{dtype!r} is not a dtype: {error}") from error
        name = DTYPE_NAMES.get(_little_endian(found))
        if name is None:
            raise PayloadFormatError(f"dtype {found} cannot be carried: {_remedy(found)}")
        return cls(name, shape, max_length, optional)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of the field."""
        return DTYPES[self.dtype]

    @property
    def max_shape(self) -> tuple[int, ...] | None:
        """The largest shape that fits; ``None`` if a dimension has no limit."""
        if not self.shape:
            return ()
        first, *rest = self.shape
        bounds = [length for length in (first, self.max_length) if length is not None]
        if not bounds or None in rest:
            return None
        return (min(bounds), *(length for length in rest if length is not None))

    def mismatch(self, shape: tuple[int, ...]) -> str | None:
        """Return the reason why `shape` does not fit; ``None`` if it fits."""
        fits = len(shape) == len(self.shape)
        for want, have in zip(self.shape, shape, strict=False):
            if want is not None and want != have:
                fits = False
        if not fits:
            return f"has shape {shape}, expected {self.shape}"
        if self.max_length is not None and shape[0] > self.max_length:
            return f"has length {shape[0]}, at most {self.max_length} is allowed"
        return None

    def verify(self, path: str, value: Any) -> None:
        """Check a value that was unpacked.

        Raises:
            SchemaError: it does not fit; the message has its `path`.
        """
        if not isinstance(value, np.ndarray):
            raise _unlike(path, value, "an array")
        if value.dtype != DTYPES[self.dtype]:
            raise SchemaError(f"field {path!r} has dtype {value.dtype}, expected {self.dtype}")
        if reason := self.mismatch(value.shape):
            raise SchemaError(f"field {path!r} {reason}")


@dataclass(frozen=True, slots=True)
class RaggedSpec:
    """The dtype and shape that a `Ragged` field must have. A list of arrays, one for each row, fits as well.

    Args:
        dtype: safetensors name of the dtype of the values.
        shape: the shape of one element of a row; ``()`` for rows of numbers.
        max_rows: limit on the number of rows.
        max_values: limit on the elements of all rows together.
        optional: the field may be absent.

    Raises:
        PayloadFormatError: a payload cannot carry `dtype`.
        SchemaError: a limit or `shape` is invalid.
    """

    dtype: str
    shape: tuple[int | None, ...] = ()
    max_rows: int | None = None
    max_values: int | None = None
    optional: bool = False
    parts: tuple[TensorSpec, TensorSpec] = field(init=False, repr=False, compare=False)
    """The specs of values and offsets."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        values = TensorSpec(self.dtype, (None, *self.shape), self.max_values)
        object.__setattr__(self, "parts", (values, _offsets_spec(self.max_rows)))

    def ragged(self, path: str, value: Any) -> Ragged:
        """`value` as a `Ragged` whose number of rows fits; the dtype and shape of its values are not checked.

        Raises:
            SchemaError: it is not ragged, or has too many rows.
        """
        if torch_interop.is_jagged(value):
            value = Ragged(*torch_interop.jagged_parts(value))
        elif isinstance(value, list | tuple):
            value = Ragged.from_rows([as_array(path, row) for row in value])
        if not isinstance(value, Ragged):
            raise _unlike(path, value, "ragged")
        if self.max_rows is not None and len(value) > self.max_rows:
            raise SchemaError(f"field {path!r} has {len(value)} rows, at most {self.max_rows} are allowed")
        return value

    def verify(self, path: str, value: Any) -> None:
        """As `TensorSpec.verify`."""
        if not isinstance(value, Ragged):
            raise _unlike(path, value, "ragged")
        self.parts[0].verify(path, self.ragged(path, value).values)


@dataclass(frozen=True, slots=True)
class TextSpec:
    """A field that holds a text, or a list of texts.

    Args:
        many: a list of texts, instead of one.
        max_bytes: limit on the UTF-8 bytes of all texts together.
        max_rows: limit on the number of texts of a list.
        optional: the field may be absent.

    Raises:
        SchemaError: a limit is invalid.
    """

    many: bool = False
    max_bytes: int | None = None
    max_rows: int | None = None
    optional: bool = False
    parts: tuple[TensorSpec, ...] = field(init=False, repr=False, compare=False)
    """The specs of the bytes and, for a list, of the offsets."""

    def __post_init__(self) -> None:
        if self.max_rows is not None and not self.many:
            raise SchemaError("max_rows limits a list of texts; give many=True")
        text = TensorSpec("U8", (None,), _limit("max_bytes", self.max_bytes))
        object.__setattr__(self, "parts", (text, _offsets_spec(self.max_rows)) if self.many else (text,))

    def verify(self, path: str, value: Any) -> None:
        """As `TensorSpec.verify`."""
        texts = [value] if isinstance(value, str) and not self.many else value
        if not (
            isinstance(texts, list) and (self.many or texts is not value) and all(type(t) is str for t in texts)
        ):
            raise _unlike(path, value, "a list of texts" if self.many else "text")
        if self.max_rows is not None and len(texts) > self.max_rows:
            raise SchemaError(f"field {path!r} has {len(texts)} texts, at most {self.max_rows} are allowed")
        if self.max_bytes is not None and (size := sum(len(text.encode()) for text in texts)) > self.max_bytes:
            raise SchemaError(f"field {path!r} has {size} bytes of text, at most {self.max_bytes} are allowed")


def _limit(name: str, value: int | None) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise SchemaError(f"{name} {value!r} is not a non-negative integer")
    return value


def _offsets_spec(max_rows: int | None) -> TensorSpec:
    rows = _limit("max_rows", max_rows)
    return TensorSpec("I64", (None,), None if rows is None else rows + 1)


def _unlike(path: str, value: object, expected: str) -> SchemaError:
    return SchemaError(f"field {path!r} is a {type(value).__name__}, expected {expected}")


FieldSpec: TypeAlias = "TensorSpec | RaggedSpec | TextSpec | PayloadSchema"
"""What one field must be; a `PayloadSchema` for a mapping inside the payload."""

FittedField: TypeAlias = tuple[str, Array, np.dtype[Any], Cast]
"""A field's name, an array that fits its spec, the dtype to store it as, and the cast to that dtype."""


class PayloadSchema(Mapping[str, FieldSpec]):
    """The fields that a payload has: a read-only mapping of field name → spec.

    Arrays are cast to the dtype of their field:

    * A cast that keeps every value (float32 → float64, bool → anything, bfloat16 → float32) is silent.
    * A narrowing cast (float64 → float32, int64 → int32, int64 → float32) is logged by ``dray.payload`` as a
      warning, once for each field and schema. Python numbers and lists have no dtype and cause no warning.
    * A value outside the range of its field is a `SchemaError`: an integer that does not fit, or a finite float
      that would become infinite or NaN.
    * A cast to a poorer kind (float → integer, complex → float, integer → bool) is a `SchemaError`.

    Args:
        fields: field name → `TensorSpec`, `RaggedSpec`, `TextSpec`, or a `PayloadSchema` for a nested mapping.
        optional: where it is nested, the mapping may be absent.

    Raises:
        SchemaError: a name is not a string, or a value is not a spec.
    """

    __slots__ = ("_fields", "_warned", "flat", "optional")

    def __init__(self, fields: Mapping[str, FieldSpec], *, optional: bool = False) -> None:
        self._fields = dict(fields)
        self._warned: dict[str, object] = {}
        self.optional = optional
        for name, spec in self._fields.items():
            if not isinstance(name, str):
                raise SchemaError(f"field name {name!r} is not a string")
            if not isinstance(spec, TensorSpec | RaggedSpec | TextSpec | PayloadSchema):
                raise SchemaError(f"field {name!r} has {spec!r} where a TensorSpec or another spec belongs")
        self.flat = all(isinstance(spec, TensorSpec) for spec in self._fields.values())

    def __getitem__(self, name: str) -> FieldSpec:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"PayloadSchema({self._fields!r}{', optional=True' if self.optional else ''})"

    def check(self, arrays: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        """Return `arrays` as NumPy arrays of exactly the schema's dtypes. Arrays that fit already are not copied.

        Raises:
            SchemaError: a field is missing, unknown, does not fit, or is not described as an array; the message
                names it.
            PayloadFormatError: a value is not an array, or has a dtype that cannot be carried.
        """
        checked = {}
        for name, array, dtype, cast in self.fit(arrays):
            checked[name] = array if array.dtype == dtype else np.empty(array.shape, dtype)
            if checked[name] is not array:
                store(name, array, checked[name], cast)
        return checked

    def fit(self, arrays: Mapping[str, npt.ArrayLike]) -> list[FittedField]:
        """Like `check`, but leave the casts to `store`, which can write into a slot."""
        fitted = []
        for name, value, spec in self.specified(arrays):
            if not isinstance(spec, TensorSpec):
                raise SchemaError(f"field {name!r} is described by {spec!r}, not as an array")
            fitted.append(self.fit_field(name, spec, value))
        return fitted

    def specified(self, values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, FieldSpec]]:
        """Each name, its value and its spec; at the end it is an error if a field is missing.

        Args:
            values: the values by name.
            path: what is before a name in a message.

        Raises:
            SchemaError: a field is unknown or missing.
        """
        fields = self._fields
        for name, value in values.items():
            spec = fields.get(name)
            if spec is None:
                known = ", ".join(fields) or "none"
                raise SchemaError(f"field {path + name!r} is not in the schema, which has {known}")
            yield name, value, spec
        names = values.keys()  # a TensorDict iterates over rows, its keys do not
        if len(names) < len(fields):
            for name, spec in fields.items():
                if not spec.optional and name not in names:
                    raise SchemaError(f"field {path + name!r} is missing")

    def verify(self, values: Mapping[str, Any], path: str = "") -> None:
        """Check values that were unpacked. Nothing is cast: each array must have the dtype of its field.

        Raises:
            SchemaError: a field is missing, unknown, or does not fit; the message names it.
        """
        for name, value, spec in self.specified(values, path):
            if not isinstance(spec, PayloadSchema):
                spec.verify(path + name, value)
            elif isinstance(value, dict):
                spec.verify(value, f"{path}{name}.")
            else:
                raise _unlike(path + name, value, "a mapping")

    def fit_field(self, name: str, spec: TensorSpec, value: npt.ArrayLike) -> FittedField:
        """The array of `value`, and how it is cast to the dtype of its field.

        Raises:
            SchemaError: it does not fit.
            PayloadFormatError: it is not an array, or has a dtype that cannot be carried.
        """
        array = as_array(name, value)
        target = DTYPES[spec.dtype]
        cast: Cast = "same"
        if array.dtype != target:
            # NumPy chooses the dtype of a Python number or list; that choice must cause no warning.
            has_dtype = hasattr(value, "dtype")
            if array.size == 0 and not has_dtype:
                array = array.astype(target)
            allowed = cast_between(name, array.dtype, target)
            if allowed is None:
                raise SchemaError(f"field {name!r} has dtype {array.dtype}, which is not cast to {spec.dtype}")
            cast = allowed
            if cast == "narrowing":
                _require_in_range(name, array, target)
                if has_dtype:
                    self._warn_once(name, array.dtype, target)
        if reason := spec.mismatch(array.shape):
            raise SchemaError(f"field {name!r} {reason}")
        return name, array, target, cast

    def _warn_once(self, name: str, source: np.dtype[Any], target: np.dtype[Any]) -> None:
        token = object()  # `setdefault` is one step: only one thread gets its own token back
        if self._warned.setdefault(name, token) is token:
            _log.warning("field %r is narrowed from %s to %s; this is logged once", name, source, target)


def as_array(name: str, value: npt.ArrayLike) -> Array:
    """Return `value` (array, torch tensor, list or number) as a NumPy array, without a copy where possible.

    Raises:
        PayloadFormatError: `value` of field `name` cannot be read as an array; the message states the reason.
    """
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise PayloadFormatError(f"field {name!r} is a masked array, whose mask is not carried: {_UNMASK}")
    if isinstance(value, Mapping):
        kind = type(value).__name__
        raise PayloadFormatError(f"field {name!r} is a {kind}: a field is one array; give each array in it a name")
    try:
        if torch_interop.is_tensor(value):
            tensor: Any = value
            return torch_interop.to_numpy(tensor)
        array = np.asarray(value)
    except Exception as error:  # array objects of other packages may raise anything
        hint = " (lists of different lengths are no array)" if isinstance(value, list | tuple) else ""
        raise PayloadFormatError(f"field {name!r} cannot be read as an array{hint}: {error}") from error
    if array.dtype == np.object_ and not hasattr(value, "dtype"):
        what = "None" if value is None else f"a {type(value).__name__}"
        raise PayloadFormatError(f"field {name!r} is {what}, of which there is no array of numbers")
    if isinstance(value, list | tuple) and _holds_a_mask(value):
        raise PayloadFormatError(
            f"field {name!r} is a {type(value).__name__} of masked arrays, whose masks are not carried: {_UNMASK}"
        )
    return array


def _holds_a_mask(value: object) -> bool:
    """Whether `value` is or holds a masked array. NumPy made an array of it before, which limits its depth."""
    return (
        any(map(_holds_a_mask, value)) if isinstance(value, list | tuple) else isinstance(value, np.ma.MaskedArray)
    )


def carried_dtype(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that an array of `dtype` is stored as: `dtype` in little-endian order.

    Raises:
        PayloadFormatError: the dtype cannot be carried; the message names field and dtype.
    """
    little = _little_endian(dtype)
    if little not in DTYPE_NAMES:
        raise _not_carried(name, dtype)
    return little


def _not_carried(name: str, dtype: np.dtype[Any]) -> PayloadFormatError:
    return PayloadFormatError(f"field {name!r} has dtype {dtype}, which cannot be carried: {_remedy(dtype)}")


def _little_endian(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """`dtype` in little-endian order; `dtype` itself if it has no byte order."""
    try:
        return dtype.newbyteorder("<")
    except TypeError:  # NumPy's StringDType, and dtypes of other packages
        return dtype


_UNMASK = "fill it, as x.filled(0) does, and put the mask into a field of its own"
_TEXT = "give text as str, or as a list of str, such as x.tolist()"
_REMEDIES = {
    "O": "the elements must be numbers, not Python objects",
    "U": _TEXT,
    "S": _TEXT,
    "T": _TEXT,
    "M": "carry times as numbers, such as x.astype(np.int64)",
    "m": "carry durations as numbers, such as x.astype(np.int64)",
    "c": "carry it as complex64, such as x.astype(np.complex64)",
    "V": "give each of its parts a field of its own",
}
"""Remedies for dtypes that cannot be carried, by NumPy's letter for their kind."""


def _remedy(dtype: np.dtype[Any]) -> str:
    known = f"must be one of {', '.join(DTYPES)}"
    return _REMEDIES.get(dtype.kind, known) if dtype.num < _FIRST_USER_DTYPE or dtype.kind == "T" else known


def cast_between(name: str, source: np.dtype[Any], target: np.dtype[Any]) -> Cast | None:
    """Return the kind of the cast from `source` to the carried dtype `target`; ``None`` if it is not allowed.

    Raises:
        PayloadFormatError: `source` is not numeric.
    """
    have, want = _richness(source), _richness(target)
    if have is None:
        raise _not_carried(name, source)
    if source.newbyteorder("<") == target:
        return "same"
    from_float8 = have == want == _FLOAT and source.itemsize == 1 < target.itemsize  # exact, but unknown to NumPy
    if from_float8 or np.can_cast(source, target, "safe"):
        return "widening"
    return "narrowing" if want is not None and have <= want else None


def store(name: str, source: Array, target: Array, cast: Cast) -> None:
    """Cast `source` into `target`, which has the same shape.

    Raises:
        SchemaError: a finite value is not finite in the dtype of `target`.
    """
    if cast == "same":
        target[...] = source
        return
    with np.errstate(all="ignore"):
        np.copyto(target, source, casting="unsafe")
    if cast == "narrowing" and (_richness(target.dtype) or 0) >= _FLOAT:
        finite = np.isfinite(target)
        if not finite.all() and bool((np.isfinite(source) & ~finite).any()):
            raise SchemaError(f"field {name!r} has values outside the range of {DTYPE_NAMES[target.dtype]}")


_INTEGER, _FLOAT = 1, 2
_FIRST_USER_DTYPE = 256  # NPY_USERDEF: packages choose `dtype.kind` of dtypes from this number
_RICHNESS = {"b": 0, "u": _INTEGER, "i": _INTEGER, "f": _FLOAT, "c": 3}


def _richness(dtype: np.dtype[Any]) -> int | None:
    """Rank of a dtype's kind: bool < integer < float < complex; ``None`` for a dtype that is not numeric."""
    name = DTYPE_NAMES.get(dtype)
    if name is not None:
        return _RICHNESS["f" if name == "BF16" else name[0].lower()]
    return _RICHNESS.get(dtype.kind) if dtype.num < _FIRST_USER_DTYPE else None


def _require_in_range(name: str, array: Array, target: np.dtype[Any]) -> None:
    if target.kind in "ui" and array.size:
        bounds = np.iinfo(target)
        lowest, highest = int(array.min()), int(array.max())
        if lowest < bounds.min or highest > bounds.max:
            raise SchemaError(
                f"field {name!r} has values from {lowest} to {highest}, outside the range of {DTYPE_NAMES[target]}"
            )
