from pathlib import Path

import pytest
from job_runner import job_settings, running

from dray.clock import Deadline
from dray.control import RedisConnection, start_redis


@pytest.mark.parametrize("transfer", ["ucxx", "redis"])
def test_r1_job_goes_on_when_a_configured_redis_is_restarted_empty(tmp_path: Path, transfer: str) -> None:
    with start_redis(None, tmp_path / "redis") as server:
        settings = job_settings(
            f"redis.url={server.url}", f"job.payload_transfer={transfer}", "stop.at_least=120", "timeouts.redis=20"
        )
        with running(tmp_path, *settings) as job:
            job.wait_for("  step ")
            server.restart()
            assert job.end() == 0, job.story()
            assert job.summary()["steps"] == 120
        with RedisConnection(server.address) as connection:
            keys = connection.call("KEYS", lambda client: client.do("KEYS", "*"), Deadline.after(5))
        assert list(keys) == []
