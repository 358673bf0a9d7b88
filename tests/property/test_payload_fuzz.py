import json
import struct

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from dray.errors import PayloadFormatError
from dray.payload import pack, unpack
from dray.payload.schema import DTYPES

IMAGE = bytes(
    pack(
        {
            "observations": np.ones((3, 4), np.float32),
            "actions": np.arange(3),
            "done": np.zeros(3, bool),
            "empty": np.zeros((0, 2)),
            "episode_length": 3,
        },
        metadata={"policy": "1"},
    )
)
HEADER_END = 8 + struct.unpack_from("<Q", IMAGE)[0]


def read_or_refuse(image):
    """Unpack; whatever comes out must lie inside the image and be usable."""
    try:
        arrays = unpack(image)
    except PayloadFormatError:
        return
    assert sum(array.nbytes for array in arrays.values()) <= len(image)
    for array in arrays.values():
        array.tobytes()
        repr(array.shape)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read(image):
    read_or_refuse(image)


@given(st.binary(max_size=200), st.binary(max_size=64))
def test_random_headers_are_refused_or_read(header, tensors):
    read_or_refuse(struct.pack("<Q", len(header)) + header + tensors)


@given(
    st.lists(
        st.tuples(st.integers(0, HEADER_END - 1), st.sampled_from(b'0123456789-.eE"{}[],:tfn \x00\xff')),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_headers_are_refused_or_read(changes):
    image = bytearray(IMAGE)
    for position, byte in changes:
        image[position] = byte
    read_or_refuse(image)


@given(st.integers(0, len(IMAGE)), st.integers(0, len(IMAGE)), st.binary(max_size=20))
def test_cut_and_spliced_images_are_refused_or_read(start, end, inserted):
    read_or_refuse(IMAGE[:start] + inserted + IMAGE[end:])


numbers = st.integers(-2, 70) | st.sampled_from([1 << 31, (1 << 31) - 1, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 64])
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4"]),
        "shape": st.lists(numbers, max_size=4),
        "data_offsets": st.lists(numbers, min_size=2, max_size=2),
    }
)


@given(
    st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), tensors | anything, max_size=4),
    st.binary(max_size=70),
)
@example({"x": {"dtype": "F64", "shape": [0, 1 << 62], "data_offsets": [0, 0]}}, b"")
@example({"x": {"dtype": "U8", "shape": [0, 1 << 62], "data_offsets": [0, 0]}}, b"")
@example({"x": {"dtype": "U8", "shape": [0, (1 << 31) - 1, (1 << 31) - 1], "data_offsets": [0, 0]}}, b"")
@example({"x": {"dtype": "U8", "shape": [(1 << 63) - 1, 0], "data_offsets": [0, 0]}}, b"")
def test_plausible_headers_are_refused_or_read(header, content):
    text = json.dumps(header).encode()
    read_or_refuse(struct.pack("<Q", len(text)) + text + content)
