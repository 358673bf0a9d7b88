"""Parses fuzz input: every sequence of bytes is valid, and a small change to it changes its meaning a little."""


class Cursor:
    """Reads from the front; after the end of the input every byte is zero."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        return self.read(1)[0] if self else 0

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        return self.read(len(self._data))

    def number(self, bits: int) -> int:
        """Mostly a small number, sometimes one at the edges of its type: one byte of input."""
        small = self.byte()
        edges = (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 1 << (bits // 2)
        return edges[255 - small] if small > 251 else small % 16 if small < 192 else small
