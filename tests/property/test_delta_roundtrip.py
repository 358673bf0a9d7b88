"""Deltas: the bits of any two images of one layout come back, and no encoding writes what it should not."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dray.errors import PayloadFormatError
from dray.payload import pack, unpack
from dray.payload.schema import DTYPES
from dray.streams.sparse import HEADER, Delta, Kind, apply, encode

BYTES = 1 << 22


def image_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.frombuffer(pack(arrays), np.uint8)


def delta_of(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    target = np.full(BYTES, 0xFF, np.uint8)
    return target[: encode(old, new, target, base=1, slot=2, sequence=3)]


def applied(delta: np.ndarray, old: np.ndarray) -> np.ndarray:
    header = Delta.parse(delta)
    assert header is not None
    assert (header.base, header.slot, header.sequence) == (1, 2, 3)
    made = np.zeros_like(old)
    apply(delta, header, old, made)
    return made


@st.composite
def two_versions(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    old, new = {}, {}
    for name in draw(st.lists(st.sampled_from("abcdef"), max_size=4, unique=True)):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(st.lists(st.integers(0, 40), max_size=3).map(tuple))
        seed, share = draw(st.integers(0, 1 << 32)), draw(st.sampled_from([0, 0.01, 0.1, 0.5, 1]))
        random = np.random.default_rng(seed)
        high = 2 if dtype == np.bool_ else 256
        count = math.prod(shape)
        before = random.integers(0, high, (count, dtype.itemsize), np.uint8)
        after = before.copy()
        changed = random.random(count) < share
        after[changed] = random.integers(0, high, (int(changed.sum()), dtype.itemsize), np.uint8)
        old[name] = before.reshape(-1).view(dtype).reshape(shape)
        new[name] = after.reshape(-1).view(dtype).reshape(shape)
    return old, new


@given(two_versions())
def test_what_is_encoded_comes_back_bit_for_bit(versions: tuple[dict, dict]) -> None:
    old, new = map(image_of, versions)
    assert applied(delta_of(old, new), old).tobytes() == new.tobytes()


@given(two_versions(), st.data())
@settings(max_examples=300)
def test_a_delta_that_was_changed_is_refused_or_gives_the_right_result(
    versions: tuple[dict, dict], data: st.DataObject
) -> None:
    old, new = map(image_of, versions)
    delta = delta_of(old, new)
    where = data.draw(st.integers(0, len(delta) - 1))
    cut = data.draw(st.sampled_from([len(delta), where]))
    hostile = delta[:cut].copy()
    if cut > where:
        hostile[where] ^= data.draw(st.integers(1, 255))
    made = np.zeros_like(old)
    try:
        header = Delta.parse(hostile)
        if header is not None:
            apply(hostile, header, old, made)
            assert made.tobytes() == new.tobytes()
    except PayloadFormatError:
        pass


@given(two_versions(), two_versions())
def test_a_delta_never_gives_a_wrong_result_on_another_base(
    versions: tuple[dict, dict], others: tuple[dict, dict]
) -> None:
    old, new = map(image_of, versions)
    other = image_of(others[0])
    assume(other.tobytes() != old.tobytes())
    delta = delta_of(old, new)
    header = Delta.parse(delta)
    assert header is not None
    made = np.zeros_like(other)
    try:
        apply(delta, header, other, made)
    except PayloadFormatError:
        return
    assert made.tobytes() == new.tobytes()


@given(st.integers(1, 1 << 21), st.integers(0, 1 << 32), st.sampled_from([1e-6, 1e-3, 0.05, 0.3]))
@settings(max_examples=20)
def test_spans_and_blocks_of_every_length_come_back(length: int, seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    old = random.integers(0, 200, length, np.uint8)
    new = old + (random.random(length) < share).astype(np.uint8)
    before, after = image_of({"a": old}), image_of({"a": new})
    assert applied(delta_of(before, after), before).tobytes() == after.tobytes()


SPAN = {"a": np.zeros(100_000, np.uint16)}


def spoiled(kind: Kind, share: float) -> tuple[np.ndarray, np.ndarray]:
    """An image, and a delta for it whose only span has that kind."""
    new = SPAN["a"].copy()
    new[:: round(1 / share)] = 7
    old = image_of(SPAN)
    delta = delta_of(old, image_of({"a": new})).copy()
    assert delta[HEADER.size] == kind
    return old, delta


FIRST_PIECE = HEADER.size + 8


@pytest.mark.parametrize(
    ("kind", "share", "at", "value", "message"),
    [
        (Kind.INDICES, 0.01, FIRST_PIECE, 1, "indices, not"),  # the number of indices in the first block
        (Kind.INDICES, 0.01, FIRST_PIECE + 8, 200, "do not rise"),  # two indices are equal, or fall
        (Kind.INDICES, 0.01, FIRST_PIECE + 8 + 1999, 0xFF, "leave the span"),  # the last index
        (Kind.INDICES, 0.01, HEADER.size + 4, 3, "indices, not"),
        (Kind.INDICES, 0.01, HEADER.size, 9, "kind 9"),
        (Kind.INDICES, 0.01, HEADER.size, 0, "kind 0"),
        (Kind.INDICES, 0.01, HEADER.size + 7, 0xFF, "kind 1"),  # more elements than there are
        (Kind.BITMAP, 0.2, FIRST_PIECE, 0xFF, "bits, not"),
        (Kind.BITMAP, 0.2, HEADER.size, 3, "kind 3"),
        (Kind.BITMAP, 0.2, 16 + 3, 1, "does not fit"),  # the size of the image
        (Kind.INDICES, 0.01, 24, 0, "hash"),
    ],
)
def test_a_hostile_delta_is_refused(kind: Kind, share: float, at: int, value: int, message: str) -> None:
    old, delta = spoiled(kind, share)
    assert delta[at] != value
    delta[at] = value
    header = Delta.parse(delta)
    assert header is not None
    made = np.full_like(old, 0xEE)
    with pytest.raises(PayloadFormatError, match=message):
        apply(delta, header, old, made)
    assert "hash" in message or (made == 0xEE).all()


@pytest.mark.parametrize("nbytes", [8, HEADER.size - 1, HEADER.size, HEADER.size + 7, FIRST_PIECE + 100, -1])
def test_a_delta_that_was_cut_is_refused(nbytes: int) -> None:
    old, delta = spoiled(Kind.INDICES, 0.01)
    with pytest.raises(PayloadFormatError):
        applied(delta[:nbytes], old)


def test_a_delta_that_names_more_elements_than_bytes_is_refused() -> None:
    with pytest.raises(PayloadFormatError, match="elements"):
        Delta.parse(np.frombuffer(HEADER.pack(b"DRAYDELT", 1, 1000, 0, 0, 0, 1 << 63, 0, 0, 0), np.uint8))


def test_what_is_no_delta_is_recognized() -> None:
    assert Delta.parse(image_of(SPAN)) is None
    assert Delta.parse(np.zeros(3, np.uint8)) is None


@pytest.mark.parametrize(
    "newer",
    [
        {"a": np.zeros(100_000, np.int16)},
        {"a": np.zeros((100, 1000), np.uint16)},
        {"b": np.zeros(100_000, np.uint16)},
        {"a": np.zeros(100_001, np.uint16)},
        {},
    ],
)
def test_there_is_no_delta_between_other_names_dtypes_or_shapes(newer: dict[str, np.ndarray]) -> None:
    assert len(delta_of(image_of(SPAN), image_of(newer))) == 0


def test_there_is_no_delta_that_is_larger_than_its_room() -> None:
    new = {"a": np.ones(100_000, np.uint16)}
    room = np.zeros(100_000, np.uint8)
    assert encode(image_of(SPAN), image_of(new), room, base=1, slot=0, sequence=0) == 0


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F8_E4M3", "F8_E5M2", "F16", "F64"])
def test_two_percent_of_the_elements_take_at_most_twelve_percent_of_the_bytes(dtype: str) -> None:
    random = np.random.default_rng(5)
    size = DTYPES[dtype].itemsize
    old = random.integers(0, 256, 2_000_000 * size, np.uint8)
    new = old.copy().reshape(-1, size)
    new[random.integers(0, len(new), len(new) // 50), 0] += 1
    before, after = (image_of({"a": each.reshape(-1).view(DTYPES[dtype])}) for each in (old, new))
    delta = delta_of(before, after)
    assert 0 < len(delta) <= 0.12 * len(after)
    assert unpack(applied(delta, before))["a"].tobytes() == new.tobytes()


def test_negative_zero_and_the_bits_of_nan_are_changes() -> None:
    old = {"a": np.zeros(100_000, np.float32)}
    bits = np.zeros(100_000, np.uint32)
    bits[[5, 70_000, 99_999]] = 0x80000000, 0x7FC00001, 0xFFC12345
    before, after = image_of(old), image_of({"a": bits.view(np.float32)})
    delta = delta_of(before, after)
    assert len(delta) < 200
    assert unpack(applied(delta, before))["a"].view(np.uint32).tolist() == bits.tolist()
    nothing = delta_of(after, after)
    assert len(nothing) == HEADER.size + 8
    assert applied(nothing, after).tobytes() == after.tobytes()
