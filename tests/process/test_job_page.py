"""The page of a job in a real browser."""

import re
from pathlib import Path

from browser import browser, needs_browser
from job_runner import CLASSES, JobRun, job_settings, running
from test_ordered_recordings import recording

# What a worker prints goes to its log as it is; what it raises is reported to the controller.
HOSTILE = '<script>document.title = "broken"</script><img src=x onerror="document.title = 1">'
PRINTING = CLASSES.replace(
    "def rollout(self, work_item):",
    f"def rollout(self, work_item):\n        print({HOSTILE!r} + '\\x1b[2J', flush=True)",
)
PRINTING = PRINTING.replace('"the environment broke"', repr(f"the environment broke {HOSTILE}"))
PRINTING = PRINTING.replace(
    'if index >= self.args.get("raise_at", 1 << 60)', 'if self.hangs.with_name("break").exists()'
)

pytestmark = needs_browser


def page_of(job: JobRun) -> str:
    """The URL of the page that the job has printed."""
    job.wait_for("dray status --page")
    (found,) = re.findall(
        r"^page: (\S+) \(opens once; for another URL: dray status --page \S+\)$", job.text, re.MULTILINE
    )
    return str(found)


def test_browser_shows_a_job_until_it_fails_and_what_its_worker_prints_stays_text(tmp_path: Path) -> None:
    settings = job_settings("stop.at_least=1e9", "rollout.max_attempts=1", "rollout.max_failures=1")
    with browser(tmp_path / "profile") as window, running(tmp_path, *settings, classes=PRINTING) as job:
        url = page_of(job)
        window.open(url)
        window.wait_for("running", "#phase")
        window.wait_for("/16", "#members")
        window.wait_for("score", "#metrics")
        window.wait_for(f"rollout-0 {HOSTILE}\\x1b[2J", "#log")
        assert window.url == url.partition("?")[0]
        (cookie,) = window.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/")
        with recording(job, tmp_path / "recording", "--payloads", "8") as command:
            window.wait_for("recording into ", "#recording")
            window.wait_for("recording has ended: 8 payloads", "#recording")
            assert command.end() == 0, command.text
        plots = window.run(
            "return [...document.querySelectorAll('figure path')].map((each) => each.getAttribute('d'))"
        )
        assert len(plots) == 7
        assert window.run("return document.querySelectorAll('script').length + document.images.length") == 1
        window.resize(500, 900)
        assert window.run("return document.documentElement.scrollWidth <= window.innerWidth"), "a narrow window"
        (job.output / "break").touch()
        window.wait_for("The job has ended (failed): ", "#notice")
        assert f"the environment broke {HOSTILE}" in window.text("#notice")
        assert re.fullmatch(r"\w+, step \d+: small", window.run("return document.title"))
        assert job.end() != 0
        # Nothing that a policy forbids was tried, and no script has failed; the controller may be gone.
        assert [line for line in window.messages() if "ERR_CONNECTION_REFUSED" not in line] == []
        secret = cookie["value"], url.partition("=")[2]
        assert [log for log in job.logs() for each in secret if each in log.read_text()] == []


def test_browser_shows_a_stall_and_a_spent_token_opens_no_other_browser(tmp_path: Path) -> None:
    settings = job_settings("stop.at_least=1e9", "timeouts.stall=1", "rollout.args={hang_at=30}")
    with running(tmp_path, *settings) as job:
        url = page_of(job)
        with browser(tmp_path / "first") as window:
            window.open(url)
            window.wait_for("stall: policy-0 waits for the rollout replicas", "#stall")
            window.wait_for("policy-0 waits for the rollout replicas", "#stalls")
            window.wait_for("the rollout replicas", "#members")
            window.open(url)  # this browser has the page open
            window.wait_for("running", "#phase")
        with browser(tmp_path / "second") as window:
            window.open(url)
            window.wait_for("This page opens with a one-time token")
            assert window.cookies() == []
