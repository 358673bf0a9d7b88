"""The dashboard of Grafana and the alert rules of Prometheus, checked against a job and a real Prometheus."""

import json
import re
import shutil
import signal
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from job_runner import job_settings, running
from waiting import wait_until

from dray.jobs.controller.metrics import FAMILIES

MONITORING = Path(__file__).parents[2] / "monitoring"
DASHBOARD = MONITORING / "grafana-dashboard.json"
ALERTS = MONITORING / "prometheus-alerts.yml"
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "watch-a-job.md"


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.mark.parametrize("file", [DASHBOARD, ALERTS], ids=lambda path: path.name)
def test_dashboard_and_alerts_name_metrics_that_a_job_has(file: Path) -> None:
    named = set(re.findall(r"\bdray_\w+", file.read_text()))
    assert len(named) > 5
    assert named <= {family.name for family in FAMILIES}


def test_every_panel_has_a_title_of_its_own_and_a_place_that_no_other_covers() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_alert_rules_and_the_scrape_configuration_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "prometheus.yml").write_text(configuration(tmp_path / "token", 9400))
    (tmp_path / "token").write_text("0" * 32)
    for command in (["rules", str(ALERTS)], ["config", str(tmp_path / "prometheus.yml")]):
        checked = subprocess.run(["promtool", "check", *command], capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def configuration(token: Path, port: int) -> str:
    """The one of the page, for this token and this port, with the alert rules."""
    text = PAGE.read_text(encoding="utf-8").split("## With Prometheus\n")[1]
    (scrape,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[:1]
    scrape = scrape.replace("/etc/prometheus/dray-token", str(token)).replace(
        "127.0.0.1:9400", f"127.0.0.1:{port}"
    )
    return f'global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ["{ALERTS}"]\n{scrape}'


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_every_query_of_the_dashboard_has_data_while_a_job_runs(tmp_path: Path) -> None:
    token, port = tmp_path / "token", free_port()
    settings = ("stop.at_least=1e9", f"controller.port={port}", f'controller.token_file="{token}"')
    with running(tmp_path, *job_settings(*settings)) as job:
        job.wait_for("  step ")
        with prometheus(tmp_path, configuration(token, port)) as ask:

            def without_data() -> list[str]:
                shown = [each.replace("$__rate_interval", "15s").replace("$job", "small") for each in queries()]
                return [each for each in shown if not ask("query", query=each)["result"]]

            # Two samples make a rate.
            wait_until(lambda: not without_data(), "data for every query", 60.0, pause=0.3, story=without_data)
            (rules,) = [group["rules"] for group in ask("rules")["groups"]]
            assert [rule["health"] for rule in rules] == ["ok"] * len(rules)
            assert ask("query", query='up{job="dray"}')["result"][0]["value"][1] == "1"
        job.process.send_signal(signal.SIGINT)
        assert job.end() == 130, job.story()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def prometheus(folder: Path, text: str) -> Iterator[Any]:
    """A Prometheus on loopback; yields a function that calls its API."""
    (folder / "prometheus.yml").write_text(text)
    port = free_port()
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/samples",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None

    def ask(what: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{port}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)["data"]

    try:
        log = []
        for line in server.stderr:
            log.append(line)
            if "Server is ready to receive web requests" in line:
                break
        else:
            pytest.fail("".join(log))
        yield ask
    finally:
        server.kill()
        server.communicate(timeout=20)
