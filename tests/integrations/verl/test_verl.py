"""verl's own managers, buffers and workers with dray behind them: what docs/how-to/verl.md promises."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optional import require

require("ray", "torch", "verl")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SECONDS = 500
"""A scenario takes half a minute on a machine that has nothing else to do: each worker imports verl."""
NAMESPACE = ("unshare", "--net") if os.getuid() == 0 else ("unshare", "--map-root-user", "--net")

pytestmark = [pytest.mark.integration, pytest.mark.timeout(SECONDS + 30)]

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def home() -> Iterator[Path]:
    """The file in it keeps Ray from asking for the machine's cloud. Ray's sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="dray-home-", dir="/tmp"))
    (folder / "ray_bootstrap_config.yaml").write_text("provider: {type: local}\n")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(home: Path) -> Run:
    """Runs a function of `verl_scenarios` in a cluster that can reach nothing but loopback."""

    def call(scenario: str, *, plugins: str = "none", modules: str = "", **arguments: Any) -> dict[str, Any]:
        command = [sys.executable, str(HERE / "verl_scenarios.py"), scenario, json.dumps(arguments)]
        environment = {
            "DRAY_SCOPE": home.name,
            "HOME": str(home),
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", HERE))),
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": str(home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "VERL_USE_EXTERNAL_MODULES": modules,
            "VERL_USE_EXTERNAL_PLUGINS": plugins,
        }
        done = subprocess.run(
            [*NAMESPACE, "sh", "-c", f"ip link set lo up; exec {shlex.join(command)}"],
            cwd=home, env={**os.environ, **environment}, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    return call


def page_block(name: str, language: str) -> str:
    """What stands in a block of code of the page."""
    text = (ROOT / "docs" / "how-to" / "verl.md").read_text(encoding="utf-8")
    found = re.search(rf"^<!-- integration: verl/{name} -->\n```{language}\n(.*?)^```$", text, re.M | re.S)
    assert found is not None
    return found[1]


def page_settings() -> dict[str, Any]:
    """What stands in the page below `checkpoint_engine`."""
    import yaml  # it comes with ray

    settings: dict[str, Any] = yaml.safe_load(page_block("checkpoint_engine.yaml", "yaml"))
    return dict(settings["actor_rollout_ref"]["rollout"]["checkpoint_engine"])


def test_with_the_settings_of_the_page_every_byte_reaches_all_rollouts_in_memory_that_they_share(run: Run) -> None:
    found = run("updates", steps=4, engine={}, settings=page_settings())
    assert [each["right"] for each in found["updates"]] == [[True, True]] * 4
    for version, each in enumerate(found["updates"], start=1):
        assert each["metrics"]["dray/version"] == version
        drained = each["metrics"]["drained/0"], each["metrics"]["drained/1"]
        assert drained == (15, 15), "each actor takes part in gathering"
    assert found["cached"] == [True, True]
    assert set(found["shared"][0]) & set(found["shared"][1]), "both have mapped the memory of the actor"


def test_the_entry_point_of_dray_is_enough(run: Run) -> None:
    if not importlib.metadata.entry_points(group="verl.plugins", name="dray"):
        pytest.skip("dray is not installed, and has no entry points")
    found = run("updates", plugins="auto", steps=1, plugin=True, actors=1, rollouts=1, engine={"timeout": 60.0})
    assert found["updates"][0]["right"] == [True]


@pytest.mark.parametrize("delta", ["full", "sparse"])
def test_every_byte_reaches_rollouts_on_other_hosts(run: Run, home: Path, delta: str) -> None:
    other = home / "other"
    engine = {"timeout": 60.0, "listen": "tcp", "delta": delta}
    found = run(
        "updates", steps=4, engine=engine, actors=1, rollouts=1, elsewhere=str(other), megabytes=3, changed=0.02
    )
    assert [each["right"] for each in found["updates"]] == [[True]] * 4
    assert found["cached"] == [True]


def test_a_killed_rollout_is_reported_and_the_others_continue_without_it(run: Run) -> None:
    found = run("killed", actors=1, engine={"timeout": 60.0})
    assert found["error"].startswith("ActorDiedError"), found
    assert found["seconds"] < 60
    assert found["after"] == [[True]] * 3


def test_weights_that_are_not_sent_are_reported_in_time(run: Run) -> None:
    found = run("missing", actors=1, rollouts=1, engine={"timeout": 3.0})
    assert found["absent"]["error"].startswith("StreamError")
    assert "of step 1, not of step 2" in found["absent"]["error"]
    assert found["unsent"]["error"].startswith("StreamTimeout")
    assert 3 <= found["unsent"]["seconds"] < 30


def test_samples_of_training_steps_travel_with_their_own_content_as_the_page_configures_it(run: Run) -> None:
    """verl's replay buffer, bridge and dispatch; the steps together store more than dray has memory for."""
    export, _, command = page_block("transfer_queue.sh", "sh").partition("\n")
    modules = export.removeprefix("export VERL_USE_EXTERNAL_MODULES=")
    overrides = shlex.split(command.replace("\\\n", " "))[3:]
    capacity = 2 << 20
    overrides.append(f"transfer_queue.backend.dray.capacity_bytes={capacity}")
    found = run("samples", modules=modules, steps=6, prompts=8, tokens=2000, overrides=overrides)
    assert found["wrong"] == []
    assert found["compared"] == 6 * 8 * 2 * 9
    assert found["left"] == 0
    assert found["stored"] > 4 * capacity, "each of four processes has so much memory"
