"""The error tree: what callers catch."""

import pickle

import pytest

from dray.errors import (
    ControlPlaneError,
    DrayError,
    MissingDependencyError,
    OutputError,
    ProtocolError,
    Unreachable,
)
from dray.text import MAX_LINE


@pytest.mark.parametrize("caught", [MissingDependencyError, DrayError, ImportError, RuntimeError])
@pytest.mark.parametrize("reason", [None, "a library is missing"])
def test_a_missing_package_is_what_callers_catch_and_survives_pickling(
    caught: type[Exception], reason: str | None
) -> None:
    error = MissingDependencyError("ucxx", "the ucx lane", "'dray-rl[ucxx]'", reason)
    with pytest.raises(
        caught, match=r"the ucx lane needs the package ucxx, .*: pip install 'dray-rl\[ucxx\]'$"
    ) as found:
        raise pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (str(found.value), vars(found.value)) == (str(error), vars(error))
    assert found.value.name == "ucxx"
    assert (reason or "is not installed") in str(error)


def test_an_address_that_is_not_on_this_host_refuses_connections() -> None:
    assert (Unreachable("x").refused, Unreachable("x").elsewhere) == (False, False)
    assert (Unreachable("x", refused=True).refused, Unreachable("x", refused=True).elsewhere) == (True, False)
    assert (Unreachable("x", elsewhere=True).refused, Unreachable("x", elsewhere=True).elsewhere) == (True, True)


def test_an_output_that_cannot_be_written_is_an_os_error_and_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(OutputError("out/summary.json", "No space left on device")))  # noqa: S301
    assert isinstance(error, OSError)
    assert isinstance(error, DrayError)
    assert str(error) == "out/summary.json cannot be written: No space left on device"
    assert (error.filename, error.strerror) == ("out/summary.json", "No space left on device")


def test_text_of_a_peer_in_an_error_is_one_printable_line() -> None:
    error = ControlPlaneError("the controller answered:\n\x1b[2J\ud800 forged", endpoint="tcp:127.0.0.1:1")
    assert str(error) == "the controller answered: \\x1b[2J\\ud800 forged (endpoint tcp:127.0.0.1:1)"
    assert len(str(ProtocolError("x" * 100_000))) == MAX_LINE
