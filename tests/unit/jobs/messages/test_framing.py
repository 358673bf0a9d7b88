import pytest

from dray.jobs.messages.channel import Frames, FramingError, framed
from dray.jobs.messages.models import Stop


def test_messages_are_taken_apart_wherever_the_stream_was_cut() -> None:
    words = [f"reason {number}" for number in range(3)]
    stream = b"".join(framed(Stop(reason=each)) for each in words)
    for size in (1, 3, 7, len(stream)):
        frames, found = Frames(1000), []
        for begin in range(0, len(stream), size):
            frames.feed(stream[begin : begin + size])
            while (body := frames.take()) is not None:
                found.append(Stop.model_validate_json(body).reason)
        assert found == words


def test_message_that_is_too_large_is_refused_before_it_comes() -> None:
    frames = Frames(1000)
    frames.feed((1001).to_bytes(4, "big"))
    with pytest.raises(FramingError, match="1001 bytes"):
        frames.take()
