"""Payload images: `unpack` and what follows it give arrays within the image, or a `PayloadError`.

The input is the image itself, or, behind a byte 0xff, a JSON header whose length is put in front and the tensors'
bytes behind it, so that the fuzzer need not find either number.
"""

import numpy as np

from dray.errors import PayloadError, PayloadFormatError
from dray.payload import pack, unpack
from dray.payload.codec import unpack_metadata
from dray.payload.trajectory import STEP_FIELDS, resolve_episode_length

WITH_LENGTH = b"\xff"
_ARRAYS = {
    "observations": np.ones((3, 2), np.float32),
    "actions": np.arange(3),
    "episode_length": 3,
}
SEEDS = [
    bytes(pack(_ARRAYS, metadata={"policy": "1"})),
    bytes(pack({"done": np.zeros(3, bool), "empty": np.zeros((0, 2)), "half": np.ones((), np.float16)})),
    WITH_LENGTH + b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}',
    WITH_LENGTH + b'{"x":{"dtype":"U8","shape":[0,4611686018427387904],"data_offsets":[0,0]}}',
    WITH_LENGTH + b'{"x":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    WITH_LENGTH + b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
    WITH_LENGTH + b'{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"x":1}',
    WITH_LENGTH + b'{"x":{"dtype":"U8","shape":[NaN],"data_offsets":[-1,1e9]}}',
    WITH_LENGTH
    + b'{"actions":{"dtype":"U8","shape":[2,0],"data_offsets":[0,0]},'
    + b'"episode_length":{"dtype":"I8","shape":[],"data_offsets":[0,1]}}',
    WITH_LENGTH + b"[" * 300,
    b"\xff" * 7 + b"\0" + b"{",
]


def run(data: bytes) -> None:
    if data[:1] == WITH_LENGTH:
        header = data[1:]
        data = b"".join((len(header).to_bytes(8, "little"), header, bytes(_described(header))))
    image = np.frombuffer(data, np.uint8)
    try:
        arrays = unpack(image)
    except PayloadFormatError:
        return
    low, high = _span(image)
    for array in arrays.values():
        assert array.nbytes <= image.nbytes
        if array.nbytes and array.base is image:
            begin, end = _span(array)
            assert low <= begin <= end <= high
        assert array.flags.aligned
        assert not array.flags.writeable
        array.tobytes()
    assert sum(array.nbytes for array in arrays.values()) <= image.nbytes
    # What was unpacked can be packed, and is the same then.
    again = unpack(pack(arrays, metadata=unpack_metadata(image)))
    assert list(again) == list(arrays)
    for name, array in arrays.items():
        assert (again[name].dtype, again[name].shape) == (array.dtype, array.shape)
        assert again[name].tobytes() == array.tobytes()
    try:
        length = resolve_episode_length(arrays)
    except PayloadError:
        return
    assert all(length <= len(arrays[name]) for name in STEP_FIELDS if name in arrays)


def _span(array):
    begin = array.__array_interface__["data"][0]
    return begin, begin + array.nbytes


def _described(header):
    """How many bytes of tensors the header speaks of, roughly: its largest number, if that is a small one."""
    numbers = [0]
    for part in bytes(c if c in b"0123456789" else 32 for c in header).split():
        numbers.append(int(part[:5]))
    return max(number for number in numbers if number < 4096)
