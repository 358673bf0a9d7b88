import os
from pathlib import Path

from dray.jobs.job_file import JobDraft, parse_job
from dray.jobs.launch.preparation import check_entry_points
from dray.jobs.process import SignalInbox

# The import continues when the FIFO beside the file has a writer.
CLASSES = """
from pathlib import Path
with (Path(__file__).parent / "gate").open() as gate:
    gate.read()
class Both:
    def setup(self, context): ...
    def load_weights(self, weights, version): ...
    def rollout(self, work_item): ...
    def train_step(self, trajectories): ...
    def weights(self): ...
    def save(self, folder): ...
    def load(self, folder): ...
"""


def test_z3_long_import_is_reported_while_it_lasts(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(CLASSES)
    os.mkfifo(tmp_path / "gate")
    config = parse_job(
        {
            "job": {"name": "small", "max_steps": 10},
            "rollout": {"worker": "slow.py:Both"},
            "policy": {"trainer": "slow.py:Both", "batch_size": 8},
        }
    )
    shown: list[str] = []

    def show_line(line: str) -> None:
        if not shown:  # the FIFO has a reader once
            (tmp_path / "gate").write_text("")
        shown.append(line)

    with SignalInbox() as inbox:
        assert (
            check_entry_points(JobDraft(config), tmp_path / "job.toml", tmp_path, inbox, show_line=show_line) == []
        )
    assert shown[0].startswith("importing slow.py:Both and slow.py:Both (2 s so far, at most 120 s)")
