from pathlib import Path

import pytest
from job_runner import job_settings, running
from redis_refusals import REFUSALS, administrator
from waiting import wait_until

from dray.clock import Deadline
from dray.jobs.queue import KEY_LIFETIME, JobKeys, RedisConnection, start_redis


@pytest.mark.parametrize("transfer", ["reference", pytest.param("inline", marks=pytest.mark.endurance)])
def test_r1_job_continues_when_a_configured_redis_is_restarted_empty(tmp_path: Path, transfer: str) -> None:
    with start_redis(tmp_path / "redis") as server:
        settings = job_settings(
            f"redis.url={server.address.url}", f"job.transfer={transfer}", "stop.at_least=120", "timeouts.redis=20"
        )
        with running(tmp_path, *settings) as job:
            job.wait_for("  step ")
            server.restart()
            assert job.end() == 0, job.story()
            assert job.summary()["steps"] == 120
        with RedisConnection(server.address) as connection:
            keys = connection.call("KEYS", lambda client: client.do("KEYS", "*"), Deadline.after(5))
        assert list(keys) == []


REMOVE_ENTRIES = """
if redis.call('XLEN', KEYS[1]) == redis.call('XPENDING', KEYS[1], 'policy')[1] then return 0 end
return redis.call('XTRIM', KEYS[1], 'MAXLEN', 0)
"""
"""As another client may, but at a moment when some entries were given to no consumer yet."""


@pytest.mark.parametrize("transfer", ["reference", pytest.param("inline", marks=pytest.mark.endurance)])
def test_job_continues_through_refusals_and_removed_entries_and_leaves_nothing(
    tmp_path: Path, transfer: str
) -> None:
    with start_redis(tmp_path / "redis") as server, administrator(server.address) as admin:
        settings = job_settings(
            f"redis.url={server.address.url}", f"job.transfer={transfer}", "stop.at_least=60", "timeouts.redis=20"
        )
        with running(tmp_path, *settings) as job:
            job.wait_for("  step ")
            keys = JobKeys(job.spec().job_id)
            for code in ("READONLY", "BUSY"):
                with REFUSALS[code](admin):
                    job.wait_until(
                        lambda code=code: f" refuses ({code} " in job.log("policy-0"), f"{code} to be met"
                    )
                    refused = job.step()
                job.wait_until(lambda refused=refused: job.step() > refused + 1, "steps after the refusal")
            lifetimes = [admin.do("TTL", key) for key in admin.do("KEYS", f"{keys.prefix}*")]
            wait_until(lambda: admin.do("EVAL", REMOVE_ENTRIES, 1, keys.rollouts), "entries to remove", pause=0.0)
            assert job.end() == 0, job.story()
        assert len(lifetimes) >= 5
        assert all(0 < each <= KEY_LIFETIME for each in lifetimes)
        assert admin.do("KEYS", "*") == []
        assert [job.log("policy-0").count(f" refuses ({code} ") for code in ("READONLY", "BUSY")] == [1, 1]
        delivery = job.summary()["delivery"]
        assert job.summary()["steps"] == 60
        ended = ("trained", "discarded", "too_old", "repeated", "trimmed", "dead_letters", "backlog")
        assert delivery["published"] == sum(delivery[name] for name in ended), delivery
        assert delivery["trained"] == 480
        assert delivery["trimmed"] >= 1


def test_a_server_that_is_of_no_use_ends_the_run_with_one_line_before_anything_starts(tmp_path: Path) -> None:
    with start_redis(tmp_path / "redis") as server, administrator(server.address) as admin:
        settings = job_settings(f"redis.url={server.address.url}", "timeouts.redis=0.5")
        with REFUSALS["READONLY"](admin), running(tmp_path, *settings) as job:
            assert job.end(bound=30.0) == 2, job.story()
    assert "READONLY You can't write against a read only replica" in job.text
    assert "must be the URL of a server that answers and lets a job read and write streams" in job.text
    assert len(job.lines) == 1
    assert not job.output.exists()
    assert server.address.options()["password"] not in job.text
