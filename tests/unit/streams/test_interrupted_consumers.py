"""A signal handler that raises at any moment of a consumer's call: the consumer keeps no payload."""

from __future__ import annotations

import os
from pathlib import Path

import interruptions
import pytest

import dray
from dray.streams import Consumer, Producer

FOLDER = str(Path(dray.__file__).parent)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAY_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("DRAY_SCOPE", f"interrupted {os.getpid()}")


@pytest.mark.parametrize("direct", [True, False], ids=["in place", "copied"])
@pytest.mark.parametrize("part", ["streams/inbox.py", "streams/source.py", "transport/subscription.py"])
def test_a_call_that_is_interrupted_at_any_moment_leaves_no_payload_behind(part: str, direct: bool) -> None:
    moment, last, interrupted = 1, -1, True
    with Producer("s", slots=4) as producer, Consumer("s", direct=direct, prefetch=1) as consumer:
        while interrupted:
            producer.put(number=2 * moment)
            producer.put(number=2 * moment + 1)
            interrupted = interruptions.interrupted(
                (f"{FOLDER}/{part}",), lambda: int(consumer.get(timeout=20)["number"]), moment
            )
            while last != 2 * moment + 1:
                last = int(consumer.get(timeout=20)["number"])
            moment += 1
        consumer.close()
        assert producer.drain(timeout=20) == 0
    assert moment > 3
