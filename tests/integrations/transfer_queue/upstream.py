"""Runs TransferQueue's own tests and its performance script with dray as the storage.

``python tests/integrations/transfer_queue/upstream.py CHECKOUT tests|performance``, with the interpreter of the
environment that ``make integrations`` has made. CHECKOUT is a checkout of TransferQueue's repository; nothing is
written to it. It starts Ray in a network namespace of loopback, with a home of its own.
"""

from __future__ import annotations

import argparse
import csv
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tests"))

import loopback  # noqa: E402

MIB = 1 << 20
TESTS = ("tests/test_kv_storage_manager.py", "tests/e2e/test_kv_interface_e2e.py",
         "tests/e2e/test_e2e_lifecycle_consistency.py")  # fmt: skip
SHAPES = ((128, 1, 2048), (128, 8, 256), (128, 32, 64), (256, 8, 8192), (256, 32, 2048), (1024, 1, 73728),
          (1024, 8, 9216), (1024, 32, 2304))  # fmt: skip
"""Samples, fields and numbers of 4 bytes in each: 1 MiB, 64 MiB and 288 MiB."""

PERFORMANCE = """
metrics: {enabled: false, port: 0}
controller: {sampler: SequentialSampler, polling_mode: false, zmq_info: null}
backend:
  storage_backend: dray
  SimpleStorage: {total_storage_size: null, num_data_storage_units: 2, zmq_info: null}
  dray: {capacity_bytes: 2147483648}
"""


def start_ray(folder: str) -> None:
    """A cluster of this process."""
    import ray

    ray.init(
        address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=8,
        object_store_memory=512 * MIB, _temp_dir=folder, log_to_driver=False,
        runtime_env={"worker_process_setup_hook": "dray.integrations.transfer_queue.register"},
    )  # fmt: skip


class Backend:
    """A pytest plug-in that adds dray to the backends of TransferQueue's test modules, and starts Ray before."""

    def pytest_collection_finish(self, session: Any) -> None:
        """The modules are imported, and none of their fixtures has run."""
        import dray.integrations.transfer_queue

        dray.integrations.transfer_queue.register()
        config = {
            "controller": {"polling_mode": True},
            "backend": {"storage_backend": "dray", "dray": {"capacity_bytes": 256 * MIB}},
        }
        for module in {item.module for item in session.items}:
            if hasattr(module, "BACKEND_CONFIGS"):
                module.BACKEND_CONFIGS["dray"] = config


def run_tests(checkout: Path) -> int:
    """TransferQueue's tests of a storage backend; the exit code of pytest."""
    import pytest

    os.environ["TQ_TEST_BACKEND"] = "dray"
    paths = [str(checkout / each) for each in TESTS]
    return int(pytest.main(["-q", "-W", "ignore", "-p", "no:cacheprovider", *paths], plugins=[Backend()]))


def run_performance(checkout: Path, folder: Path, iterations: int, shapes: Sequence[tuple[int, ...]]) -> int:
    """TransferQueue's performance script for its own storage and for dray, and a table."""
    import transfer_queue

    import dray.integrations.transfer_queue

    dray.integrations.transfer_queue.register()
    config = folder / "performance.yaml"
    config.write_text(PERFORMANCE)
    script = str(checkout / "scripts/performance_test/perftest.py")
    print(
        f"{'MiB':>6} {'fields':>6} {'operation':>9} {'SimpleStorage':>14} {'dray':>10} {'times':>6}   milliseconds"
    )
    for samples, fields, numbers in shapes:
        found: dict[str, dict[str, float]] = {}
        for backend in ("SimpleStorage", "dray"):
            output = folder / f"{backend}.csv"
            sys.argv = [
                script, f"--backend_config={config}", f"--backend={backend}", "--device=cpu",
                f"--global_batch_size={samples}", f"--field_num={fields}", f"--seq_len={numbers}",
                f"--num_test_iterations={iterations}", "--head_node_ip=127.0.0.1", f"--output_csv={output}",
            ]  # fmt: skip
            runpy.run_path(script, run_name="__main__")
            transfer_queue.close()
            with output.open() as lines:
                rows = list(csv.DictReader(lines))
            found[backend] = {what: min(float(row[f"{what}_time"]) for row in rows) for what in ("put", "get")}
        for what in ("put", "get"):
            own, ours = found["SimpleStorage"][what], found["dray"][what]
            size = samples * fields * numbers * 4 / MIB
            figures = f"{own * 1e3:>14.1f} {ours * 1e3:>10.1f} {own / ours:>6.1f}"
            print(f"{size:>6.0f} {fields:>6} {what:>9} {figures}", flush=True)
    return 0


def main() -> int:
    """Run one of the two in a namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of TransferQueue's repository")
    parser.add_argument("what", choices=["tests", "performance"])
    parser.add_argument("--iterations", type=int, default=3, help="of the performance script; the best one counts")
    parser.add_argument("--shape", action="append", metavar="SAMPLESxFIELDSxNUMBERS", help="instead of all")
    chosen = parser.parse_args()
    shapes = [tuple(map(int, each.split("x"))) for each in chosen.shape or ()] or SHAPES
    checkout = chosen.checkout.resolve()
    if not loopback.inside():
        with tempfile.TemporaryDirectory(prefix="dray-home-", dir="/tmp", ignore_cleanup_errors=True) as home:
            paths = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))
            variables = loopback.environment(Path(home), PYTHONPATH=paths)
            command = loopback.command([sys.executable, "-W", "ignore", *sys.argv])
            return subprocess.run(command, env=variables, check=False).returncode
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        start_ray(folder)
        if chosen.what == "tests":
            return run_tests(checkout)
        return run_performance(checkout, Path(os.environ["HOME"]), chosen.iterations, shapes)


if __name__ == "__main__":
    sys.exit(main())
