import numpy as np
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from test_payload_roundtrip import arrays_of_any_dtype
from values import assert_same

from dray import Ragged, pack, unpack
from dray.payload.tree import is_nested

texts = st.text(max_size=8)
numbers = st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats()
integers = st.integers(-(2**63), 2**63 - 1)
pure = st.lists(st.booleans()) | st.lists(integers) | st.lists(st.floats()) | st.lists(texts)


@st.composite
def ragged(draw):
    lengths = draw(st.lists(st.integers(0, 4), max_size=4))
    return Ragged(np.arange(sum(lengths), dtype=np.int16), np.cumsum([0, *lengths]))


leaves = st.none() | texts | numbers | pure | arrays_of_any_dtype() | ragged()
trees = st.recursive(
    leaves,
    lambda inner: (
        st.dictionaries(texts, inner, max_size=4)
        | st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=12,
)
fields = trees.filter(lambda value: is_nested(value) or isinstance(value, np.ndarray))
payloads = st.dictionaries(texts.filter(lambda name: name != "__metadata__"), fields, max_size=4)


@given(payloads)
def test_any_tree_comes_back_equal(values):
    assert_same(unpack(pack(values)), values)


@given(payloads)
def test_the_official_library_reads_every_tree(values):
    safetensors.deserialize(bytes(pack(values)))
