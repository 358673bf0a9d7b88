import json
from pathlib import Path

import pytest

from dray.cli.status import find_running, read_address, status_lines
from dray.errors import ConfigError
from dray.files import write_json
from dray.jobs.folder import JobFolder
from dray.jobs.messages.models import Status

URL = "http://127.0.0.1:9400"


def advertised(root: Path, document: object = None, mode: int = 0o600) -> JobFolder:
    folder = JobFolder(root)
    folder.run.mkdir(parents=True)
    write_json(folder.controller_address, {"url": URL, "token": "t" * 16}, mode=mode)
    if document is not None:
        folder.controller_address.write_text(json.dumps(document))
    return folder


def test_address_is_that_of_the_job_in_the_folder(tmp_path: Path) -> None:
    assert read_address(advertised(tmp_path / "out")) == (URL, "t" * 16)


def test_folder_without_a_running_job_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the output folder of a running job") as caught:
        read_address(JobFolder(tmp_path))
    assert (caught.value.key, caught.value.value) == ("OUTPUT", str(tmp_path))


@pytest.mark.parametrize("document", [[], {"url": URL}, "text"])
def test_damaged_address_is_an_error_that_names_the_file(tmp_path: Path, document: object) -> None:
    with pytest.raises(ConfigError, match=r"controller\.json"):
        read_address(advertised(tmp_path / "out", document))


def test_only_running_job_is_found_and_several_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        find_running(tmp_path)
    (tmp_path / "small" / "001").mkdir(parents=True)
    advertised(tmp_path / "small" / "002")
    assert find_running(tmp_path) == tmp_path / "small" / "002"
    advertised(tmp_path / "large" / "001")
    with pytest.raises(ConfigError) as caught:
        find_running(tmp_path)
    assert f"{tmp_path}/large/001, {tmp_path}/small/002" in str(caught.value)


def member(name: str, state: str, reason: str, silence: float, progress: object) -> dict[str, object]:
    role = name.partition("-")[0]
    fixed = {"name": name, "role": role, "pid": 7, "state": state, "reason": reason}
    return {**fixed, "silence": silence, "progress": progress}


def test_lines_show_the_job_and_each_replica() -> None:
    progress = {"doing": "training", "seconds": 1.0, "counters": {"step": 12}}
    stuck = {"doing": "acting", "seconds": 2.0, "waits_for": "the policy"}
    answer = Status.model_validate(
        {
            "job": "small",
            "phase": "running",
            "seconds": 31.25,
            "outcome": {"kind": "interrupted", "reason": "Ctrl-C"},
            "work_items": {},
            "stall": {"line": "policy-0\x1b[2J\nwaits", "seconds": 3.0, "reports": 1},
            "members": [
                member("rollout-0", "active", "", 0.5, stuck),
                member("rollout-1", "dead", "killed", 9.0, stuck),
                member("policy-0", "active", "", 0.25, progress),
            ],
        }
    )
    assert list(status_lines(answer, URL)) == [
        f"job small: running for 31.2 s, step 12; controller at {URL}",
        "outcome: interrupted, Ctrl-C",
        "stall: policy-0\\x1b[2J waits",
        "policy-0   active  training for 1.2 s",
        "rollout-0  active  acting for 2.5 s, waits for the policy",
        "rollout-1  dead  killed",
    ]
