"""The tensor transport for Ray Direct Transport, in real clusters: what docs/how-to/ray.md promises."""

import json
from collections.abc import Iterator

import pytest
from optional import require

require("ray", "torch")

from ray_cluster import Cluster  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

KIB, MIB = 1 << 10, 1 << 20
DISTRIBUTION = [
    (7000, KIB, 16 * KIB),
    (2500, 16 * KIB, 256 * KIB),
    (440, MIB, MIB),
    (50, 8 * MIB, 8 * MIB),
    (10, 64 * MIB, 64 * MIB),
]
"""Tensors: how many, of which sizes in bytes; together 1.9 GiB."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """With the transport in every worker, as the page recommends."""
    started = Cluster()
    yield started
    started.close()


@pytest.fixture(scope="session")
def hasty_cluster() -> Iterator[Cluster]:
    """Without the hook, with little room, and with an abort by Ray after 3 s."""
    started = Cluster(
        NO_HOOK="1",
        RAY_rdt_fetch_fail_timeout_milliseconds="3000",
        TRANSPORT_SETTINGS=json.dumps({"capacity_bytes": 8 * MIB, "timeout": 8.0}),
    )
    yield started
    started.close()


def test_ten_thousand_tensors_between_four_actors_arrive_with_every_byte(cluster: Cluster) -> None:
    found = cluster.run("crossing", distribution=DISTRIBUTION, window=12, seconds=240)
    assert found["tensors"] == 10_000
    assert sum(state["received"] for state in found["states"]) > found["objects"]
    for state in found["states"]:
        assert (state["held"], state["store"]["payloads"], state["store"]["used_bytes"]) == (0, 0, 0)
    print({name: value for name, value in found.items() if name != "states"})


def test_receivers_get_what_tensors_were_when_they_were_sent(cluster: Cluster) -> None:
    found = cluster.run("mutated")
    assert found["right"] == [found["expected"]] * 5


def test_structures_of_tensors_and_other_values_arrive_as_they_were(cluster: Cluster) -> None:
    found = cluster.run("values", kind="structure")
    assert found["received"] == found["sent"]


def test_an_object_without_tensors_needs_no_payload(cluster: Cluster) -> None:
    found = cluster.run("values", kind="text")
    assert found["received"] == found["sent"]


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("meta", "ConfigError", "tensor.device = 'meta' is not allowed: cpu; return or put tensor.cpu()"),
        ("sparse", "PayloadFormatError", "a tensor that is torch.sparse_coo cannot be carried"),
    ],
)
def test_a_tensor_that_cannot_be_carried_is_an_error_that_names_it(
    cluster: Cluster, kind: str, error: str, text: str
) -> None:
    failure = cluster.run("values", kind=kind)["received"]
    assert error in failure["types"]
    assert "ValueError" in failure["types"]
    assert text in failure["text"]


def test_a_driver_puts_a_snapshot_that_is_freed_with_its_reference(cluster: Cluster) -> None:
    found = cluster.run("put_by_driver")
    assert found == {
        "held": 1,
        "found": [["torch.int64", [1000], str([float(i) for i in range(1000)])]],
        "after": 0,
    }


def test_tensors_are_received_into_buffers_of_the_caller(cluster: Cluster) -> None:
    assert cluster.run("into_buffers") == {"same": [True, True], "right": [True, True]}


def test_dropped_references_free_memory_which_is_used_again(cluster: Cluster) -> None:
    count, nbytes = 100, 256 * KIB
    states = cluster.run("dropped", count=count, nbytes=nbytes)
    before, full, empty, full_again, empty_again = (state["store"] for state in states)
    assert (full["payloads"], full_again["payloads"]) == (count, count)
    assert full["used_bytes"] >= count * nbytes
    for state, cleared in ((empty, count), (empty_again, 2 * count)):
        assert (state["payloads"], state["used_bytes"], state["cleared"]) == (0, 0, before["cleared"] + cleared)
    assert full_again["memory_bytes"] == full["memory_bytes"]


def test_a_killed_receiver_costs_others_nothing(cluster: Cluster) -> None:
    rounds, nbytes = 3, 32 * MIB
    found = cluster.run("killed_receiver", rounds=rounds, nbytes=nbytes, seconds=120)
    assert found["right"] == rounds * 3 * nbytes
    assert (found["state"]["held"], found["state"]["store"]["payloads"]) == (0, 0)


def test_objects_of_a_killed_sender_are_lost_with_an_error_at_once(cluster: Cluster) -> None:
    found = cluster.run("killed_sender")
    for failure in (found["stranger"], found["driver"]):
        assert {"ProducerLostError", "ConnectionError"} <= set(failure["types"])
        assert failure["seconds"] < 5
    # It has mapped the sender's memory, so it may still read it: all of an object, or the error.
    acquainted = found["acquainted"]
    assert acquainted == MIB or "ProducerLostError" in acquainted["types"]


def test_restarted_actors_send_and_receive_where_the_hook_registers_the_transport(cluster: Cluster) -> None:
    found = cluster.run("restarted")
    assert found["new"] == 4096
    assert "ProducerLostError" in found["old"]["types"]


def test_a_restarted_actor_has_no_transport_without_the_hook(hasty_cluster: Cluster) -> None:
    found = hasty_cluster.run("restarted")
    assert "ValueError" in found["new"]["types"]
    assert "Unsupported tensor transport protocol" in found["new"]["text"]


def test_an_object_whose_owner_is_killed_stays(cluster: Cluster) -> None:
    assert cluster.run("killed_owner") == {"before": 1, "after": 1}


def test_a_reception_from_a_process_that_does_not_answer_can_be_aborted(hasty_cluster: Cluster) -> None:
    found = hasty_cluster.run("stopped_sender", wait=6.0)
    assert {"ConnectionReset", "ConnectionError"} <= set(found["actor"]["types"])
    assert found["aborted"] == 1
    assert found["other"] == MIB
    assert "GetTimeoutError" in found["driver"]["types"]
    assert found["driver"]["seconds"] < 2
    assert found["driver_aborted"] == 1
    assert found["continued"] == MIB


def test_a_sender_waits_for_room_and_then_fails(hasty_cluster: Cluster) -> None:
    found = hasty_cluster.run("full")
    assert {"StoreFullError", "TimeoutError"} <= set(found["full"]["types"])
    assert 8 <= found["full"]["seconds"] < 20
    assert found["early"] is False
    assert found["room"] > 0


def test_a_reception_over_a_network_can_be_aborted_amid_its_bytes(cluster: Cluster) -> None:
    found = cluster.run("aborted_bytes", nbytes=64 * MIB, after=8 * MIB)
    assert {"ConnectionReset", "ConnectionResetError"} <= set(found["aborted"]["types"])
    assert found["aborted"]["seconds"] < 2
    assert found["right"] is True
