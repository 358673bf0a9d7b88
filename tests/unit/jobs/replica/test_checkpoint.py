import json
from pathlib import Path

import pytest
from writing import files_of_at_most, umask

from dray.errors import ConfigError, OutputError
from dray.jobs.replica.checkpoint import (
    CheckpointState,
    check_checkpoint,
    find_checkpoint,
    record_committed,
    save_checkpoint,
    sweep_partial,
    trainer_folder,
)


def save(folder: Path, step: int) -> None:
    state = CheckpointState(step=step, weight_version=step, next_work_item=8 * step)
    save_checkpoint(folder, state, lambda trainer: (trainer / "weights").write_text(str(step)) and None)


def test_newest_checkpoint_is_found_with_its_trainer(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    assert find_checkpoint(folder) is None
    for step in (1, 2):
        save(folder, step)
        found = find_checkpoint(folder)
        assert found is not None
        assert found[1] == CheckpointState(step, step, 8 * step)
        assert (found[0] / "trainer" / "weights").read_text() == str(step)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = CheckpointState(
        3, 4, 24, contributed=24, committed=32, unconfirmed=("ab:1", "ab:2"), unfreed=("cd:7",), ranks=2,
        totals={"bytes": 100.0, "seconds": 2.5},
    )  # fmt: skip

    def save_both(trainer: Path) -> None:
        for rank in range(2):
            folder = trainer_folder(trainer.parent, rank)
            folder.mkdir(exist_ok=True)
            (folder / "rank").write_text(str(rank))

    save_checkpoint(tmp_path / "checkpoint", state, save_both)
    found = find_checkpoint(tmp_path / "checkpoint")
    assert found is not None
    assert found[1] == state
    assert [(trainer_folder(found[0], rank) / "rank").read_text() for rank in range(2)] == ["0", "1"]


def test_failed_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, 1)

    def fail(trainer: Path) -> None:
        (trainer / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(folder, CheckpointState(2, 2, 16), fail)
    found = find_checkpoint(folder)
    assert found is not None
    assert found[1].step == 1
    save(folder, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_crash_between_the_renames_leaves_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    folder.rename(tmp_path / ".checkpoint.previous")
    found = find_checkpoint(folder)
    assert found is not None
    assert found[1].step == 1
    save(folder, 2)
    found = find_checkpoint(folder)
    assert found is not None
    assert (found[1].step, [path.name for path in tmp_path.iterdir()]) == (2, ["checkpoint"])


def test_what_was_committed_is_recorded_once_however_often_the_job_is_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    state = CheckpointState(3, 3, 24, contributed=24, committed=16, unconfirmed=("ab:1",) * 8, unfreed=("cd:7",))
    save_checkpoint(folder, state, lambda _: None)
    for committed in (24, 24, 40):
        found = find_checkpoint(folder)
        assert found is not None
        new = record_committed(*found, committed)
        # What is unconfirmed no more is recognised if it is published again.
        assert (new.committed, new.unconfirmed, new.unfreed) == (committed, (), ("cd:7", *["ab:1"] * 8))
        assert find_checkpoint(folder) == (folder, new)
    assert [path.name for path in folder.iterdir()].count("state.json") == len(list(folder.iterdir())) - 1


def test_what_a_killed_save_has_left_is_swept_and_the_checkpoint_stays(tmp_path: Path) -> None:
    folder, partial, previous = (
        tmp_path / name for name in ("checkpoint", ".checkpoint.partial", ".checkpoint.previous")
    )
    (partial / "trainer").mkdir(parents=True)
    sweep_partial(folder)
    assert list(tmp_path.iterdir()) == []
    save(folder, 1)
    for left in (partial, previous):
        (left / "trainer").mkdir(parents=True)
    sweep_partial(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    # Killed between its two renames: what is called the previous one is the checkpoint.
    folder.rename(previous)
    sweep_partial(folder)
    found = find_checkpoint(folder)
    assert found is not None
    assert found[1].step == 1


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", json.dumps({"step": 1, "unknown": 2})),
        json.dumps({"step": 1, "weight_version": 1, "next_work_item": 8, "totals": {"bytes": "many"}}),
        json.dumps({"step": 1, "weight_version": 1, "next_work_item": 8, "totals": [1]}),
    ],
)
def test_damaged_state_is_a_config_error(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "state.json").write_text(text)
    with pytest.raises(ConfigError, match="--resume"):
        find_checkpoint(folder)


def test_checkpoint_is_made_without_rights_of_others_to_write_whatever_the_umask(tmp_path: Path) -> None:
    with umask(0):
        save_checkpoint(tmp_path / "checkpoint", CheckpointState(1, 1, 8), lambda _: None)
    assert [path for path in tmp_path.rglob("*") if path.stat().st_mode & 0o022] == []


def test_state_that_another_user_may_have_written_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    (folder / "state.json").chmod(0o664)
    with pytest.raises(ConfigError, match=r"state.json.* its mode is 664"):
        find_checkpoint(folder)
    (folder / "state.json").rename(tmp_path / "elsewhere")
    (folder / "state.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="it is a symbolic link"):
        find_checkpoint(folder)


def test_checkpoint_is_trusted_unless_others_may_write_what_its_trainer_saved(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    check_checkpoint(folder)
    (folder / "trainer" / "weights").chmod(0o646)
    with pytest.raises(ConfigError, match=r"trainer/weights.* its mode is 646"):
        check_checkpoint(folder)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not a symbolic link"):
        check_checkpoint(folder)


def test_checkpoint_for_which_there_is_no_space_leaves_the_previous_one_and_no_part_of_itself(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    with files_of_at_most(10), pytest.raises(OutputError, match="cannot be written: File too large"):
        save(folder, 2)
    found = find_checkpoint(folder)
    assert found is not None
    assert (found[1].step, [path.name for path in tmp_path.iterdir()]) == (1, ["checkpoint"])
