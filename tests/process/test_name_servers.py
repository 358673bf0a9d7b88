"""Host names: a name server that does not answer, and names that mean loopback or IPv6 addresses."""

import json
from pathlib import Path
from typing import Any

from isolation import run_isolated

RESOLVER = {
    "/etc/resolv.conf": "nameserver 127.0.0.1\n",
    "/etc/nsswitch.conf": "hosts: files dns\n",
}

SILENT = """
import json, socket, threading
from dray import *
from dray.errors import *
from dray.clock import Deadline
from dray.jobs.queue import RedisAddress, RedisConnection
from dray.name_resolution import MAX_QUERIES, resolve

# The name server: it takes every question and answers none.
name_server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
name_server.bind(("127.0.0.1", 53))

def refused(call):
    try:
        call()
    except DrayError as error:
        return [type(error).__name__, str(error)]

def reference(*endpoints, ref=PayloadRef(b"p" * 16, 0, 1, 100, ())):
    return PayloadRef(ref.producer, ref.slot, ref.sequence, ref.nbytes, endpoints)

found = {}
for lane in ("tcp", "ucx"):
    with PayloadClient(lane=lane) as client:
        found[lane] = refused(lambda: client.read(reference(f"{lane}:silent.example:40000"), timeout=0.3))

# A read that waits for the name server while its client is closed.
client = PayloadClient()
asked = threading.Event()
ended = []
def read():
    asked.set()
    ended.append(refused(lambda: client.read(reference("tcp:closed.example:40000"), timeout=60)))
reader = threading.Thread(target=read)
reader.start()
asked.wait(10)
name_server.settimeout(20)
while b"closed" not in name_server.recv(1024):
    pass
client.close()
reader.join(10)
found["closed"] = ended[0]

# Another endpoint of the same reference is read in the time that is left.
secret = bytes(32)
with (
    SharedRingBuffer(1, 64) as ring,
    PayloadServer(ring, lane=("tcp",), secret=secret) as server,
    PayloadClient(secret=secret) as client,
):
    put = server.put_bytes(b"payload")
    both = reference("tcp:silent.example:40000", put.endpoints[0], ref=put)
    found["other endpoint"] = bytes(client.read_bytes(both, timeout=4)).decode()

# A command to Redis ends with the time for an answer.
for scheme in ("redis", "rediss"):
    with RedisConnection(RedisAddress(f"{scheme}://redis.example:6379"), answer_timeout=0.3) as redis:
        found[scheme] = refused(lambda: redis.call("ask", lambda client: client.do("PING"), Deadline.after(0)))

# No more threads than MAX_QUERIES wait for the name server.
names = [f"name-{number}.example" for number in range(MAX_QUERIES + 1)]
found["names"] = [refused(lambda: resolve(name, 1, Deadline.after(0))) for name in names]
found["threads"] = sum(thread.name == "dray-name-resolution" for thread in threading.enumerate())
found["numeric"] = resolve("127.0.0.1", 7, Deadline.after(0))
print(json.dumps(found))
"""


def test_a_silent_name_server_costs_a_read_no_more_than_its_timeout_and_close_nothing(tmp_path: Path) -> None:
    (line,) = run_isolated(SILENT, tmp_path, RESOLVER)
    found: dict[str, Any] = json.loads(line)
    for lane in ("tcp", "ucx"):
        kind, text = found[lane]
        assert kind == "TransportTimeout"
        assert "waiting for the name server" in text
        assert f"{lane}:silent.example:40000" in text
    assert found["closed"][0] == "BufferClosedError"
    assert found["other endpoint"] == "payload"
    for scheme in ("redis", "rediss"):
        kind, text = found[scheme]
        assert kind == "RedisUnavailableError"
        assert "no answer while waiting for the name server" in text
    kinds = [kind for kind, _ in found["names"]]
    assert kinds[0] == "TransportTimeout"
    assert kinds[-1] == "Unreachable"
    assert "name server does not answer" in found["names"][-1][1]
    assert found["threads"] == 16
    assert found["numeric"] == [[2, ["127.0.0.1", 7]]]


HOSTS = "::1 localhost six\n127.0.0.1 four\n::1 both\n127.0.0.1 both\n127.0.1.1 debian\n"

NAMES = """
import json, logging
from dray import *
from dray.errors import *
from dray.jobs.controller.listener import bind

lines = []
class Kept(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("dray.server").addHandler(Kept())

found = {}
for host in ("localhost", "six", "four", "both", "debian", "::1", "127.1"):
    lines.clear()
    with SharedRingBuffer(1, 64) as ring, PayloadServer(ring, host=host, threads=1, secret=b"x" * 32) as server:
        put = server.put_bytes(b"payload")
        reads = {}
        for endpoint in put.endpoints[1:]:
            alone = PayloadRef(put.producer, put.slot, put.sequence, put.nbytes, (endpoint,))
            with PayloadClient(secret=b"x" * 32) as client:
                reads[endpoint.rpartition(":")[0]] = bytes(client.read_bytes(alone, consume=False)).decode()
    with bind(host, 0) as listener:
        found[host] = [reads, listener.getsockname()[0], list(lines)]
try:
    PayloadServer(SharedRingBuffer(1, 64), host="six", lane=("tcp", "ucx"))
except ConfigError as error:
    found["ucx alone"] = str(error)
print(json.dumps(found))
"""


def test_names_that_mean_loopback_or_ipv6_addresses_are_served_and_advertised_as_numbers(tmp_path: Path) -> None:
    (line,) = run_isolated(NAMES, tmp_path, {**RESOLVER, "/etc/hosts": HOSTS})
    found: dict[str, Any] = json.loads(line)
    six, four = {"tcp:[::1]": "payload"}, {"tcp:127.0.0.1": "payload", "ucx:127.0.0.1": "payload"}
    assert found["localhost"] == [six, "::1", []]
    assert found["::1"] == [six, "::1", []]
    assert found["six"][:2] == [six, "::1"]
    assert found["four"][:2] == [four, "127.0.0.1"]
    assert found["both"][0] == four
    reads, bound, lines = found["debian"]
    assert (reads, bound) == ({"tcp:127.0.1.1": "payload", "ucx:127.0.0.1": "payload"}, "127.0.1.1")
    assert len(lines) == 1
    assert "'debian' means 127.0.1.1 here, a loopback address: other machines cannot reach this server" in lines[0]
    assert found["ucx alone"].startswith("host = 'six' is not allowed: an IPv4 address")
