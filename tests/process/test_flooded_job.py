"""A job whose listening sockets are full of connections from strangers."""

import resource
import select
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
from job_runner import job_settings, running
from soak.flood import Flood, addresses_of

from dray.admission import MAX_UNPROVEN

SMALL_LIMIT = 160
STOP = """
[stop]
metric = "score"
at_least = 25
"""


@contextmanager
def descriptor_limit(soft: int) -> Iterator[None]:
    """What is started meanwhile may open so many descriptors, unless it raises its limit."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def test_job_is_solved_while_strangers_hold_more_connections_than_a_process_may_open(tmp_path: Path) -> None:
    with ExitStack() as opened:
        with descriptor_limit(SMALL_LIMIT):
            job = opened.enter_context(running(tmp_path, *job_settings("job.lane=auto"), stop_table=STOP))
        job.wait_until(lambda: job.step() > 0, "the first step")
        processes = job.processes("dray.jobs")
        controller = job.only("dray.jobs.controller.app")
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limits = {each.rlimit(psutil.RLIMIT_NOFILE) for each in (psutil.Process(job.pid), *processes)}
        assert limits == {(hard, hard)}
        floods = [opened.enter_context(Flood(addresses_of(each), 2 * SMALL_LIMIT)) for each in processes]
        descriptors = []
        while job.process.poll() is None:
            for flood in floods:
                flood.turn()
            with suppress(psutil.Error):
                descriptors.append(controller.num_fds())
            select.select([], [], [], 0.1)
        assert job.end() == 0, job.story()
        assert "solved: score 25 >= 25 at step 25" in job.text
        assert all(flood.done["closed by the job"] > SMALL_LIMIT for flood in floods)
        assert max(descriptors) < MAX_UNPROVEN + 50
        assert sum(path.stat().st_size for path in job.logs()) < 64 << 10
        log = job.log("controller")
        assert "silent for" not in log
        assert "a connection could not be accepted" not in log
