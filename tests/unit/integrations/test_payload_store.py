import copy
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from forked_child import run_in_child

import dray
from dray.errors import (
    BufferClosedError,
    BufferFullError,
    ConfigError,
    PayloadFormatError,
    PayloadTooLargeError,
    ProducerLostError,
    ProtocolError,
    SelectionError,
    StaleSlotError,
    StoreFullError,
)
from dray.integrations.store import PayloadStore, Token

MIB = 1 << 20


@pytest.fixture
def store() -> Iterator[PayloadStore]:
    with PayloadStore(capacity_bytes=4 * MIB, slots=64) as made:
        yield made


@pytest.fixture
def other() -> Iterator[PayloadStore]:
    """A store that has put nothing: to it, those of `store` are of another process."""
    with PayloadStore(capacity_bytes=MIB, slots=4) as made:
        yield made


@pytest.fixture(params=["own", "other"])
def reading(request: pytest.FixtureRequest, store: PayloadStore) -> PayloadStore:
    return store if request.param == "own" else request.getfixturevalue("other")


def test_values_come_back_by_their_tokens(store: PayloadStore, reading: PayloadStore) -> None:
    mappings: list[dict[str, Any]] = [
        {"x": np.arange(6, dtype=np.int16).reshape(2, 3), "reward": 0.5},
        {"text": "über", "nested": {"ids": np.arange(3), "names": ["a", "b"]}, "nothing": None},
    ]
    first, second = reading.get(store.put_many(mappings))
    assert first["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert first["x"].dtype == np.int16
    assert float(first["reward"]) == 0.5
    assert second["text"] == "über"
    assert second["nested"]["ids"].tolist() == [0, 1, 2]
    assert list(second["nested"]["names"]) == ["a", "b"]
    assert second["nothing"] is None


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float32", "bool"])
def test_tensors_of_any_dtype_come_back(store: PayloadStore, other: PayloadStore, name: str) -> None:
    torch = pytest.importorskip("torch")
    from dray.payload.torch_interop import to_torch

    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, name))
    (found,) = other.get([store.put({"t": tensor})])
    back = to_torch(found)["t"]
    assert back.dtype is tensor.dtype
    assert back.float().tolist() == tensor.float().tolist()


def test_what_was_got_is_a_snapshot_that_may_be_written(store: PayloadStore, reading: PayloadStore) -> None:
    token = store.put({"x": np.zeros(100_000)})
    (first,) = reading.get([token])
    first["x"][:] = 1
    (second,) = reading.get([token])
    assert second["x"].sum() == 0
    store.clear([token])
    store.put_many([{"x": np.full(100_000, 9.0)}] * 4)
    assert second["x"].sum() == 0


def test_a_part_of_each_payload_is_got(store: PayloadStore, reading: PayloadStore) -> None:
    tokens = store.put_many([{"x": np.arange(10) + n, "y": np.ones(3)} for n in range(3)])
    found = reading.get(tokens, fields=("x",), rows={"x": (2, 4)})
    assert [list(each) for each in found] == [["x"]] * 3
    assert [each["x"].tolist() for each in found] == [[2, 3], [3, 4], [4, 5]]
    with pytest.raises(SelectionError):
        reading.get(tokens, fields=("z",))


def test_views_have_the_same_values_one_after_the_other(store: PayloadStore, reading: PayloadStore) -> None:
    tokens = store.put_many([{"x": np.full(50_000, n)} for n in range(8)])
    assert [int(each["x"].max()) for each in reading.views(tokens, fields=("x",))] == list(range(8))


def test_tokens_of_several_processes_are_got_in_their_order(store: PayloadStore, other: PayloadStore) -> None:
    tokens = [(store if n % 2 else other).put({"n": n}) for n in range(6)]
    assert [int(each["n"]) for each in store.get(tokens)] == list(range(6))
    assert store.get([]) == []


def test_a_cleared_payload_is_gone_and_its_room_is_free(store: PayloadStore, reading: PayloadStore) -> None:
    token = store.put({"x": np.zeros(1000)})
    assert store.statistics().payloads == 1
    assert store.statistics().used_bytes > 8000
    assert reading.clear([token, token]) == 1
    assert store.statistics().payloads == store.statistics().used_bytes == 0
    with pytest.raises(StaleSlotError):
        reading.get([token])
    assert reading.clear([token]) == 0


def test_a_payload_is_freed_when_all_its_fields_are_cleared(store: PayloadStore, reading: PayloadStore) -> None:
    token = store.put({"a": np.zeros(3), "b": np.ones(3), "c": np.ones(3)})
    assert reading.clear([token], fields=("a",)) == 0
    assert reading.clear([token], fields=("a", "b")) == 0
    assert set(reading.get([token])[0]) == {"a", "b", "c"}
    assert reading.clear([token], fields=("c",)) == 1
    assert store.statistics().payloads == 0


def test_each_reader_clears_for_itself() -> None:
    with (
        PayloadStore(capacity_bytes=MIB, slots=8, readers=2) as first,
        PayloadStore(capacity_bytes=MIB, slots=8, readers=2, reader=1) as second,
    ):
        token = first.put({"x": np.arange(3)})
        assert first.clear([token]) == 1
        assert first.clear([token]) == 0
        with pytest.raises(StaleSlotError):
            first.get([token])
        assert second.get([token])[0]["x"].tolist() == [0, 1, 2]
        assert first.statistics().payloads == 1
        assert second.clear([token]) == 1
        assert first.statistics().payloads == 0


def test_put_waits_for_room_that_another_process_makes(store: PayloadStore, other: PayloadStore) -> None:
    tokens = store.put_many([{"x": np.zeros(MIB, np.uint8)} for _ in range(3)])
    other.get(tokens)
    put: list[str] = []
    thread = threading.Thread(target=lambda: put.append(store.put({"x": np.ones(2 * MIB, np.uint8)}, timeout=20)))
    thread.start()
    thread.join(0.2)
    assert not put
    other.clear(tokens)
    thread.join(20)
    assert int(store.get(put)[0]["x"].sum()) == 2 * MIB
    assert store.statistics().waits == 1


def test_the_error_of_a_full_store_states_what_is_in_it(store: PayloadStore) -> None:
    store.put_many([{"x": np.zeros(MIB, np.uint8)}] * 3)
    with pytest.raises(StoreFullError, match=r"3 payloads .* capacity_bytes = 4194304") as caught:
        store.put({"x": np.zeros(MIB, np.uint8)}, timeout=0.05)
    error = copy.copy(caught.value)
    assert isinstance(error, BufferFullError | TimeoutError)
    assert (error.capacity_bytes, error.payloads) == (4 * MIB, 3)
    assert 3 * MIB < error.used_bytes < 4 * MIB
    assert store.statistics().full_errors == 1


def test_a_store_is_also_full_when_it_has_no_slot() -> None:
    with PayloadStore(capacity_bytes=MIB, slots=2, put_timeout=0.05) as store:
        store.put_many([{"n": 1}, {"n": 2}])
        with pytest.raises(StoreFullError, match="2 payloads"):
            store.put({"n": 3})


def test_of_mappings_that_cannot_all_be_put_none_stays(store: PayloadStore) -> None:
    kept = store.put({"x": np.zeros(2 * MIB, np.uint8)})
    with pytest.raises(StoreFullError):
        store.put_many([{"x": np.zeros(MIB, np.uint8)}] * 3, timeout=0.05)
    with pytest.raises(StoreFullError, match="can never be in the store"):
        store.put_many([{"x": np.zeros(MIB, np.uint8)}] * 4, timeout=60)
    with pytest.raises(PayloadFormatError):
        store.put_many([{"x": 1}, {"x": object()}])
    assert store.statistics().payloads == 1
    assert store.get([kept])[0]["x"].size == 2 * MIB


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_rows_of_columns_come_back_as_payloads_of_their_own(rows: int) -> None:
    random = np.random.default_rng(rows)
    columns = {
        "ids": random.integers(0, 1 << 30, (rows, 12_000), dtype=np.int32),
        "mask": random.random((rows, 40)) < 0.5,
        "reward": random.random(rows),
    }
    with (
        PayloadStore(capacity_bytes=48 * MIB, slots=512) as store,
        PayloadStore(capacity_bytes=MIB, slots=4) as other,
    ):
        # Slots are free in another order than they lie in, and some between them are not.
        held = store.put_rows({"x": random.random((400, 2000))})
        store.clear(token for number, token in enumerate(random.permutation(held)) if number % 10)
        for reading in (store, other):
            tokens = store.put_rows(columns)
            found = reading.get(tokens)
            assert list(found[0]) == list(columns)
            for row, values in enumerate(found):
                assert all(np.array_equal(values[name], column[row]) for name, column in columns.items())
            assert other.clear(tokens) == rows
        assert store.statistics().payloads == 40
        assert store.statistics().put == 400 + 2 * rows


def test_of_rows_that_cannot_all_be_put_none_stays(store: PayloadStore) -> None:
    store.put({"x": np.zeros(2 * MIB, np.uint8)})
    with pytest.raises(StoreFullError, match="no room"):
        store.put_rows({"x": np.zeros((3, MIB), np.uint8)}, timeout=0.05)
    with pytest.raises(StoreFullError, match="can never be in the store"):
        store.put_rows({"x": np.zeros((4, MIB), np.uint8)}, timeout=60)
    with pytest.raises(PayloadFormatError, match="one length"):
        store.put_rows({"x": np.zeros(3), "y": np.zeros(4)})
    assert store.statistics().payloads == 1
    assert store.put_rows({"x": np.zeros((0, 5))}) == []


def test_a_payload_that_no_slot_can_hold_names_the_argument() -> None:
    with PayloadStore(capacity_bytes=4 * MIB, slots=8, payload_bytes=MIB) as store:
        with pytest.raises(PayloadTooLargeError, match="payload_bytes = 1048576"):
            store.put({"x": np.zeros(2 * MIB, np.uint8)})
        with pytest.raises(PayloadTooLargeError, match="payload_bytes"):
            store.put({"x": np.zeros(5 * MIB, np.uint8)})


def test_memory_is_used_again_for_payloads_of_a_similar_size(store: PayloadStore, other: PayloadStore) -> None:
    for _ in range(20):
        tokens = store.put_many([{"x": np.zeros(size, np.uint8)} for size in (MIB, 1000, 1000, 100_000)])
        other.get(tokens)
        other.clear(tokens)
    assert store.statistics().memory_bytes < 6 * MIB
    assert store.statistics().put == 80


def test_a_token_is_short_text(store: PayloadStore) -> None:
    token = store.put({"x": np.zeros(100_000)})
    assert len(token) < 128
    assert token.isascii()
    assert Token.decode(token).fields == 1
    assert Token.decode(token).encode() == token


@pytest.mark.parametrize("text", ["", "x", "....", "A.0.0.0.0", "AQ.1.2.3", "AQ.g.0.0.0", "é.0.0.0.0", 5, None])
def test_what_is_no_token_is_refused(store: PayloadStore, text: Any) -> None:
    for call in (store.get, store.clear):
        with pytest.raises(ProtocolError, match=r"no token|must be"):
            call([text])


def test_payloads_of_a_process_that_has_ended_are_lost(store: PayloadStore) -> None:
    program = """
import numpy as np
from dray.integrations.store import PayloadStore
store = PayloadStore(capacity_bytes=1 << 20, slots=4)
print(store.put({"x": np.arange(3)}), flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        token = process.stdout.readline().strip()
        assert store.get([token])[0]["x"].tolist() == [0, 1, 2]
        process.communicate("\n", timeout=30)
    assert process.returncode == 0
    with pytest.raises(ProducerLostError):
        store.get([token])
    assert store.clear([token]) == 0


def test_a_forked_child_has_a_store_of_its_own(store: PayloadStore) -> None:
    token = store.put({"x": np.arange(3)})

    def check() -> None:
        assert store.get([token])[0]["x"].tolist() == [0, 1, 2]
        own = store.put({"x": np.arange(4)})
        assert store.get([own, token])[0]["x"].size == 4
        assert store.statistics().payloads == 1
        assert store.clear([token, own]) == 2
        store.close()

    assert run_in_child(check) == ""
    assert store.statistics().payloads == 0
    store.put({"x": np.arange(5)})


def test_other_hosts_are_served_over_tcp_with_the_secret() -> None:
    secret = dray.make_secret()
    with (
        PayloadStore(capacity_bytes=MIB, slots=8, listen="tcp://127.0.0.1:0", secret=secret) as store,
        PayloadStore(capacity_bytes=MIB, slots=8, secret=secret) as other,
    ):
        tokens = store.put_many([{"x": np.full(3, n), "y": np.zeros(5_000)} for n in range(3)])
        far = []
        for token in map(Token.decode, tokens):
            endpoints = tuple(each for each in token.ref.endpoints if each.startswith("tcp:"))
            assert len(endpoints) == 1
            far.append(replace(token, ref=replace(token.ref, endpoints=endpoints)).encode())
        assert [each["x"].tolist() for each in other.get(far, fields=("x",))] == [[n] * 3 for n in range(3)]
        assert [int(each["x"][0]) for each in other.views(far)] == [0, 1, 2]
        assert other.clear(far) == 3
        assert store.statistics().payloads == 0


def test_a_closed_store_refuses_everything(store: PayloadStore) -> None:
    token = store.put({"x": 1})
    store.close()
    store.close()
    for call in (lambda: store.put({"x": 1}), lambda: store.get([token]), lambda: store.clear([token])):
        with pytest.raises(BufferClosedError):
            call()
    with pytest.raises(BufferClosedError):
        store.statistics()


def test_nothing_is_opened_before_it_is_needed() -> None:
    with PayloadStore(capacity_bytes=MIB) as store:
        assert store.statistics().payloads == 0
        assert "not used yet" in repr(store)


@pytest.mark.parametrize(
    "arguments",
    [
        {"capacity_bytes": 0},
        {"slots": 1 << 21},
        {"readers": 0},
        {"readers": 2, "reader": 2},
        {"payload_bytes": 2 * MIB},
        {"listen": "127.0.0.1:5"},
    ],
)
def test_an_argument_that_is_not_allowed_is_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(arguments))):
        PayloadStore(**({"capacity_bytes": MIB} | arguments))
