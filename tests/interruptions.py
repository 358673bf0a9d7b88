"""A signal handler that raises, at each moment at which CPython runs one."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any


@functools.cache
def interruptible(code: CodeType) -> frozenset[int]:
    """Offsets of the bytecodes before which CPython runs signal handlers: at the start, after calls, in loops.

    Left out are those whose exception handler is another one than that of the call.
    """
    handlers = dis.Bytecode(code).exception_entries

    def guarded_by(offset: int) -> list[int]:
        return [each.target for each in handlers if each.start <= offset < each.end]

    instructions = list(dis.get_instructions(code))
    found = {each.argval for each in instructions if each.opname.startswith("JUMP_BACKWARD")}
    for before, after in itertools.pairwise(instructions):
        if before.opname.startswith(("RESUME", "CALL")) and guarded_by(before.offset) == guarded_by(after.offset):
            found.add(after.offset)
    return frozenset(found)


def in_del(frame: FrameType | None) -> bool:
    """What a signal handler raises there, or in the callback of a weak reference, is lost: Python ignores it."""
    while frame is not None and frame.f_code.co_name not in ("__del__", "_unmap_dead"):
        frame = frame.f_back
    return frame is not None


def interrupted(call: Callable[[], None], moment: int, *, folder: str) -> bool:
    """Run `call`, and raise `KeyboardInterrupt` at its n-th moment in `folder`; false if it has fewer."""
    left = moment

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(folder) or in_del(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in interruptible(frame.f_code):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
