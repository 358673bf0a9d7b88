"""The README's example, as a user runs it: each block pasted into a terminal, the reference into the second."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sh\n(python -c '\n.*?')\n```$", re.MULTILINE | re.DOTALL)


def terminal(block: str) -> subprocess.Popen[str]:
    """A shell in which `python` is this interpreter, with the block as its input line."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", "-c", block],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def blocks() -> list[str]:
    return BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def test_example_in_two_terminals_prints_the_array_and_both_end(blocks: list[str]) -> None:
    producer_block, reader_block = blocks
    with terminal(producer_block) as producer, terminal(reader_block) as reader:
        try:
            assert producer.stdout is not None
            reference = producer.stdout.readline()
            printed, complaints = reader.communicate(reference, timeout=30)
            assert reader.returncode == 0, f"{complaints}; producer: {producer.poll()}"
            assert printed.removeprefix("reference: ").split("\n") == [
                "[[ 0.  1.  2.  3.]",
                " [ 4.  5.  6.  7.]",
                " [ 8.  9. 10. 11.]]",
                "",
            ]
            rest, complaints = producer.communicate(timeout=30)
            assert producer.returncode == 0, complaints
            assert (rest, complaints) == ("", "")
        finally:
            producer.kill()
            reader.kill()


def test_example_has_ten_lines(blocks: list[str]) -> None:
    lines = [line for block in blocks for line in block.splitlines()[1:-1] if line]
    assert len(lines) == 10
