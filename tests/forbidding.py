"""What the kernel refuses: system calls, as in a sandbox, for a process that a test starts, and descriptors."""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterator

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_RETURN_ERRNO, _RETURN_ALLOW = 0x00050000, 0x7FFF0000
_INSTRUCTION = struct.Struct("=HBBI")
_NUMBERS = {
    "x86_64": {
        "mmap": 9,
        "madvise": 28,
        "socket": 41,
        "fcntl": 72,
        "flock": 73,
        "memfd_create": 319,
        "membarrier": 324,
    },
    "aarch64": {
        "fcntl": 25,
        "flock": 32,
        "socket": 198,
        "mmap": 222,
        "madvise": 233,
        "memfd_create": 279,
        "membarrier": 283,
    },
}
_PIDFD_OPEN = 434  # on every architecture


def forbid(*names: str, code: int = errno.EPERM) -> None:
    """Have these system calls fail with `code`, for this process and those that it starts, from now on."""
    known = {**_NUMBERS[platform.machine()], "pidfd_open": _PIDFD_OPEN}
    numbers = [known[name] for name in names]
    program = _INSTRUCTION.pack(_LOAD_WORD, 0, 0, 0)  # the call's number is the first word of what a filter sees
    for number in numbers:
        program += _INSTRUCTION.pack(_JUMP_IF_EQUAL, 0, 1, number)
        program += _INSTRUCTION.pack(_RETURN, 0, 0, _RETURN_ERRNO | code)
    program += _INSTRUCTION.pack(_RETURN, 0, 0, _RETURN_ALLOW)
    memory = ctypes.create_string_buffer(program)
    filter_ = struct.pack("@HP", len(program) // _INSTRUCTION.size, ctypes.addressof(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filter_, 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    """This process cannot open another descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
