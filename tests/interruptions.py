"""Exceptions at every moment at which a signal handler may raise one."""

import dis
import functools
import inspect
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

CALLS = re.compile("RESUME|CALL(?!_INTRINSIC).*")
CODE_UNIT = 2  # bytes


@functools.cache
def interruptible(code: CodeType) -> frozenset[int]:
    """Offsets of the bytecodes before which CPython runs signal handlers: at the start, after calls, in loops.

    Left out are those whose exception handler is another one than that of the call, or of the jump back. For a
    jump, CPython takes the handler of the bytecode before the target up to 3.12, and its own since then.
    """
    handlers = dis.Bytecode(code).exception_entries

    def guarded_by(offset: int) -> list[int]:
        return [each.target for each in handlers if each.start <= offset < each.end]

    instructions = list(dis.get_instructions(code))
    found = set()
    for each in instructions:
        if each.opname.startswith("JUMP_BACKWARD"):
            target = each.argval
            if guarded_by(each.offset) == guarded_by(target - CODE_UNIT) == guarded_by(target):
                found.add(target)
    for before, after in itertools.pairwise(instructions):
        if CALLS.fullmatch(before.opname) and guarded_by(before.offset) == guarded_by(after.offset):
            found.add(after.offset)
    return frozenset(found)


def in_del(frame: FrameType | None) -> bool:
    """What a signal handler raises there, or in the callback of a weak reference, is lost: Python ignores it."""
    while frame is not None and frame.f_code.co_name not in ("__del__", "_unmap_dead"):
        frame = frame.f_back
    return frame is not None


def interrupted(where: Path | tuple[str, ...], call: Callable[[], object], moment: int) -> bool:
    """Run `call` and raise `KeyboardInterrupt` at the n-th moment in code of `where`; false if there are fewer."""
    left, places = moment, where if isinstance(where, tuple) else str(where)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(places) or in_del(frame):
            return None
        frame.f_trace = trace  # Python 3.13 traces the opcodes of a frame that has one
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in interruptible(frame.f_code):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    # Python 3.12 traces opcodes from `settrace` on only if a frame has asked for them by then.
    frame = inspect.currentframe()
    assert frame is not None
    frame.f_trace_opcodes = True
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
