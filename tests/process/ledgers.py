"""Ledgers that the user's classes of a job keep, so that a test need not believe dray's own figures."""

import json
from pathlib import Path
from typing import Any

NOTE = """
import json, os, time
import numpy as np

def note(folder, name, line):
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, (json.dumps(line) + "\\n").encode())
    os.close(descriptor)
"""
"""How such classes begin: a line is in the ledger, whole, whatever happens to the process afterwards."""


def noted(path: Path) -> list[Any]:
    """The whole lines of a ledger."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]
