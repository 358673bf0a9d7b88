import contextlib

import pytest

from dray.jobs.process import ShutdownStep, closed_by_step, shutdown_step


def test_step_reports_what_it_does_and_waits_for_and_how_long_it_took(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dray.jobs.process")
    with pytest.raises(ValueError, match="half-way"):
        with shutdown_step("unregister", "the controller", 2.0):
            raise ValueError("half-way")
    assert caplog.messages[0] == "shutdown: unregister, waiting for the controller, at most 2.0 s"
    assert caplog.messages[1].startswith("shutdown: unregister took 0.0")


def test_what_is_closed_by_a_step_is_closed_within_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dray.jobs.process")
    seen: list[int] = []
    step = ShutdownStep("close", "the server", 1.0)
    with contextlib.ExitStack() as stack:

        @contextlib.contextmanager
        def server():
            yield 5
            seen.append(len(caplog.messages))

        assert closed_by_step(stack, server(), step) == 5
        assert caplog.messages == []
    assert seen == [1]
    assert len(caplog.messages) == 2
