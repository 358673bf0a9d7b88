from collections.abc import Sequence

import pytest

from dray.clock import Deadline
from dray.errors import (
    ConfigError,
    ConnectionClosed,
    ConnectionReset,
    MessageTruncated,
    ProducerLostError,
    ServerBusy,
    TransportError,
    TransportTimeout,
    Unreachable,
)
from dray.transport import lanes
from dray.transport.attempts import (
    MAX_QUARANTINE_GROWTH,
    MAX_REMEMBERED,
    MIN_ATTEMPT_SECONDS,
    QUARANTINE_SECONDS,
    UNKNOWN_ATTEMPT_SECONDS,
    Attempts,
    Latencies,
    OtherProducerError,
    Quarantine,
    by_lane,
    heirs_by_lane,
)
from dray.transport.lanes import Lane

TCP = ["tcp:h:1", "tcp:h:2", "tcp:h:3"]
SHM = ["unix:/a", "unix:/b"]
REFUSED = Unreachable("refused", refused=True)
ELSEWHERE = Unreachable("no such path", elsewhere=True)
FAILED = ConnectionReset("reset")


class SteppedClock:
    """Time that a test sets."""

    def __init__(self, now: float = 0.0) -> None:
        self.time = now

    def now(self) -> float:
        return self.time


def attempts(
    endpoints: list[str],
    quarantine: Quarantine | None = None,
    *,
    heirs: Sequence[str] = (),
    lanes: Sequence[Lane] = (lanes.SHM, lanes.UCX, lanes.TCP),
    rotation: int = 0,
    most: int = 2,
    latencies: Latencies | None = None,
    seconds: float | None = None,
) -> Attempts:
    return Attempts(
        b"p" * 16,
        by_lane(tuple(endpoints), tuple(lanes)),
        Deadline.after(seconds, SteppedClock()),
        heirs=heirs_by_lane(tuple(heirs), tuple(lanes)),
        quarantine=quarantine or Quarantine(),
        latencies=latencies or Latencies(),
        rotation=rotation,
        attempts=most,
    )


def test_endpoints_that_cannot_be_parsed_do_not_spoil_the_others() -> None:
    endpoints = ("rdma:h:1", "tcp:h:0", "unix:\ud800", "tcp:h:1", "")
    assert by_lane(endpoints, (lanes.SHM, lanes.UCX, lanes.TCP)) == (("tcp:h:1",),)


def test_a_reference_without_an_endpoint_that_can_be_used_names_those_that_cannot() -> None:
    with pytest.raises(ConfigError) as caught:
        by_lane(("rdma:h:1", "tcp:h:0", "unix:/a"), (lanes.TCP,))
    assert [mistake.value for mistake in caught.value.mistakes] == ["rdma:h:1", "tcp:h:0"]
    assert by_lane(("unix:/a",), (lanes.TCP,)) == ()


def test_a_lane_that_cannot_be_used_is_left_for_the_others_and_kept_where_it_is_alone() -> None:
    several = attempts(["ucx:h:1", "ucx:h:2", *TCP])
    assert several.choose(0.0) == "ucx:h:1"
    unusable = Unreachable("UCX cannot be used on this machine", lane_unusable=True)
    assert several.fail("ucx:h:1", unusable, 0.0).final is None
    assert several.choose(0.0) in TCP
    assert not several.last
    alone = attempts(["ucx:h:1", "ucx:h:2"])
    assert alone.fail("ucx:h:1", unusable, 0.0).final is None
    assert alone.choose(0.0) == "ucx:h:2"
    assert alone.fail("ucx:h:2", unusable, 0.0).final is unusable


@pytest.mark.parametrize("first", ["unix:/a", "ucx:h:1"])
def test_producer_whose_usable_endpoints_are_all_refused_is_lost_in_whichever_order_that_shows(first: str) -> None:
    errors = {
        "unix:/a": Unreachable("refused", refused=True),
        "ucx:h:1": Unreachable("UCX cannot be used on this machine", lane_unusable=True),
    }
    second = next(each for each in errors if each != first)
    tried = attempts(["unix:/a", "ucx:h:1"])
    assert tried.fail(first, errors[first], 0.0).final is None
    assert isinstance(tried.fail(second, errors[second], 0.0).final, ProducerLostError)


# --- heirs -------------------------------------------------------------------------------------------------------


def test_heirs_are_no_endpoints_of_the_producer() -> None:
    endpoints = ("unix:/a", "heir+unix:/h", "heir+tcp:h:9", "heir+rdma:h:1")
    assert by_lane(endpoints, (lanes.SHM, lanes.TCP)) == (("unix:/a",),)
    assert heirs_by_lane(endpoints, (lanes.SHM, lanes.TCP)) == (("unix:/h",), ("tcp:h:9",))
    assert heirs_by_lane(endpoints, (lanes.TCP,)) == (("tcp:h:9",),)
    assert heirs_by_lane(("unix:/a", "heir+rdma:h:1"), (lanes.SHM,)) == ()


def test_heir_is_asked_once_the_producer_would_be_lost() -> None:
    tried = attempts(SHM, heirs=["heir+unix:/h"])
    assert tried.fail("unix:/a", REFUSED, 0.0).following == "unix:/b"
    assert tried.fail("unix:/b", REFUSED, 0.0).following == "unix:/h"
    assert isinstance(tried.fail("unix:/h", REFUSED, 0.0).final, ProducerLostError)


def test_heir_is_asked_after_connections_that_broke_and_gets_an_attempt_of_its_own() -> None:
    tried = attempts(SHM, heirs=["heir+unix:/h"])
    assert tried.fail("unix:/a", FAILED, 0.0).following == "unix:/b"
    assert tried.fail("unix:/b", ConnectionClosed("closed"), 0.0).following == "unix:/h"
    assert tried.fail("unix:/h", FAILED, 0.0).final is FAILED


def test_heir_is_not_asked_while_the_producer_is_only_slow() -> None:
    slow = TransportTimeout("no answer")
    tried = attempts(SHM, heirs=["heir+unix:/h"])
    assert tried.fail("unix:/a", slow, 0.0).following == "unix:/b"
    assert tried.fail("unix:/b", slow, 0.0).final is slow


def test_quarantine_ends_after_its_time() -> None:
    quarantine = Quarantine(30.0)
    quarantine.fail("a", 100.0)
    assert not quarantine.healthy("a", 129.9)
    assert quarantine.healthy("b", 100.0)
    assert quarantine.healthy("a", 130.0)
    assert quarantine.healthy("a", 100.0)


def test_a_new_failure_starts_the_time_again() -> None:
    quarantine = Quarantine(30.0)
    quarantine.fail("a", 0.0)
    quarantine.fail("a", 20.0)
    assert not quarantine.healthy("a", 40.0)
    assert quarantine.healthy("a", 50.0)


def test_quarantine_of_an_endpoint_that_fails_again_doubles_up_to_a_bound() -> None:
    quarantine = Quarantine(30.0)
    now, terms = 0.0, []
    for _ in range(7):
        terms.append(quarantine.fail("a", now))
        now += terms[-1]
        assert not quarantine.healthy("a", now - 0.1)
        assert quarantine.healthy("a", now)
    assert terms == [30.0, 60.0, 120.0, 240.0, 480.0, 480.0, 480.0]
    assert terms[-1] == MAX_QUARANTINE_GROWTH * 30.0
    assert quarantine.fail("b", now) == 30.0


def test_several_failures_in_one_quarantine_do_not_lengthen_the_next() -> None:
    quarantine = Quarantine(30.0)
    for now in (0.0, 0.1, 29.0):
        assert quarantine.fail("a", now) == 30.0
    assert quarantine.fail("a", 60.0) == 60.0


def test_answer_ends_a_quarantine_and_the_next_is_short_again() -> None:
    quarantine = Quarantine(30.0)
    for now in (0.0, 30.0, 90.0):
        quarantine.fail("a", now)
    quarantine.skip("b", 90.0)
    for endpoint in "ab":
        quarantine.clear(endpoint)
    assert quarantine.healthy("a", 91.0)
    assert not quarantine.healthy("b", 91.0)
    assert quarantine.endpoints(91.0) == ()
    assert quarantine.fail("a", 92.0) == 30.0


def test_what_a_client_remembers_of_failed_endpoints_is_bounded() -> None:
    quarantine = Quarantine(30.0)
    for number in range(MAX_REMEMBERED + 10):
        quarantine.fail(f"tcp:h:{number}", 0.0)
        quarantine.skip(f"unix:/{number}", 0.0)
    assert len(quarantine.endpoints(1.0)) <= MAX_REMEMBERED
    assert quarantine.healthy("tcp:h:0", 1.0)
    assert not quarantine.healthy(f"tcp:h:{MAX_REMEMBERED + 9}", 1.0)


def test_bound_of_an_attempt_follows_the_slowest_of_the_last_answers_of_its_lane() -> None:
    latencies = Latencies()
    assert latencies.bound(lanes.TCP) == UNKNOWN_ATTEMPT_SECONDS
    latencies.add(lanes.TCP, 0.001)
    assert latencies.bound(lanes.TCP) == MIN_ATTEMPT_SECONDS
    assert latencies.bound(lanes.UCX) == UNKNOWN_ATTEMPT_SECONDS
    latencies.add(lanes.TCP, 2.0)
    slow = latencies.bound(lanes.TCP)
    assert slow > 10.0
    bounds = []
    for _ in range(100):
        latencies.add(lanes.TCP, 0.001)
        bounds.append(latencies.bound(lanes.TCP))
    assert bounds[0] > 0.8 * slow
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == MIN_ATTEMPT_SECONDS


def test_only_a_healthy_endpoint_that_was_not_tried_is_another_one() -> None:
    assert not attempts(TCP[:1]).has_other(TCP[0], 0.0)
    assert attempts([SHM[0], TCP[0]]).has_other(SHM[0], 0.0)
    quarantine = Quarantine()
    plan = attempts(TCP, quarantine)
    assert plan.has_other(TCP[0], 0.0)
    quarantine.fail(TCP[1], 0.0)
    assert plan.has_other(TCP[0], 1.0)
    plan.fail(TCP[2], ServerBusy("busy"), 1.0)
    assert not plan.has_other(TCP[0], 1.0)
    assert plan.has_other(TCP[0], 31.0)


def test_the_list_holds_what_is_in_quarantine_now() -> None:
    quarantine = Quarantine(10.0)
    quarantine.fail("a", 0.0)
    quarantine.fail("b", 5.0)
    assert sorted(quarantine.endpoints(9.0)) == ["a", "b"]
    assert quarantine.endpoints(12.0) == ("b",)


def test_what_is_not_on_this_host_is_skipped_and_not_in_quarantine() -> None:
    quarantine = Quarantine(30.0)
    read = attempts([*SHM, TCP[0]], quarantine, most=1)
    for _ in SHM:
        endpoint = read.choose(0.0)
        assert endpoint in SHM
        assert read.fail(endpoint, ELSEWHERE, 0.0).final is None
    assert read.choose(0.0) == TCP[0]
    assert quarantine.endpoints(1.0) == ()
    assert attempts([*SHM, TCP[0]], quarantine).choose(29.9) == TCP[0]
    assert attempts([*SHM, TCP[0]], quarantine).choose(30.0) in SHM


def test_a_producer_none_of_whose_endpoints_is_on_this_host_is_lost() -> None:
    read = attempts(SHM)
    assert read.fail(read.choose(0.0), ELSEWHERE, 0.0).final is None
    assert isinstance(read.fail(read.choose(0.0), ELSEWHERE, 0.0).final, ProducerLostError)


def test_choosing_changes_nothing() -> None:
    read = attempts([*SHM, *TCP], rotation=1)
    assert [read.choose(0.0) for _ in range(3)] == [SHM[1]] * 3
    read.fail(SHM[1], FAILED, 0.0)
    assert [read.choose(0.0) for _ in range(3)] == [SHM[0]] * 3


def test_reads_rotate_over_the_endpoints_of_a_lane() -> None:
    chosen = [attempts(TCP, rotation=n).choose(0.0) for n in range(6)]
    assert set(chosen[:3]) == set(TCP)
    assert chosen[:3] == chosen[3:]


def test_the_best_lane_goes_first_and_lanes_not_allowed_are_not_tried() -> None:
    for rotation in range(4):
        assert attempts([*TCP, *SHM], rotation=rotation).choose(0.0) in SHM
        assert attempts([*TCP, *SHM], lanes=(lanes.TCP,), rotation=rotation).choose(0.0) in TCP


def test_a_quarantined_endpoint_is_skipped_and_the_next_lane_taken() -> None:
    quarantine = Quarantine()
    quarantine.fail(SHM[0], 0.0)
    for rotation in range(3):
        assert attempts([*SHM, *TCP], quarantine, rotation=rotation).choose(1.0) == SHM[1]
    quarantine.fail(SHM[1], 0.0)
    assert attempts([*SHM, *TCP], quarantine).choose(1.0) in TCP


def test_endpoints_are_tried_all_the_same_when_all_are_in_quarantine() -> None:
    quarantine = Quarantine()
    for endpoint in TCP:
        quarantine.fail(endpoint, 0.0)
    chosen = {attempts(TCP, quarantine, rotation=rotation).choose(1.0) for rotation in range(3)}
    assert chosen == set(TCP)


def test_a_single_endpoint_is_tried_twice() -> None:
    plan = attempts(TCP[:1])
    assert plan.choose(0.0) == TCP[0]
    assert plan.fail(TCP[0], FAILED, 0.0).final is None
    assert plan.choose(1.0) == TCP[0]
    assert plan.last
    assert plan.fail(TCP[0], FAILED, 1.0).final is FAILED


def test_the_second_attempt_takes_another_endpoint_and_quarantines_it_as_well() -> None:
    quarantine = Quarantine()
    plan = attempts(TCP, quarantine)
    assert not plan.last
    first = plan.choose(0.0)
    assert plan.fail(first, FAILED, 0.0).final is None
    assert plan.last
    second = plan.choose(0.0)
    assert second != first
    last = TransportTimeout("late")
    assert plan.fail(second, last, 1.0).final is last
    assert sorted(quarantine.endpoints(1.0)) == sorted([first, second])


@pytest.mark.parametrize(
    "error",
    [
        ConnectionReset("x"),
        ConnectionClosed("x"),
        TransportTimeout("x"),
        MessageTruncated("x"),
        Unreachable("x"),
        TransportError("x"),
    ],
)
def test_each_transport_failure_uses_an_attempt_and_quarantines(error: TransportError) -> None:
    quarantine = Quarantine()
    plan = attempts(TCP, quarantine)
    assert plan.fail(TCP[0], error, 0.0).final is None
    assert quarantine.endpoints(0.0) == (TCP[0],)
    assert plan.last


def test_a_busy_server_is_tried_again_but_is_healthy() -> None:
    quarantine = Quarantine()
    plan = attempts(TCP[:1], quarantine)
    busy = ServerBusy("busy")
    assert plan.fail(TCP[0], busy, 0.0).final is None
    assert quarantine.endpoints(0.0) == ()
    assert plan.fail(TCP[0], busy, 0.0).final is busy


@pytest.mark.parametrize("absent", [REFUSED, OtherProducerError("other")])
def test_an_absent_endpoint_uses_no_attempt(absent: TransportError) -> None:
    plan = attempts([*SHM, *TCP])
    for endpoint in (*SHM, *TCP[:2]):
        assert plan.choose(0.0) != TCP[2]
        assert plan.fail(endpoint, absent, 0.0).final is None
        assert not plan.last
    assert plan.choose(0.0) == TCP[2]


@pytest.mark.parametrize("absent", [REFUSED, OtherProducerError("other")])
def test_the_producer_is_lost_when_every_endpoint_is_absent(absent: TransportError) -> None:
    plan = attempts(TCP)
    assert plan.fail(TCP[0], absent, 0.0).final is None
    assert plan.fail(TCP[1], REFUSED, 0.0).final is None
    lost = plan.fail(TCP[2], absent, 0.0).final
    assert isinstance(lost, ProducerLostError)
    assert all(endpoint in str(lost) for endpoint in TCP)
    assert not lost.retryable


def test_a_timeout_alone_is_never_lost() -> None:
    plan = attempts(TCP[:2])
    assert plan.fail(TCP[0], REFUSED, 0.0).final is None
    assert plan.choose(0.0) == TCP[1]
    late = TransportTimeout("late")
    assert plan.fail(TCP[1], late, 0.0).final is None
    assert plan.choose(0.0) == TCP[1]
    assert plan.fail(TCP[1], late, 0.0).final is late


def test_an_endpoint_named_twice_counts_once() -> None:
    plan = attempts([TCP[0], TCP[0]])
    assert isinstance(plan.fail(plan.choose(0.0), REFUSED, 0.0).final, ProducerLostError)


def test_an_endpoint_that_recovers_while_it_is_in_quarantine_can_still_lose_its_producer() -> None:
    """Quarantined, then refused: what counts is the answer of this read."""
    quarantine = Quarantine()
    quarantine.fail(TCP[0], 0.0)
    plan = attempts(TCP[:1], quarantine)
    assert isinstance(plan.fail(plan.choose(1.0), REFUSED, 1.0).final, ProducerLostError)


def test_the_last_attempt_gets_all_the_time_and_others_half_of_it_or_what_latencies_allow() -> None:
    latencies = Latencies()
    plan = attempts(TCP[:1], latencies=latencies, seconds=40.0)
    plan.begin(0.0)
    assert (plan.endpoint, plan.under_way, plan.status_deadline.at) == (TCP[0], True, 20.0)
    assert plan.fail(plan.endpoint, FAILED, 20.0).following == TCP[0]
    assert not plan.under_way
    plan.begin(20.0)
    assert plan.status_deadline.at == 40.0
    several = attempts(TCP, latencies=latencies, seconds=40.0)
    several.begin(0.0)
    assert several.status_deadline.at == UNKNOWN_ATTEMPT_SECONDS
    several.succeed(lanes.TCP, 0.001)
    several = attempts(TCP, latencies=latencies, seconds=40.0)
    several.begin(0.0)
    assert several.status_deadline.at == MIN_ATTEMPT_SECONDS


def test_no_attempt_begins_or_follows_after_the_deadline() -> None:
    plan = attempts(TCP, seconds=10.0)
    plan.begin(0.0)
    assert plan.fail(plan.endpoint, FAILED, 10.0) == (FAILED, None, QUARANTINE_SECONDS)
    late = attempts(TCP, seconds=10.0)
    with pytest.raises(TransportTimeout):
        late.begin(10.0)


def test_an_attempt_that_was_made_the_last_one_is_followed_by_none() -> None:
    plan = attempts(TCP)
    plan.begin(0.0)
    plan.end()
    assert plan.last
    assert plan.fail(plan.endpoint, FAILED, 0.0).final is FAILED
