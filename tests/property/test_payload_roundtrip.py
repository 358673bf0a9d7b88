import math

import numpy as np
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from dray.payload import pack, plan, unpack, unpack_metadata
from dray.payload.schema import DTYPES

names = st.text(max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def arrays_of_any_dtype(draw):
    name = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(shapes)
    nbytes = math.prod(shape) * DTYPES[name].itemsize
    content = draw(st.binary(min_size=nbytes, max_size=nbytes))
    if name == "BOOL":
        content = bytes(byte % 2 for byte in content)
    array = np.frombuffer(content, DTYPES[name]).reshape(shape)
    if array.ndim and draw(st.booleans()):
        array = array[::-1]
    return array.T if draw(st.booleans()) else array


payloads = st.dictionaries(names, arrays_of_any_dtype(), max_size=6)


@given(payloads, st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_what_is_packed_is_unpacked(arrays, metadata):
    image = pack(arrays, metadata=metadata)
    read = unpack(image)
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        assert read[name].tobytes() == array.tobytes()
        assert read[name].flags.aligned
    assert unpack_metadata(image) == (metadata or {})
    assert len(image) == plan(arrays, metadata=metadata).nbytes


@given(payloads)
def test_the_official_library_reads_every_payload(arrays):
    read = dict(safetensors.deserialize(bytes(pack(arrays))))
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tuple(read[name]["shape"]) == array.shape
        assert bytes(read[name]["data"]) == array.tobytes()
