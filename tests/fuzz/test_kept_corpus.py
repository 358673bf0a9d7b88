"""What the fuzzer has found holds from then on: the kept corpus runs through every target."""

import logging

import pytest
from fuzz.fuzzer import TARGETS, kept, load


@pytest.mark.parametrize("target", TARGETS)
def test_every_kept_input_is_taken_or_refused(target: str, caplog: pytest.LogCaptureFixture) -> None:
    run, _ = load(target)
    assert kept(target)
    caplog.set_level(logging.ERROR, "dray")  # a record of a warning would hold memory that was in use
    for file in kept(target):
        run(file.read_bytes())
