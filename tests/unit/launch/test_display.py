import io

from rich.console import Console

from dray.launch.display import Display, FigureReader
from dray.runtime.lifecycle import Phase
from dray.runtime.membership import MemberState, Role
from dray.runtime.messages import MemberStatus, ProgressReport, Status


def status(seconds: float, step: int, nbytes: int) -> Status:
    policy = ProgressReport(
        doing="waiting for 3 of 16 payloads",
        seconds=0.2,
        counters={"step": step, "payloads": 16 * step, "bytes": nbytes, "mean_return": 21.5, "staleness": 1.25},
        labels={"lane": "shm"},
    )
    dead = ProgressReport(doing="generating", seconds=1.0, counters={"payloads": 7})

    def member(name: str, role: Role, state: MemberState, progress: ProgressReport) -> MemberStatus:
        return MemberStatus(
            name=name, role=role, state=state, reason="silent", pid=1, silence=0.1, progress=progress
        )

    return Status(
        job="small",
        phase=Phase.RUNNING,
        seconds=seconds,
        outcome=None,
        prompts={},
        members=[
            member("policy-0", Role.POLICY, MemberState.ACTIVE, policy),
            member("rollout-0", Role.ROLLOUT, MemberState.DEAD, dead),
        ],
    )


def test_rate_follows_the_bytes() -> None:
    reader = FigureReader(100)
    assert reader.read(status(0, 0, 0)).rate == 0
    for second in range(1, 30):
        figures = reader.read(status(second, second, second * 2_000_000))
    assert 1.99 < figures.rate <= 2.0
    assert figures.line() == (
        f"  29.0 s  running  step 29/100  mean return 21.5  payloads 464  {figures.rate:.2f} MB/s  lane shm  "
        "staleness 1.25"
    )


def test_plain_output_is_a_line_now_and_then() -> None:
    console = Console(file=io.StringIO(), width=40)
    with Display("small", 100, console) as display:
        display.update(status(0, 0, 0))
        for second in range(1, 5):
            display.update(status(second, second, 0))
        display.say("a long line that is not wrapped, however narrow the console may be")
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2
    assert "step 1/100" in lines[0]


def test_terminal_shows_figures_and_every_replica() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=30)
    with Display("small", 100, console) as display:
        display.update(status(3, 12, 1000))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for words in (
        "12/100",
        "21.5",
        "192",
        "shm",
        "1.25",
        "policy-0",
        "waiting for 3 of 16",
        "rollout-0",
        "dead",
        "silent",
    ):
        assert words in text
