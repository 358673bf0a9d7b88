"""Batch scripts from templates. Values are made words of the shell in the template, by the filter `sh`."""

from __future__ import annotations

import shlex
from typing import Any


def render(name: str, **values: Any) -> str:
    """The batch script that the template `name` in the folder templates/ gives.

    Raises:
        ModuleNotFoundError: Jinja2 is not installed.
        jinja2.UndefinedError: the template names a value that is not given.
    """
    import jinja2  # here, as nothing but the commands for Slurm needs it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # it is a shell script
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["sh"] = shell_word
    return environment.get_template(name).render(**values)


def shell_word(value: object) -> str:
    """`value` as one word of the shell, whatever it contains; sbatch reads `#SBATCH` lines by the same rules."""
    return shlex.quote(str(value))
