"""Completion of the `dray` command in the shells that docs/how-to/shell-completion.md names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys

from dray.cli.app import main

sys.argv[0] = "dray"
main()
"""


def completed(words: str, variables: dict[str, str], folder: Path) -> str:
    """What `dray` prints when a shell asks it to complete words."""
    environment = {**os.environ, "HOME": str(folder), **variables}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == "", words
    return done.stdout


@pytest.mark.parametrize(("words", "expected"), [("dray sta", ["status"]), ("dray run --res", ["--resume"])])
def test_bash_is_offered_commands_and_options(words: str, expected: list[str], tmp_path: Path) -> None:
    last = str(len(words.split()) - 1)
    asked = {"COMP_WORDS": words, "COMP_CWORD": last, "_DRAY_COMPLETE": "complete_bash"}
    assert completed(words, asked, tmp_path).split() == expected


@pytest.mark.parametrize(
    ("shell", "more"), [("zsh", {}), ("fish", {"_TYPER_COMPLETE_FISH_ACTION": "get-args"})], ids=["zsh", "fish"]
)
def test_other_shells_are_offered_commands_with_their_help(
    shell: str, more: dict[str, str], tmp_path: Path
) -> None:
    asked = {"_TYPER_COMPLETE_ARGS": "dray sta", "_DRAY_COMPLETE": f"complete_{shell}", **more}
    printed = completed("dray sta", asked, tmp_path)
    assert "status" in printed
    assert "Show the state of a running job" in printed


def test_bash_installs_completion_in_the_files_that_the_page_names(tmp_path: Path) -> None:
    program = tmp_path / "dray"
    program.write_text(f"#!{sys.executable}\n{PROGRAM}")
    program.chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    # The second command keeps bash from replacing itself by the program: it must be the program's parent.
    script = f"{program} --install-completion && true"
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert str(tmp_path / ".bash_completions" / "dray.sh") in done.stdout
    assert str(tmp_path / ".bash_completions" / "dray.sh") in (tmp_path / ".bashrc").read_text()
    script = "source ~/.bashrc; COMP_WORDS=(dray sta); COMP_CWORD=1; _dray_completion dray; echo ${COMPREPLY[@]}"
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "status\n"
