"""Jobs whose terminal closes, or that are started without standard streams."""

import os
import signal
from pathlib import Path

from job_runner import job_settings, running

# The first terminal that the leader of a session opens is the one that controls it.
ON_TERMINAL = ("sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1')
WITHOUT_STREAMS = ("sh", "-c", 'trap "" HUP; exec "$@" <&- >&- 2>&-', "sh")


def test_job_whose_terminal_closes_leaves_a_checkpoint_and_resumes_from_it_without_streams_and_under_nohup(
    tmp_path: Path,
) -> None:
    terminal, end = os.openpty()
    with running(tmp_path, *job_settings("stop.at_least=1e9"), prefix=(*ON_TERMINAL, os.ttyname(end))) as job:
        job.wait_until(lambda: job.step() > 1, "training steps")
        os.close(end)
        os.close(terminal)
        assert job.end() == 129, job.story()
        assert job.summary()["exit_reason"] == "interrupted by SIGHUP"
        step = job.checkpoint()["step"]
        assert step == job.summary()["steps"] > 1
    goal = step + 10
    with running(tmp_path, "--resume", *job_settings(f"stop.at_least={goal}"), prefix=WITHOUT_STREAMS) as job:
        job.wait_until(lambda: job.step() > step, "another training step")
        job.process.send_signal(signal.SIGHUP)
        assert job.end() == 0, job.story()
        assert job.summary()["exit_reason"] == f"score {goal} >= {goal} at step {goal}"
        assert (job.checkpoint()["step"], job.text) == (goal, "")
