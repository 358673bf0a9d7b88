"""The example of streams, as its page starts it: `play.py` and `train.py`, which meet by name."""

import os
import secrets
import subprocess
import sys

import pytest
from example_runs import EXAMPLES

BOUND = 100.0


def run(*options: str, rollouts: int = 1) -> str:
    """What `train.py` prints; it and the rollouts have ended by themselves."""
    environment = {**os.environ, "DRAY_SCOPE": f"test-{secrets.token_hex(4)}"}

    def command(name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(EXAMPLES / "streams" / name), *arguments]

    players = [
        subprocess.Popen(command("play.py", "--seed", str(number)), env=environment) for number in range(rollouts)
    ]
    try:
        trained = subprocess.run(
            command("train.py", *options), env=environment, capture_output=True, text=True, timeout=BOUND
        )
        assert trained.returncode == 0, trained.stderr
        assert [player.wait(BOUND) for player in players] == [0] * rollouts
    finally:
        for player in players:
            player.kill()
            player.wait()
    return trained.stdout


def test_rollouts_and_trainer_find_each_other_learn_and_end() -> None:
    printed = run("--solved", "40", rollouts=2).splitlines()
    assert printed[-1] == "solved"
    assert "mean return" in printed[-2]


@pytest.mark.endurance
@pytest.mark.timeout(BOUND * 6)
def test_the_example_is_solved_with_other_seeds() -> None:
    for seed in ("2", "3"):
        assert run("--seed", seed).splitlines()[-1] == "solved"
