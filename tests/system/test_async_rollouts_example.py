from pathlib import Path

import pytest
from example_runs import EXAMPLES, run_example, steps_of, summary_of

BOUND = 60.0


@pytest.mark.timeout(BOUND + 10)
def test_asynchronous_worker_has_eight_work_items_in_flight_and_uses_every_row(tmp_path: Path) -> None:
    output = tmp_path / "out"
    ended = run_example("async_rollouts", output, bound=BOUND)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "all 40 steps are done" in ended.stdout
    metrics = [step["metrics"] for step in steps_of(output)]
    rows = (EXAMPLES / "async_rollouts" / "items.jsonl").read_text(encoding="utf-8").splitlines()
    assert metrics[-1]["in_flight"] == 8
    assert metrics[-1]["sums"] == len(rows) == 24
    assert metrics[-1]["error"] < metrics[0]["error"] / 2
    summary = summary_of(output)
    assert (summary["payloads"], summary["lost"], summary["stale"]) == (40 * 16, 0, 0)
    assert (summary["work_items"]["failed_attempts"], summary["work_items"]["given_up"]) == (0, 0)
