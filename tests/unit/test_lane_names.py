"""The names of the lanes, which the job file is checked against without the lanes being imported."""

import subprocess
import sys

from dray.identifiers import LANE_NAMES
from dray.transport.lanes import LANES


def test_names_are_those_of_the_table_of_lanes() -> None:
    assert tuple(LANES) == LANE_NAMES


def test_commands_and_the_controller_start_without_numpy() -> None:
    program = "import sys, dray.cli.app, dray.jobs.controller.app; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
