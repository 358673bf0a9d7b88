"""Memory and processors under total store order.

A state is a string of bytes: each shared word, store buffer, register and private variable has its place in it. A
store goes to the end of its processor's buffer and reaches memory later, in order, at any moment. A load takes the
newest value for its address from the buffer of its own processor, else the value in memory, so it may pass earlier
stores. A barrier empties the buffer of one processor at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

RETIRING: Final = 0x80
"""The bit of a generation that marks an undecided drop."""
CAPACITY: Final = 12
"""The stores that a buffer holds. The search fails if a scenario needs more: it leaves out no interleaving."""

State = bytearray
Arrival = Callable[[State, int, int], None]


class BufferTooSmallError(RuntimeError):
    """A scenario needs a larger store buffer than `CAPACITY`."""


class Machine:
    """Shared words, a store buffer for each processor, and private variables, as bytes of a state.

    Attributes:
        names: what each byte of a state holds.
        tracing: steps append what they do to `notes`.
        notes: what the present step has done.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.tracing = False
        self.notes: list[str] = []
        self._initial = bytearray()
        self._buffers: list[int] = []
        self._arrivals: list[Arrival | None] = []

    # --- places ------------------------------------------------------------------------------------------------

    def variable(self, name: str, initial: int = 0) -> int:
        """The place of one more byte."""
        self.names.append(name)
        self._initial.append(initial)
        self._arrivals.append(None)
        return len(self.names) - 1

    def set_initial(self, place: int, value: int) -> None:
        """Set what a byte holds at the start."""
        self._initial[place] = value

    def on_arrival(self, address: int, arrival: Arrival) -> None:
        """Calls `arrival` instead of writing the value when a store to `address` leaves a buffer."""
        self._arrivals[address] = arrival

    def processor(self, name: str) -> int:
        """The number of one more processor, and a place for its store buffer."""
        self._buffers.append(self.variable(f"stores in the buffer of {name}"))
        for entry in range(CAPACITY):
            self.variable(f"address {entry} in the buffer of {name}")
            self.variable(f"value {entry} in the buffer of {name}")
        return len(self._buffers) - 1

    def initial(self) -> bytes:
        """The state in which every scenario begins."""
        return bytes(self._initial)

    # --- accesses ----------------------------------------------------------------------------------------------

    def load(self, state: State, processor: int, address: int) -> int:
        """The value of a word, as the processor sees it."""
        value = state[address]
        base = self._buffers[processor]
        for entry in range(base + 2 * state[base] - 1, base, -2):
            if state[entry] == address:
                value = state[entry + 1]
                break
        if self.tracing:
            self.notes.append(f"loads {self.names[address]}: {text(value)}")
        return value

    def store(self, state: State, processor: int, address: int, value: int) -> None:
        """Append a store to the processor's buffer."""
        base = self._buffers[processor]
        stores = state[base]
        if stores == CAPACITY:
            raise BufferTooSmallError
        at = base + 1 + 2 * stores
        state[at] = address
        state[at + 1] = value
        state[base] = stores + 1
        if self.tracing:
            self.notes.append(f"stores {self.names[address]} = {text(value)}")

    def record(self, state: State, processor: int, address: int, value: int) -> None:
        """Write a history variable once all earlier stores of the processor are visible."""
        if state[self._buffers[processor]]:
            self.store(state, processor, address, value)
        else:
            self.write(state, address, value)

    def write(self, state: State, address: int, value: int) -> None:
        """Write a value to memory at once."""
        arrival = self._arrivals[address]
        if arrival is None:
            state[address] = value
        else:
            arrival(state, address, value)

    # --- buffers -----------------------------------------------------------------------------------------------

    def stores(self, processor: int) -> int:
        """The place of the number of stores in a processor's buffer."""
        return self._buffers[processor]

    def can_drain(self, state: State | bytes, processor: int) -> bool:
        """A store is in the processor's buffer."""
        return state[self._buffers[processor]] > 0

    def holds_only(self, state: State | bytes, processor: int, addresses: frozenset[int]) -> bool:
        """All stores in the processor's buffer are to these addresses."""
        base = self._buffers[processor]
        return all(state[at] in addresses for at in range(base + 1, base + 1 + 2 * state[base], 2))

    def drain_one(self, state: State, processor: int) -> None:
        """The oldest store of a buffer becomes visible."""
        base = self._buffers[processor]
        stores = state[base]
        address, value = state[base + 1], state[base + 2]
        end = base + 1 + 2 * stores
        state[base + 1 : end] = state[base + 3 : end] + b"\0\0"
        state[base] = stores - 1
        if self.tracing:
            self.notes.append(f"{self.names[address]} = {text(value)} becomes visible")
        self.write(state, address, value)

    def drain(self, state: State, processor: int) -> None:
        """All stores of a buffer become visible, in order."""
        base = self._buffers[processor]
        while state[base]:
            self.drain_one(state, processor)

    def note(self, text: str) -> None:
        """Append to what the present step has done; call it only if `tracing`."""
        self.notes.append(text)


def text(value: int) -> str:
    """A value as traces show it."""
    return f"{value & ~RETIRING}|RETIRING" if value & RETIRING else str(value)
