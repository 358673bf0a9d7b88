import inspect

import pytest

from dray.transport import PayloadServer
from dray.transport.pool import IDLE_SECONDS, MOST_IDLE, ConnectionPool

A, B = "tcp:a:1", "tcp:b:1"


def any_group(group: str) -> bool:
    return True


@pytest.fixture
def pool() -> ConnectionPool[str, str]:
    return ConnectionPool()


def test_an_empty_pool_says_open_one(pool: ConnectionPool[str, str]) -> None:
    found = pool.checkout(A, 0.0)
    assert (found.connection, found.group, found.expired) == (None, None, [])


def test_the_connection_used_last_is_used_next(pool: ConnectionPool[str, str]) -> None:
    pool.checkin(A, "old", None, 0.0)
    pool.checkin(A, "new", None, 1.0)
    assert pool.checkout(A, 2.0).connection == "new"
    assert pool.checkout(A, 2.0).connection == "old"
    assert pool.checkout(A, 2.0).connection is None


def test_endpoints_do_not_share_connections(pool: ConnectionPool[str, str]) -> None:
    pool.checkin(A, "a", None, 0.0)
    assert pool.checkout(B, 0.0).connection is None
    assert pool.checkout(A, 0.0).connection == "a"


def test_one_more_than_the_most_idle_comes_back_to_be_closed(pool: ConnectionPool[str, str]) -> None:
    assert [pool.checkin(A, f"c{n}", None, 0.0) for n in range(MOST_IDLE)] == [None] * MOST_IDLE
    assert pool.checkin(A, "surplus", None, 0.0) == "surplus"
    assert pool.count(A) == MOST_IDLE
    assert pool.checkin(B, "b", None, 0.0) is None


def test_a_connection_idle_for_too_long_is_replaced(pool: ConnectionPool[str, str]) -> None:
    pool.checkin(A, "old", None, 0.0)
    pool.checkin(A, "new", None, 1.0)
    found = pool.checkout(A, IDLE_SECONDS)
    assert (found.connection, found.expired) == ("new", [("old", None)])
    pool.checkin(A, "new", None, IDLE_SECONDS)
    found = pool.checkout(A, 2 * IDLE_SECONDS)
    assert (found.connection, found.expired) == (None, [("new", None)])
    assert pool.count(A) == 0


def test_a_client_replaces_before_the_server_evicts() -> None:
    evicts = inspect.signature(PayloadServer).parameters["idle_timeout"].default
    pool: ConnectionPool[str, str] = ConnectionPool()
    pool.checkin(A, "old", None, 0.0)
    assert pool.checkout(A, evicts - 1.0).connection is None


def test_a_group_is_busy_from_checkout_to_checkin(pool: ConnectionPool[str, str]) -> None:
    assert pool.checkout(A, 0.0, fits=any_group).group is None
    pool.add_group("g")
    assert pool.checkout(A, 0.0, fits=any_group).group is None
    pool.checkin(A, "a", "g", 0.0)
    found = pool.checkout(B, 0.0, fits=any_group)
    assert (found.connection, found.group) == (None, "g")
    assert pool.checkout(A, 0.0, fits=any_group).connection is None
    pool.discard("g")
    found = pool.checkout(A, 0.0, fits=any_group)
    assert (found.connection, found.group) == ("a", "g")


def test_a_group_that_is_wanted_by_nobody_stays_free(pool: ConnectionPool[str, str]) -> None:
    pool.add_group("g")
    pool.discard("g")
    assert pool.checkout(A, 0.0).group is None
    assert pool.checkout(A, 0.0, fits=any_group).group == "g"


def test_an_expired_connection_makes_its_group_busy_until_it_is_closed(pool: ConnectionPool[str, str]) -> None:
    pool.add_group("g")
    pool.checkin(A, "one", "g", 0.0)
    pool.checkin(A, "two", "g", 0.0)
    found = pool.checkout(A, IDLE_SECONDS, fits=any_group)
    assert (found.connection, found.group, found.expired) == (None, None, [("two", "g")])
    pool.discard("g")
    found = pool.checkout(A, IDLE_SECONDS, fits=any_group)
    assert found.expired == [("one", "g")]
    pool.discard("g")
    assert pool.checkout(A, IDLE_SECONDS, fits=any_group).group == "g"


def test_a_surplus_connection_keeps_its_group_busy_until_it_is_discarded() -> None:
    pool: ConnectionPool[str, str] = ConnectionPool(most_idle=0)
    pool.add_group("g")
    assert pool.checkin(A, "a", "g", 0.0) == "a"
    assert pool.checkout(A, 0.0, fits=any_group).group is None
    pool.discard("g")
    assert pool.checkout(A, 0.0, fits=any_group).group == "g"


def test_what_drain_leaves_can_be_seen(pool: ConnectionPool[str, str]) -> None:
    pool.add_group("g")
    pool.checkin(A, "left", "g", 0.0)
    pool.checkin(B, "given", None, 0.0)
    assert pool.checkout(B + "0", 0.0, any_group).group == "g"
    assert pool.drain() == (["given"], [])
    assert pool.withheld() == ["left"]
    pool.discard("g")
    assert pool.drain() == (["left"], ["g"])
    assert pool.withheld() == []


def test_drain_gives_out_what_no_thread_uses_and_the_rest_later(pool: ConnectionPool[str, str]) -> None:
    for group in ("free", "busy"):
        pool.add_group(group)
        pool.checkin(A, f"on {group}", group, 0.0)
    pool.checkin(B, "b", None, 0.0)
    assert pool.checkout(A, 1.0, fits=any_group).connection == "on busy"
    connections, groups = pool.drain()
    assert (sorted(connections), groups) == (["b", "on free"], ["free"])
    assert pool.drain() == ([], [])
    pool.discard("busy")
    assert pool.drain() == ([], ["busy"])
    assert (pool.count(A), pool.count(B)) == (0, 0)


def test_only_a_group_that_fits_is_taken(pool: ConnectionPool[str, str]) -> None:
    for group in ("loopback", "network"):
        pool.add_group(group)
        pool.discard(group)
    assert pool.checkout(A, 0.0, lambda group: group == "network").group == "network"
    assert pool.checkout(A, 0.0, lambda group: group == "network").group is None
    assert pool.checkout(A, 0.0, lambda group: group == "loopback").group == "loopback"


def test_connections_to_an_endpoint_that_nobody_asks_for_any_more_are_closed(
    pool: ConnectionPool[str, str],
) -> None:
    """Producers come and go: what leads to those that are gone must not add up."""
    pool.add_group("g")
    pool.checkin(A, "a", None, 0.0)
    pool.checkin(A, "on g", "g", 1.0)
    pool.checkin(B, "b", None, IDLE_SECONDS)
    found = pool.checkout(B, IDLE_SECONDS + 1)
    assert found.connection == "b"
    assert found.expired == [("a", None), ("on g", "g")]
    assert pool.count(A) == 0
    assert pool.checkout(B, IDLE_SECONDS + 1, fits=any_group).group is None
    pool.discard("g")
    assert pool.checkout(B, IDLE_SECONDS + 1, fits=any_group).group == "g"


def test_a_group_is_given_back_with_the_last_of_its_closed_connections(pool: ConnectionPool[str, str]) -> None:
    pool.add_group("g")
    for endpoint in (A, B):
        pool.checkin(endpoint, f"to {endpoint}", "g", 0.0)
    assert pool.checkout("tcp:c:1", IDLE_SECONDS).expired == [(f"to {B}", None), (f"to {A}", "g")]


def test_connections_in_the_group_of_the_checkout_are_closed_with_it(pool: ConnectionPool[str, str]) -> None:
    """A thread that always uses the same group would never find it free."""
    pool.add_group("g")
    pool.checkin(A, "a", "g", 0.0)
    pool.checkin(B, "b", "g", IDLE_SECONDS)
    found = pool.checkout(B, IDLE_SECONDS + 1)
    assert (found.connection, found.group, found.expired) == ("b", "g", [("a", None)])


def test_connections_in_a_group_that_another_thread_uses_are_left_alone(pool: ConnectionPool[str, str]) -> None:
    pool.add_group("g")
    pool.checkin(A, "a", "g", 0.0)
    pool.checkin(B, "b", "g", 0.0)
    assert pool.checkout(B, 1.0).connection == "b"
    assert pool.checkout("tcp:c:1", IDLE_SECONDS + 2).expired == []
    assert pool.count(A) == 1
