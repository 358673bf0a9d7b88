import logging
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.jobs.config import LogLevel
from dray.jobs.launch.output import LOG_NAME, supervisor_log


def logged(folder: Path, level: LogLevel) -> list[str]:
    logger = logging.getLogger("dray.jobs.launch.supervisor")
    (folder / LOG_NAME).unlink(missing_ok=True)
    with supervisor_log(folder, level):
        for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logger.log(number, "a message")
    return [line.split()[3] for line in (folder / LOG_NAME).read_text().splitlines()]


def test_supervisor_logs_from_the_level_of_the_job_on(tmp_path: Path) -> None:
    before = logging.getLogger("dray").level
    assert logged(tmp_path, "debug") == ["DEBUG", "INFO", "WARNING", "ERROR"]
    assert logged(tmp_path, "info") == ["INFO", "WARNING", "ERROR"]
    assert logged(tmp_path, "error") == ["ERROR"]
    assert logging.getLogger("dray").level == before


def test_log_is_not_written_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("content")
    (tmp_path / LOG_NAME).symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="not a symbolic link"), supervisor_log(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "content"


def test_text_of_others_begins_no_line_of_its_own(tmp_path: Path) -> None:
    with supervisor_log(tmp_path):
        logging.getLogger("dray.jobs.launch").info("rollout-0: %s", "text\n2026-01-01 forged\x1b[2J")
    first, second = (tmp_path / LOG_NAME).read_text().splitlines()
    assert first.endswith("rollout-0: text")
    assert second == "    2026-01-01 forged\\x1b[2J"
