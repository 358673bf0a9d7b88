import contextlib

import pytest

from dray.jobs.process import closed_by_step, shutdown_step


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

    @contextlib.contextmanager
    def server():
        yield 5
        seen.append(len(caplog.messages))

    with closed_by_step(server(), "close", "the server", 1.0) as entered:
        assert entered == 5
        assert caplog.messages == []
    assert seen == [1]
    assert len(caplog.messages) == 2


def test_what_is_closed_by_a_step_gets_the_exception_of_the_block_and_no_step_if_it_does_not_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "dray.jobs.process")

    @contextlib.contextmanager
    def server(fault: str):
        if fault == "opening":
            raise LookupError(fault)
        try:
            yield
        except ValueError:
            raise LookupError("instead") from None

    with pytest.raises(LookupError, match="opening"), closed_by_step(server("opening"), "close", "it", 1.0):
        pass
    assert caplog.messages == []
    with pytest.raises(LookupError, match="instead"), closed_by_step(server(""), "close", "it", 1.0):
        raise ValueError
    assert len(caplog.messages) == 2
