"""The body of a READ: any text selects a part of a payload that lies within it, or is a `SelectionError`.

Input: a byte that chooses the payload, then the text.
"""

import numpy as np

from dray.errors import SelectionError
from dray.payload import Ragged, pack, unpack
from dray.payload.selection import Selection, part_of
from dray.protocol.frames import MAX_ADDED_BYTES

IMAGES = [
    np.frombuffer(pack(values), np.uint8)
    for values in (
        {"a": np.arange(12, dtype=np.float32).reshape(6, 2), "b": np.arange(3, dtype=np.int8), "a.b": np.ones(())},
        {
            "a": np.arange(6),
            "c": {"a": "text", "d.e": {"f": np.ones((2, 3))}, "l": [1, "x"]},
            "r": Ragged([1], [0, 1]),
        },
        {},
    )
]
SEEDS = [
    b"\0" + b'{"fields":["b","a"],"rows":{"a":[[0,2],[4,null]]}}',
    b"\0" + b'{"rows":{"b":[[0,0],[0,3]],"a":[]}}',
    b"\0" + b'{"fields":["a.b"]}',
    b"\1" + b'{"fields":["c.d\\\\.e.f","r","a"],"rows":{"a":[[1,5]]}}   ',
    b"\1" + b'{"fields":["c","c.a"]}',
    b"\1" + b'{"fields":["c.l.0"],"rows":{"r":[[0,1]]}}',
    b"\2" + b"{}",
    b"\0" + b"[" * 200,
    b"\0" + b'{"rows":{"a":[[0,' + b"9" * 100 + b"]]}}",
]


def run(data: bytes) -> None:
    image = IMAGES[data[0] % len(IMAGES) if data else 0]
    try:
        selection = Selection.decode(data[1:])
    except SelectionError:
        return
    assert Selection.decode(selection.text) == selection
    try:
        part = part_of(image, selection)
    except SelectionError:
        return
    assert part.nbytes <= len(image) + MAX_ADDED_BYTES
    assert part.nbytes == len(part.header) + sum(size for _, size in part.spans)
    taken = sorted(part.spans)
    ends = [0, *(offset + size for offset, size in taken)]
    assert all(size > 0 and offset >= end for (offset, size), end in zip(taken, ends, strict=False))
    assert ends[-1] <= len(image)
    separate = np.empty(part.nbytes, np.uint8)
    part.write(image, separate)
    views, copies = unpack(image, selection=selection), unpack(separate)
    assert list(views) == list(copies)
    for name, value in views.items():
        if isinstance(value, np.ndarray):
            assert (value.dtype, value.shape) == (copies[name].dtype, copies[name].shape)
            assert value.tobytes() == copies[name].tobytes()
