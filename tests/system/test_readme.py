"""The README's example, as a user runs it: each block pasted into a terminal."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sh\n(python -c '\n.*?')\n```$", re.MULTILINE | re.DOTALL)


@contextmanager
def terminal(block: str) -> Iterator[tuple[subprocess.Popen[str], TextIO]]:
    """A shell at a terminal, where `python` is this interpreter, with the block as its input; and its output."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONUNBUFFERED", None)
    screen, inside = pty.openpty()
    with os.fdopen(screen, encoding="utf-8") as output:
        try:
            shell = subprocess.Popen(
                ["bash", "-c", block],
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=inside,
                stderr=inside,
            )
        finally:
            os.close(inside)
        with shell:
            try:
                yield shell, output
            finally:
                shell.kill()


def rest_of(output: TextIO) -> list[str]:
    """What is printed until the process ends, by lines."""
    lines = []
    # A terminal whose other side is closed reads as an error, not as an end.
    with suppress(OSError):
        lines.extend(iter(output.readline, ""))
    return [line.rstrip() for line in lines]


@pytest.fixture
def blocks() -> list[str]:
    return BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.timeout(90)
@pytest.mark.parametrize("first", ["producer", "consumer"])
def test_example_in_two_terminals_works_in_either_order(
    blocks: list[str], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAY_SCOPE", f"readme, {first} first")
    in_order = blocks if first == "producer" else blocks[::-1]
    with terminal(in_order[0]) as one, terminal(in_order[1]) as other:
        (producer, shown), (consumer, printed) = (one, other) if first == "producer" else (other, one)
        assert rest_of(printed) == [f"(200, 4) {episode}.0" for episode in range(10)]
        assert rest_of(shown) == []
        assert consumer.wait(timeout=10) == 0
        assert producer.wait(timeout=10) == 0
