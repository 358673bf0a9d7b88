"""cosmos-rl's own tests of transports, pointed at dray: every one of them passes, but for those that are named."""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pointed_at_dray import point

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent
SOURCE = "DRAY_COSMOS_RL_SOURCE"
"""A folder with a checkout of cosmos-rl, or an unpacked source distribution; without it, pip downloads that."""

MODULES = ("test_payload_transport.py", "test_transport_strategy.py", "test_comm_base_attach.py")

NOT_OF_DRAY = {
    "the older key nccl_payload_transfer selects nccl": ["legacy_boolean_resolves_to_nccl"],
    "names of nccl's messages and modules": [
        "TestNcclProtocolHelpers", "TestBackwardCompatShim", "TestCommCapSizing", "TestResolveCustomInt",
    ],
    "dray sends discards to the producer itself, not over Redis": [
        "publish_cleanup_routes_to_correct", "partitions_discards_by_completion_prefix",
        "continues_after_per_transport_failure",
    ],
    "the worker gives packers a Redis client, not the transport": [
        "attach_assigns_redis_client_then_calls_post_hook", "attach_post_hook_exception_is_logged_not_raised",
        "skipped_for_nccl_mode_to_avoid_double_inject",
    ],
    "dray serves every rank of a group": [
        "test_context_parallel_rejected", "test_error_reports_every_offending_dim",
        "attach_rejects_model_parallel",
    ],
    "make_transport_strategy knows two names; dray attaches its strategy itself": [
        "TestFactorySelectsFromConfig and not redis_needs_no_strategy",
    ],
    "the strategies and packers of nccl and ucxx": [
        "TestStrategyTelemetryCountsTheBatch", "ucxx_attach_wires", "a_transport_mixin_packer_still",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def upstream() -> Path:
    """The folder of cosmos-rl's tests. What pip has downloaded is kept in this environment."""
    if SOURCE in os.environ:
        return Path(os.environ[SOURCE]) / "tests"
    version = importlib.metadata.version("cosmos-rl")
    kept = Path(sys.prefix) / "sources"
    if not (kept / f"cosmos_rl-{version}" / "tests").is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--retries=0",
            "--no-deps",
            "--no-binary=:all:",
        ]
        found = subprocess.run(
            [*command, "--dest", str(kept), f"cosmos-rl=={version}"], capture_output=True, text=True, check=False
        )
        if found.returncode:
            reason = found.stderr.strip()[-200:]
            pytest.skip(f"the source of cosmos-rl {version} is not here, and pip has not got it: {reason}")
        with tarfile.open(kept / f"cosmos_rl-{version}.tar.gz") as tar:
            tar.extractall(kept, filter="data")
    return kept / f"cosmos_rl-{version}" / "tests"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("module", MODULES)
def test_its_own_tests_pass_with_dray_in_the_place_of_its_transports(
    module: str, upstream: Path, tmp_path: Path
) -> None:
    point(upstream / module, tmp_path / module)
    left_out = " or ".join(f"({name})" for names in NOT_OF_DRAY.values() for name in names)
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pointed_at_dray", "-p", "no:valkey"]
    command += ["-k", f"not ({left_out})", "-c", os.devnull, "--rootdir", str(tmp_path), f"--junitxml={report}"]
    run = subprocess.run(
        [*command, module], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert report.is_file(), run.stdout + run.stderr
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        failed = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        results[name] = failed[0] if failed else "passed"
    for name, outcome in results.items():
        print(f"{outcome:8} {module}::{name}")
    assert run.returncode == 0, run.stdout
    assert Counter(results.values()).keys() == {"passed"}
