"""The lines on the page about cosmos-rl run as they stand."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cosmos_package import TensorPacker
from cosmos_rl.utils.payload_transport import PayloadTransportRegistry, get_payload_transfer_mode

pytestmark = pytest.mark.integration

PAGE = (Path(__file__).parents[3] / "docs" / "how-to" / "cosmos-rl.md").read_text(encoding="utf-8")


def fence(language: str) -> str:
    """The first block of a language on the page."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_five_lines_select_the_transport_and_carry_a_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    job = SimpleNamespace(**tomllib.loads(fence("toml")))

    def main(*, data_packer: Any) -> None:
        """As a worker does it: the transport that the configuration names is attached to the script's packer."""
        transport = PayloadTransportRegistry.get(get_payload_transfer_mode(job))
        transport.attach_data_packer(data_packer, config=job)
        try:
            (completion,), *_ = data_packer.get_rollout_output([{"rewards": np.ones(3)}], None, None, None)
            assert data_packer.get_policy_input(rollout_output=completion)["rewards"].tolist() == [1.0] * 3
        finally:
            transport.close_data_packer(data_packer)
            transport.close_producer(None)

    launcher, entry = ModuleType("cosmos_rl.launcher"), ModuleType("cosmos_rl.launcher.worker_entry")
    vars(entry)["main"] = main
    monkeypatch.setitem(sys.modules, launcher.__name__, launcher)
    monkeypatch.setitem(sys.modules, entry.__name__, entry)
    packer = TensorPacker()
    exec(fence("python"), {"packer": packer})
    assert len(packer.seen) == 1


AS_A_SCRIPT = """
import runpy, sys, types
import cosmos_package
for name in ("cosmos_rl.launcher", "cosmos_rl.launcher.worker_entry"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["cosmos_rl.launcher.worker_entry"].main = lambda: print("main")
runpy.run_module("dray.integrations.cosmos_rl", run_name="__main__")
from cosmos_rl.utils.payload_transport import PayloadTransportRegistry
import dray.integrations.cosmos_rl
assert PayloadTransportRegistry.get("dray") is dray.integrations.cosmos_rl.transport
"""


def test_the_module_stands_for_a_script_and_registers_once() -> None:
    found = subprocess.run(
        [sys.executable, "-c", AS_A_SCRIPT], capture_output=True, text=True, timeout=100, check=False,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (0, "main\n"), found.stderr
