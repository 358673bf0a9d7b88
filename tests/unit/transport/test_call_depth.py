"""The stack of a read is flat: every Python frame between the call and the socket costs each payload."""

import sys
from types import FrameType
from typing import Any

import pytest
from transport_fixtures import over_connections

from dray import PayloadClient

MAX_FRAMES = 6


@pytest.mark.parametrize("nbytes", [100, 100_000])
@pytest.mark.parametrize("lane", ["shm", "tcp"])
@pytest.mark.parametrize("call", ["read", "read_bytes"])
def test_at_most_six_python_frames_lie_between_a_read_and_its_socket(lane: Any, nbytes: int, call: str) -> None:
    names: list[list[str]] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event != "c_call" or getattr(argument, "__name__", "") not in ("send", "sendmsg"):
            return
        names.append([])
        caller: FrameType | None = frame
        while caller is not None and caller.f_code is not here:
            names[-1].append(caller.f_code.co_qualname)
            caller = caller.f_back

    here = sys._getframe().f_code  # noqa: SLF001
    with over_connections(lane, slot_bytes=200_000) as server, PayloadClient(lane=lane) as client:
        first, second = (server.put({"a": bytearray(nbytes)}) for _ in range(2))
        client.read(first)  # opens the connection
        read = getattr(client, call)
        sys.setprofile(profile)
        try:
            read(second)
        finally:
            sys.setprofile(None)
    assert len(names) == 2, "a request and its acknowledgement"
    for frames in names:
        assert frames[-1] == f"PayloadClient.{call}"
        assert len(frames) <= MAX_FRAMES, " < ".join(frames)
