"""The answer to a READ with a body, which a server prepares from the payload in its slot."""

from __future__ import annotations

from typing import Final

import numpy as np
import xxhash

from dray.payload.selection import Selection, part_of

CHECKSUM_BYTES: Final = 4 << 20
"""Bytes whose checksum is computed in one step, so that other connections have their turns in between."""


class PreparedPart:
    """A part of a payload. It can be sent once its checksum is complete.

    Args:
        payload: the payload in its slot; it must stay leased.
        selection: the body of the READ.
        checksum: compute one.

    Attributes:
        views: its bytes, in several places: a header, and the memory of the slot.
        nbytes: the size of all of them.

    Raises:
        SelectionError: the selection is not valid, or the payload does not have that part.
    """

    def __init__(self, payload: memoryview, selection: bytes, *, checksum: bool) -> None:
        part = part_of(np.frombuffer(payload, np.uint8), Selection.decode(selection))
        self.nbytes = part.nbytes
        self.views = part.views(payload)
        self._digest = xxhash.xxh3_64() if checksum else None
        self._next = 0  # the view whose bytes come next
        self._begin = 0  # what was hashed of it

    def advance(self) -> bool:
        """Compute more of the checksum; True if it is complete."""
        if self._digest is None:
            return True
        left = CHECKSUM_BYTES
        while left and self._next < len(self.views):
            view = self.views[self._next]
            piece = view[self._begin : self._begin + left]
            self._digest.update(piece)
            left -= piece.nbytes
            self._begin += piece.nbytes
            if self._begin == view.nbytes:
                self._next, self._begin = self._next + 1, 0
        return self._next == len(self.views)

    @property
    def checksum(self) -> int | None:
        """The checksum, once it is complete; None if none was wanted."""
        return None if self._digest is None else self._digest.intdigest()
