"""The programs in docs/ run, and print what the pages show.

A code block is a program if a comment stands above it:

    <!-- example: GROUP/FILE ARGUMENTS -->   a file; all files of a group run at the same time, in one folder
    <!-- output: GROUP/FILE -->              what the file prints
    <!-- run: GROUP -->                      commands of the shell that run before

An argument `{port}` is a free port, `{redis}` the address of a Redis server. A file with the argument `{enter}`
ends when Enter is pressed, which the test does when all others have ended.
"""

import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dray.clock import Deadline
from dray.jobs.queue.redis_server import start_redis

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("docs/**/*.md"))
BLOCK = re.compile(
    r"^<!-- (example|output|run): (\S+)(.*?) -->\n```\w+[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
TITLED = re.compile(r"^(.*)\n```python title=", re.MULTILINE)
SECONDS = 60.0
NEEDS_RAY = "from-ray-object-store.md"
"""Ray is not installed with the development tools; `tests/integrations/ray` runs these programs."""


@dataclass
class Example:
    """The programs of one group."""

    files: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, list[str]] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)


def examples() -> dict[str, Example]:
    """The groups of all pages, by page and name."""
    found: dict[str, Example] = {}
    for page in PAGES:
        for kind, place, arguments, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            group, _, name = place.partition("/")
            example = found.setdefault(f"{page.relative_to(ROOT / 'docs').as_posix()}:{group}", Example())
            if kind == "run":
                example.commands.append(text)
            elif kind == "output":
                example.outputs[name] = text
            else:
                example.files[name] = text
                example.arguments[name] = arguments.split()
    return found


EXAMPLES = examples()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


@pytest.mark.parametrize("name", EXAMPLES)
def test_programs_of_a_page_run_and_print_what_it_shows(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    wanted = " ".join(each for given in example.arguments.values() for each in given)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "DRAY_SCOPE": f"docs-{os.getpid()}-{tmp_path.name}"[:60],
    }
    for path, text in example.files.items():
        (tmp_path / path).write_text(text, encoding="utf-8")
    for command in example.commands:
        subprocess.run(["sh", "-e", "-c", command], cwd=tmp_path, env=environment, timeout=SECONDS, check=True)
    with ExitStack() as stack:
        values = {"port": str(free_port()), "enter": ""}
        if "{redis}" in wanted:
            values["redis"] = stack.enter_context(start_redis(tmp_path / "redis")).address.url
        running = {}
        for path in example.files:
            given = [each.format(**values) for each in example.arguments[path] if each != "{enter}"]
            process = subprocess.Popen(
                [sys.executable, path, *given],
                cwd=tmp_path,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=stack.enter_context((tmp_path / f"{path}.out").open("wb")),
                stderr=subprocess.STDOUT,
            )
            running[path] = stack.enter_context(process)
            stack.callback(process.kill)
        deadline = Deadline.after(SECONDS)
        for path in sorted(running, key=lambda each: "{enter}" in example.arguments[each]):
            running[path].communicate(b"\n", timeout=deadline.remaining)
    printed = {path: (tmp_path / f"{path}.out").read_text(encoding="utf-8") for path in running}
    assert {path: process.returncode for path, process in running.items()} == dict.fromkeys(running, 0), printed
    assert {path: printed[path] for path in example.outputs} == example.outputs


def test_every_titled_program_is_an_example() -> None:
    for page in PAGES:
        above = TITLED.findall(page.read_text(encoding="utf-8"))
        missing = [line for line in above if not line.startswith("<!-- example: ")]
        assert missing == [] or page.name == NEEDS_RAY, page
