"""docs/reference/protocol.md is enough to read payloads, and its worked exchange is that of a real server."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import protocol_client
import pytest
from transport_fixtures import endpoint_of, pattern, ring_of, serving
from waiting import wait_until

from dray import PayloadRef, PayloadServer, SharedRingBuffer, pack, unpack

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "protocol.md"
CLIENT = Path(protocol_client.__file__)
SECRET = b"the job's secret"


def run_client(actions: str, *references: PayloadRef, options: tuple[str, ...] = ()) -> tuple[int, list[Any]]:
    """The client's exit status, and what it printed."""
    command = [sys.executable, str(CLIENT), *options, actions, *(ref.to_json() for ref in references)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 3, 4, 5), done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def statuses(printed: list[Any]) -> list[str]:
    return [each["status"] for each in printed]


# --- a client from the page alone ------------------------------------------------------------------------------


def test_the_client_shares_no_code_with_dray() -> None:
    modules = re.findall(r"^\s*(?:import|from) (\w+)", CLIENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(modules) <= {*sys.stdlib_module_names, "xxhash"}


@pytest.mark.parametrize("secret", [None, SECRET])
def test_the_client_reads_a_payload_and_consumes_it_once(secret: bytes | None) -> None:
    options = ("--secret", secret.hex()) if secret else ()
    with serving("tcp", secret=secret) as server:
        rewards = np.array([[1.5, -2.0, 3.25]], np.float32)
        ref = server.put({"rewards": rewards, "episode_length": np.int64(3)}, metadata={"seed": "7"})
        code, printed = run_client("read,take,take,consume", ref, options=options)
        assert code == 0
        assert statuses(printed) == ["OK", "OK", "STALE", "STALE"]
        for each in printed[:2]:
            assert each["checked"]
            assert each["tensors"] == {
                "rewards": {"dtype": "F32", "shape": [1, 3], "values": [1.5, -2.0, 3.25]},
                "episode_length": {"dtype": "I64", "shape": [], "values": [3]},
            }
        assert [each["acked"] for each in printed] == [0, 1, 2, 2]
        assert server.wait_consumed(ref, timeout=5)
        counted = server.statistics().counters
        assert (counted.reads, counted.acks_returned, counted.acks_consumed) == (2, 1, 1)


def test_the_client_pipelines_more_reads_than_it_may_hold_leases() -> None:
    with serving("tcp", slots=20, max_leases=3, slot_bytes=1 << 20) as server:
        payloads = [np.frombuffer(pattern(seed, 200_000), np.uint8) for seed in range(8)]
        refs = [server.put({"bytes": payload}) for payload in payloads]
        code, printed = run_client("take,consume", *refs)
        assert code == 0
        assert statuses(printed) == ["OK"] * 8 + ["STALE"] * 8
        found = [bytes(each["tensors"]["bytes"]["values"]) for each in printed[:8]]
        assert found == [payload.tobytes() for payload in payloads]
        assert ring_of(server).statistics().consumed == 8


def test_the_client_frees_a_payload_without_reading_it_and_requests_statistics() -> None:
    with serving("tcp") as server:
        ref = server.put({"a": [1, 2, 3]})
        code, printed = run_client("consume,stat,take", ref)
        assert code == 0
        assert statuses(printed) == ["OK", "OK", "STALE"]
        assert server.wait_consumed(ref, timeout=5)
        stat = printed[1]["stat"]
        assert stat["producer"] == ref.producer.hex()
        assert (stat["ring"]["consumed"], stat["server"]["consumed"]) == (1, 1)
        documented = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(stat) <= {name for names in documented for name in re.findall(r"\w+", names)}


def test_a_payload_of_another_size_than_requested_is_an_error_with_its_reason() -> None:
    with serving("tcp") as server:
        ref = server.put({"a": [1, 2, 3]})
        code, printed = run_client("take", dataclasses.replace(ref, nbytes=ref.nbytes - 1))
        assert (code, statuses(printed)) == (0, ["ERROR"])
        assert str(ref.nbytes) in printed[0]["text"]
        code, printed = run_client("take", ref)
        assert (code, statuses(printed)) == (0, ["OK"])


def test_the_client_reads_parts_of_payloads_and_gets_the_reason_where_there_are_none() -> None:
    selection = json.dumps({"fields": ["rewards", "actions"], "rows": {"rewards": [[0, 1], [4, None]]}})
    with serving("tcp", secret=SECRET) as server:
        arrays = {"observations": np.zeros((5, 9)), "rewards": np.arange(5.0), "actions": np.arange(5)}
        ref, other = server.put(arrays), server.put({"other": [1]})
        options = "--secret", SECRET.hex(), "--select", selection
        code, printed = run_client("read,take,take", ref, other, options=options)
        assert code == 0
        assert statuses(printed) == ["OK", "UNSELECTABLE", "OK", "UNSELECTABLE", "STALE", "UNSELECTABLE"]
        for each in (printed[0], printed[2]):
            assert each["checked"]
            assert each["tensors"] == {
                "rewards": {"dtype": "F64", "shape": [2], "values": [0.0, 4.0]},
                "actions": {"dtype": "I64", "shape": [5], "values": [0, 1, 2, 3, 4]},
            }
        assert printed[1]["text"] == "the payload has no field 'rewards'; its fields: 'other'"
        assert ring_of(server).statistics().ready == 1


def test_a_payload_for_two_readers_is_consumed_by_both() -> None:
    with serving("tcp", readers=2) as server:
        ref = server.put({"a": [1]})
        first, _ = run_client("take", ref, options=("--reader", "0"))
        assert not server.wait_consumed(ref, timeout=0)
        code, printed = run_client("take,take", ref, options=("--reader", "1"))
        assert (first, code, statuses(printed)) == (0, 0, ["OK", "STALE"])
        assert server.wait_consumed(ref, timeout=5)
        code, printed = run_client("take,consume", ref, options=("--reader", "2"))
        assert (code, statuses(printed)) == (0, ["DENIED", "DENIED"])


@pytest.mark.parametrize(("mine", "theirs"), [("", SECRET), (b"wrong".hex(), SECRET), (SECRET.hex(), None)])
def test_the_client_without_the_right_secret_gets_no_payload_byte(mine: str, theirs: bytes | None) -> None:
    with serving("tcp", secret=theirs) as server:
        ref = server.put({"a": [1]})
        code, printed = run_client("take", ref, options=("--secret", mine))
        assert (code, printed) == (3, [])
        wait_until(lambda: server.statistics().counters.auth_failures == 1, "it to be counted")
        assert server.statistics().counters.bytes == 0


def test_the_client_recognises_another_producer_before_it_checks_the_proof() -> None:
    with serving("tcp", secret=b"another job's secret") as server:
        mine = PayloadRef(b"p" * 16, 0, 0, 100, server.endpoints)
        code, printed = run_client("take", mine, options=("--secret", SECRET.hex()))
        assert (code, printed) == (4, [])


# --- the worked exchange ---------------------------------------------------------------------------------------


def exchange() -> list[tuple[str, str, bytes]]:
    """(sender, what, bytes) of each message in the page's dump."""
    text = PAGE.read_text(encoding="utf-8")
    (dump,) = re.findall(r"```text\n(client → server: .*?)\n```", text, re.DOTALL)
    found = []
    for block in dump.split("\n\n"):
        title, *lines = block.splitlines()
        sender, what = re.fullmatch(r"(client|server) → (?:client|server): (.*)", title).groups()  # type: ignore[union-attr]
        message = b""
        for line in lines:
            offset, digits, shown = re.fullmatch(r"([0-9a-f]{4})  (.{48})(?:  (.*))?", line).groups()  # type: ignore[union-attr]
            assert int(offset, 16) == len(message), line
            part = bytes.fromhex(digits)
            text_of_part = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
            assert (shown or "") == text_of_part.rstrip(), line
            message += part
        found.append((sender, what, message))
    return found


def referred() -> dict[str, Any]:
    """The reference of the worked exchange."""
    section = PAGE.read_text(encoding="utf-8").split("## A whole exchange")[1]
    found: dict[str, Any] = json.loads(re.findall(r"```json\n(.*?)\n```", section)[0])
    return found


def secret() -> bytes:
    section = PAGE.read_text(encoding="utf-8").split("## A whole exchange")[1]
    found = re.search(r"secret `([^`]+)` \((\d+) bytes", section)
    assert found is not None
    assert len(found[1]) == int(found[2])
    return found[1].encode()


def test_worked_exchange_is_that_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = exchange()
    sizes = {what.partition(",")[0].partition(":")[0]: len(message) for _, what, message in messages}
    assert sizes["HELLO"] == 64
    assert sizes["CHALLENGE"] == 128
    challenge = messages[1][2]
    producer, nonce = challenge[8:24], challenge[24:56]
    slots, slot_bytes = (int.from_bytes(challenge[at : at + 8], "little") for at in (88, 96))
    payload = next(message for _, what, message in messages if what.startswith("payload"))
    monkeypatch.setattr(os, "urandom", lambda size: {16: producer, 32: nonce}[size])
    with (
        SharedRingBuffer(slots, slot_bytes) as ring,
        PayloadServer(ring, lane="tcp", threads=1, secret=secret()) as server,
    ):
        for _ in range(referred()["s"]):
            server.put_bytes(b"another payload")
        ref = server.put(unpack(payload))
        assert {**json.loads(ref.to_json()), "e": referred()["e"]} == referred()
        address = endpoint_of(server, "tcp")
        with socket.create_connection((address.host, address.port), timeout=10) as sock:
            for sender, what, message in messages:
                if sender == "client":
                    sock.sendall(message)
                    continue
                answer = b""
                while len(answer) < len(message) and (part := sock.recv(len(message) - len(answer))):
                    answer += part
                assert answer == message, what
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)


def test_worked_exchange_is_what_the_client_sends() -> None:
    client = [message for sender, _, message in exchange() if sender == "client"]
    challenge, payload = (message for _, _, message in exchange() if len(message) in (128, referred()["n"]))
    nonce, producer = client[0][24:56], bytes.fromhex(referred()["p"])
    assert client[0] == protocol_client.hello(producer, nonce, secret())
    assert client[1] == protocol_client.answer_challenge(challenge, producer, nonce, secret())[0]
    where = (referred()["s"], referred()["q"])
    assert client[2] == protocol_client.request(protocol_client.READ, 7, *where, referred()["n"])
    assert client[3] == protocol_client.request(protocol_client.ACK, 7, *where, flags=protocol_client.CONSUMED)
    assert client[4] == protocol_client.request(protocol_client.CONSUME, 8, *where)
    assert payload == bytes(pack(unpack(payload)))


def test_checksum_of_nothing_in_the_page_is_that_of_the_hash() -> None:
    xxhash = pytest.importorskip("xxhash")
    (digits,) = re.findall(r"`([0-9a-f]{16})` for no bytes", PAGE.read_text(encoding="utf-8"))
    assert int(digits, 16) == xxhash.xxh3_64_intdigest(b"")
