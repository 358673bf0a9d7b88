"""The program behind ``make integrations``, without installing anything."""

import os
import subprocess
import sys
from pathlib import Path

import loopback
import pytest
from pythons import Row

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tests" / "integrations"))

import run as runner  # noqa: E402


def test_a_integration_is_a_folder_with_requirements(tmp_path: Path) -> None:
    for name, text in {"b": "ray==2.60.*\n", "a": "# environment: shared\n\n# why\ntorch==2.13.0\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "requirements.txt").write_text(text)
    (tmp_path / "no_integration").mkdir()
    first, second = runner.integrations(tmp_path)
    assert first == runner.Integration("a", "shared", ("torch==2.13.0",))
    assert second == runner.Integration("b", "b", ("ray==2.60.*",))


def test_integrations_that_share_an_environment_have_the_requirements_of_all() -> None:
    found = [
        runner.Integration("a", "e", ("x", "y")),
        runner.Integration("b", "e", ("y", "z"), ("w",)),
        runner.Integration("c", "c", ("x",)),
    ]
    assert runner.shared_requirements(found) == {"e": (["x", "y", "z"], ["w"]), "c": (["x"], [])}


def test_a_package_may_be_installed_without_its_dependencies() -> None:
    text = "# environment: e\n# without dependencies: verl==0.9.1\ntorch==2.13.0\n"
    assert runner.integration_of("verl", text) == runner.Integration(
        "verl", "e", ("torch==2.13.0",), ("verl==0.9.1",)
    )


def test_an_environment_is_made_again_when_its_requirements_or_the_interpreter_change() -> None:
    stamps = {
        runner.stamp_of(needed, python) for needed in (["x==1"], ["x==2"]) for python in ("3.11.1", "3.11.2")
    }
    assert len(stamps) == 4


def test_an_environment_that_is_there_is_used(tmp_path: Path) -> None:
    (tmp_path / "dray-stamp").write_text(runner.stamp_of(["x"], sys.version))
    assert runner.prepare(tmp_path, ["x"]) == str(tmp_path / "bin" / "python")


def test_the_table_has_a_line_for_each_integration() -> None:
    rows = [
        (Row("ray", "passed", 12, 0, 1, 34.4), "ray 2.60.0"),
        (Row("x", runner.SKIPPED), "cannot be installed"),
    ]
    header, first, second = runner.table(rows)
    assert header.split() == ["integration", "result", "passed", "failed", "skipped", "seconds", "packages"]
    assert first.split() == ["ray", "passed", "12", "0", "1", "34", "ray", "2.60.0"]
    assert second.endswith("cannot be installed")


@pytest.mark.parametrize(
    ("row", "result"),
    [
        (Row("a", "passed", 3, 0, 1), "passed"),
        (Row("a", "passed", 0, 0, 4), "skipped"),
        (Row("a", "failed", 0, 1, 4), "failed"),
    ],
)
def test_an_integration_whose_tests_were_all_skipped_is_skipped(row: Row, result: str) -> None:
    assert runner.replace_result(row).result == result


def test_every_integration_of_the_checkout_has_pinned_requirements() -> None:
    found = runner.integrations(ROOT / "tests" / "integrations")
    assert "transfer_queue" in [integration.name for integration in found]
    for integration in found:
        assert any("==" in each for each in (*integration.requirements, *integration.alone)), integration


def test_environments_are_kept_in_the_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runner.default_folder() == tmp_path / "dray" / "integrations"


def test_versions_are_those_in_the_environment() -> None:
    import numpy

    assert runner.versions(sys.executable, ["numpy>=1", "no-such-package"]) == f"numpy {numpy.__version__}"


@pytest.mark.skipif(loopback.problem() != "", reason="no network namespace can be made")
def test_in_the_namespace_there_is_loopback_alone() -> None:
    program = (
        "import os, socket; print([name for _, name in socket.if_nameindex() if name[:2] == 'et'])\n"
        "s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname()).close()\n"
        "print(os.path.exists(os.path.expanduser('~/ray_bootstrap_config.yaml')), os.environ['HOME'] != %r)\n"
        "print(open('/proc/self/net/route').read().splitlines()[1:])"
    )
    ended = loopback.run([sys.executable, "-c", program % os.environ.get("HOME")], timeout=60)
    assert ended.stdout.split("\n")[:3] == ["[]", "True True", "[]"], ended.stderr


def test_an_unknown_integration_is_refused() -> None:
    program = ROOT / "tests" / "integrations" / "run.py"
    ended = subprocess.run(
        [sys.executable, program, "no-such-integration"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert "there are" in ended.stderr
