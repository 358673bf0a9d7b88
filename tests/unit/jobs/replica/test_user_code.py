import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dray.errors import PayloadFormatError
from dray.jobs.exit_codes import ExitCode
from dray.jobs.messages.channel import GroupLostError
from dray.jobs.replica.user_code import (
    MAX_REASON,
    UserCodeError,
    UserValueError,
    call_user,
    carried,
    make_user_object,
    returned_arrays,
    returned_metrics,
)


def user(act: Callable[[], object]) -> object:
    """An object whose method `act` does this."""
    return type("Worker", (), {"act": lambda self: act()})()


def raising(error: BaseException) -> Callable[[], object]:
    def act() -> object:
        raise error

    return act


def test_call_gives_what_the_method_returns() -> None:
    assert call_user(user(lambda: 3), "act") == 3
    assert call_user([], "append", 3) is None
    assert make_user_object(list) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("the environment broke"), "ValueError: the environment broke (test_user_code.py:"),
        (KeyError("env"), "KeyError: 'env' (test_user_code.py:"),
        (AssertionError(), "AssertionError (test_user_code.py:"),
        (SystemExit(3), "SystemExit: 3 (test_user_code.py:"),
        (KeyboardInterrupt(), "KeyboardInterrupt (test_user_code.py:"),
        (MemoryError(), "MemoryError (test_user_code.py:"),
        (ExceptionGroup("two", [ValueError("a")]), "ExceptionGroup: two (1 sub-exception) (test_user_code.py:"),
        (ValueError("red \x1b[31m\nforged"), "ValueError: red \\x1b[31m forged (test_user_code.py:"),
    ],
)
def test_what_a_call_raises_is_one_line_with_type_text_and_place(error: BaseException, words: str) -> None:
    with pytest.raises(UserCodeError) as caught:
        call_user(user(raising(error)), "act")
    assert str(caught.value).startswith(f"Worker.act() raised {words}")
    assert str(caught.value).endswith(" in act)")
    assert caught.value.exit_code is ExitCode.USER_CODE
    assert caught.value.__cause__ is error


def test_line_about_an_exception_is_bounded_and_keeps_its_place() -> None:
    with pytest.raises(UserCodeError) as caught:
        call_user(user(raising(ValueError("x" * 10_000_000))), "act")
    assert len(str(caught.value)) <= MAX_REASON
    assert "…" in str(caught.value)
    assert str(caught.value).endswith(" in act)")


def test_exception_whose_text_cannot_be_had_is_named_by_its_type() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    with pytest.raises(UserCodeError, match=r"raised Silent: \(its text cannot be shown\)"):
        call_user(user(raising(Silent())), "act")


def test_wait_for_another_rank_that_is_gone_is_not_the_users_mistake() -> None:
    with pytest.raises(GroupLostError):
        call_user(user(raising(GroupLostError("policy-0 is gone"))), "act")


def test_constructor_and_missing_method_are_named() -> None:
    class Trainer:
        def __init__(self) -> None:
            raise ValueError("no GPU")

    with pytest.raises(UserCodeError, match=r"^Trainer\(\) raised ValueError: no GPU \(test_user_code.py:"):
        make_user_object(Trainer)
    with pytest.raises(UserCodeError, match=r"^list.act\(\) raised AttributeError"):
        call_user([], "act")


def test_code_that_has_not_run_is_a_mistake_and_leaves_no_warning() -> None:
    async def later() -> None: ...

    def yielding() -> Iterator[int]:
        yield 1

    for act, words in ((later, "a coroutine"), (yielding, "a generator")):
        with pytest.raises(UserValueError, match=f"returned {words}: it must not be async, nor use yield"):
            call_user(user(act), "act")


class Broken(Mapping[str, Any]):
    """A mapping that cannot be read."""

    def __getitem__(self, name: str) -> Any:
        raise RuntimeError("not there")

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


def test_mapping_that_cannot_be_read_is_the_users_mistake() -> None:
    for returned in (returned_arrays, returned_metrics):
        with pytest.raises(
            UserCodeError, match=r"the mapping that object\.act\(\).* raised RuntimeError: not there"
        ):
            returned(object(), "act", Broken())


def test_any_mapping_of_arrays_is_taken() -> None:
    class Arrays(dict[str, Any]): ...

    assert returned_arrays(object(), "act", Arrays(x=np.ones(2))).keys() == {"x"}


def test_only_what_cannot_be_carried_is_the_users_mistake() -> None:
    with pytest.raises(
        UserValueError, match=r"object\.act\(\) returned what cannot be carried: field 'x'"
    ) as caught:
        with carried(object(), "act"):
            raise PayloadFormatError("field 'x' is None")
    assert caught.value.exit_code is ExitCode.USER_VALUE
    with pytest.raises(OSError, match="disk"):
        with carried(object(), "act"):
            raise OSError("disk")


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.array(2), 2.0),
        (np.array([[3.0]]), 3.0),
        (np.array([1.5], ml_dtypes.bfloat16), 1.5),
        (math.inf, math.inf),
    ],
)
def test_metric_is_any_one_number(value: object, number: float) -> None:
    assert returned_metrics(object(), "act", {"x": value}) == {"x": number}


def test_metrics_may_be_none_at_all_and_nan() -> None:
    assert returned_metrics(object(), "act", {}) == {}
    assert math.isnan(returned_metrics(object(), "act", {"x": math.nan})["x"])


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (None, "returned None: it must return a mapping of metric names to numbers"),
        ([1.0], "returned a list: it must return a mapping of metric names to numbers"),
        ({"loss": "3.5"}, "metric 'loss' as '3.5': it must be one number"),
        ({"loss": None}, "metric 'loss' as None"),
        ({"loss": 1j}, "metric 'loss' as 1j"),
        ({"loss": {"a": 1.0}}, "metric 'loss' as {'a': 1.0}"),
        ({"loss": np.ones((2, 3))}, "metric 'loss' as an array of shape (2, 3)"),
        ({"loss": np.ones(0)}, "metric 'loss' as an array of shape (0,)"),
        ({"loss": 10**400}, "metric 'loss' as 1000"),
        ({3: 1.0}, "the metric name 3: names are text"),
        ({"ok": 1.0, "x" * 1000: "no"}, "returned metric 'xxx"),
    ],
)
def test_metrics_that_cannot_be_used_are_named(metrics: object, words: str) -> None:
    with pytest.raises(UserValueError) as caught:
        returned_metrics(object(), "act", metrics)
    assert words in str(caught.value)
    assert len(str(caught.value)) <= MAX_REASON
