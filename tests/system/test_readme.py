"""The README's example, as a user runs it: each block pasted into a terminal, the reference into the second."""

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
def test_example_in_two_terminals_prints_the_array_and_both_end(blocks: list[str]) -> None:
    producer_block, reader_block = blocks
    with terminal(producer_block) as (producer, shown), terminal(reader_block) as (reader, printed):
        reference = shown.readline()
        assert reader.stdin is not None
        reader.stdin.write(reference)
        reader.stdin.flush()
        array = "\n".join(rest_of(printed)).removeprefix("reference: ")
        assert array == "[[ 0.  1.  2.  3.]\n [ 4.  5.  6.  7.]\n [ 8.  9. 10. 11.]]"
        assert reader.wait(timeout=10) == 0
        assert rest_of(shown) == []
        assert producer.wait(timeout=10) == 0


def test_example_has_ten_lines(blocks: list[str]) -> None:
    lines = [line for block in blocks for line in block.splitlines()[1:-1] if line]
    assert len(lines) == 10
