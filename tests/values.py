"""Compares nested values, bit for bit."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dray import Ragged


def assert_same(found: Any, expected: Any) -> None:
    """`found` has the structure, the types, dtypes and shapes of `expected`, and its bits."""
    if isinstance(expected, Mapping):
        assert type(found) is dict
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, Ragged):
        assert isinstance(found, Ragged)
        assert_same(found.values, np.asarray(expected.values))
        assert_same(found.offsets, expected.offsets)
    elif isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
    else:
        assert type(found) is type(expected)
        if isinstance(expected, list | tuple):
            assert len(found) == len(expected)
            for mine, theirs in zip(found, expected, strict=True):
                assert_same(mine, theirs)
        elif isinstance(expected, float):
            assert np.float64(found).tobytes() == np.float64(expected).tobytes()
        else:
            assert found == expected
