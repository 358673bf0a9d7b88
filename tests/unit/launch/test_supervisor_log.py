import logging
from pathlib import Path

from dray.config import LogLevel
from dray.launch.log import NAME, supervisor_log


def logged(folder: Path, level: LogLevel) -> list[str]:
    logger = logging.getLogger("dray.launch.supervisor")
    (folder / NAME).unlink(missing_ok=True)
    with supervisor_log(folder, level):
        for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logger.log(number, "a message")
    return [line.split()[3] for line in (folder / NAME).read_text().splitlines()]


def test_supervisor_logs_from_the_level_of_the_job_on(tmp_path: Path) -> None:
    before = logging.getLogger("dray").level
    assert logged(tmp_path, "debug") == ["DEBUG", "INFO", "WARNING", "ERROR"]
    assert logged(tmp_path, "info") == ["INFO", "WARNING", "ERROR"]
    assert logged(tmp_path, "error") == ["ERROR"]
    assert logging.getLogger("dray").level == before
