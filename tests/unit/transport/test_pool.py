import inspect

import pytest

from dray.transport import PayloadServer
from dray.transport.pool import IDLE_SECONDS, KEEPS, MAX_IDLE, ConnectionPool, Holder, Keeper, held

A, B = "tcp:a:1", "tcp:b:1"
FREE: frozenset[str] = frozenset()


@pytest.fixture
def pool() -> ConnectionPool[str, str]:
    return ConnectionPool()


def checkout(pool: ConnectionPool[str, str], endpoint: str, now: float, busy: frozenset[str] = FREE) -> str | None:
    """The connection that a call gets, if it closes first what is to be closed."""
    found = pool.at_hand(endpoint, now, alone=False)
    if found is None:
        pool.expire(endpoint, now)
        found = pool.checkout(endpoint, busy)
    return None if found is None else found.connection


def test_an_empty_pool_has_no_connection(pool: ConnectionPool[str, str]) -> None:
    assert pool.at_hand(A, 0.0, alone=True) is None
    assert pool.checkout(A, FREE) is None
    assert pool.connections() == set()


def test_the_connection_used_last_is_used_next(pool: ConnectionPool[str, str]) -> None:
    pool.checkin(A, "old", None, 0.0)
    pool.checkin(A, "new", None, 1.0)
    assert [checkout(pool, A, 2.0) for _ in range(3)] == ["new", "old", None]


def test_endpoints_do_not_share_connections(pool: ConnectionPool[str, str]) -> None:
    pool.checkin(A, "a", None, 0.0)
    assert checkout(pool, B, 0.0) is None
    assert checkout(pool, A, 0.0) == "a"


def test_one_connection_more_than_the_maximum_is_not_kept(pool: ConnectionPool[str, str]) -> None:
    assert [pool.checkin(A, f"c{n}", None, 0.0) for n in range(MAX_IDLE + 1)] == [True] * MAX_IDLE + [False]
    assert pool.connections() == {f"c{n}" for n in range(MAX_IDLE)}
    assert pool.checkin(B, "b", None, 0.0)


def test_a_connection_with_a_worker_is_at_hand_only_for_a_call_that_is_alone(
    pool: ConnectionPool[str, str],
) -> None:
    pool.checkin(A, "a", "worker", 0.0)
    pool.expire(A, 0.0)
    assert pool.at_hand(A, 1.0, alone=False) is None
    found = pool.at_hand(A, 1.0, alone=True)
    assert found is not None
    assert (found.connection, found.worker) == ("a", "worker")
    assert pool.at_hand(A, 1.0, alone=True) is None


def test_a_connection_idle_for_too_long_is_given_up(pool: ConnectionPool[str, str]) -> None:
    pool.checkin(A, "old", None, 0.0)
    pool.checkin(A, "new", None, 1.0)
    assert pool.at_hand(A, IDLE_SECONDS, alone=True) is None
    assert pool.expire(A, IDLE_SECONDS)
    assert pool.connections() == {"new"}
    assert checkout(pool, A, IDLE_SECONDS) == "new"
    pool.checkin(A, "new", None, IDLE_SECONDS)
    assert checkout(pool, A, 2 * IDLE_SECONDS) is None
    assert pool.connections() == set()


def test_a_client_replaces_before_the_server_evicts() -> None:
    evicts = inspect.signature(PayloadServer).parameters["idle_timeout"].default
    pool: ConnectionPool[str, str] = ConnectionPool()
    pool.checkin(A, "old", None, 0.0)
    assert checkout(pool, A, evicts - 1.0) is None


def test_a_connection_whose_worker_is_busy_stays_in_the_pool(pool: ConnectionPool[str, str]) -> None:
    pool.checkin(A, "on one", "one", 0.0)
    pool.checkin(A, "on two", "two", 0.0)
    assert checkout(pool, A, 1.0, frozenset({"one", "two"})) is None
    assert checkout(pool, A, 1.0, frozenset({"two"})) == "on one"
    assert checkout(pool, A, 1.0) == "on two"


def test_connections_are_given_up_at_endpoints_that_no_call_asks_for_any_more(
    pool: ConnectionPool[str, str],
) -> None:
    """Producers come and go: connections to those that are gone must not add up."""
    pool.expire(A, 0.0)
    pool.checkin(A, "a", None, 1.0)
    pool.checkin(B, "b", None, IDLE_SECONDS + 1)
    assert not pool.expire(B, IDLE_SECONDS - 1)
    assert pool.expire(B, IDLE_SECONDS + 1)
    assert pool.connections() == {"b"}


def test_drain_leaves_connections_whose_worker_is_busy(pool: ConnectionPool[str, str]) -> None:
    for worker in ("free", "busy"):
        pool.checkin(A, f"on {worker}", worker, 0.0)
    pool.checkin(B, "b", None, 0.0)
    assert sorted(pool.drain({"busy"})) == ["b", "on free"]
    assert pool.drain({"busy"}) == []
    assert pool.connections() == {"on busy"}
    assert pool.drain(FREE) == ["on busy"]


@pytest.mark.parametrize("keeper", list(Keeper))
@pytest.mark.parametrize("closing", [False, True])
def test_a_holder_keeps_its_connection_while_a_thread_is_inside_or_as_its_keeper_demands(
    keeper: Keeper, closing: bool
) -> None:
    holder: Holder[str, str] = Holder()
    holder.connection, holder.worker, holder.drained = "c", "w", (["d"], ["v"])
    holder.keeper = keeper
    assert holder.holds(closing) is KEEPS[keeper][closing]
    assert held([holder], closing) == (({"c", "d"}, {"w", "v"}) if KEEPS[keeper][closing] else (set(), set()))
    with holder.inside:
        assert held([holder], closing) == ({"c", "d"}, {"w", "v"})
    holder.clear()
    assert held([holder], closing) == (set(), set())
