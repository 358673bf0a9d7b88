"""What a driver of a Ray cluster does in the tests of the transport; each returns what JSON can hold."""

import os
import random
import signal
import socket
import threading
import time
from collections import deque
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray_latency
import torch
from ray.experimental import set_target_for_ref
from waiting import holds_within, wait_until

from dray.integrations.ray import DrayTransport, Settings, transport_statistics
from dray.integrations.store import Token

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.float16)
BOUND = 30.0


def content(seed: int, index: int, nbytes: int) -> torch.Tensor:
    """A tensor of random bits."""
    bits = bytearray(np.random.default_rng((seed, index)).bytes(nbytes))
    return torch.frombuffer(bits, dtype=torch.uint8).view(DTYPES[index % len(DTYPES)])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def right_bytes(made: dict[str, Any], seed: int, sizes: list[int]) -> int:
    """The size of an object of `Peer.make`; raises if a byte is wrong."""
    assert made["seed"] == seed
    for index, (tensor, nbytes) in enumerate(zip(made["tensors"], sizes, strict=True)):
        assert same_bits(tensor, content(seed, index, nbytes)), (seed, index)
    return sum(sizes)


def failure(error: BaseException, begun: float) -> dict[str, Any]:
    """What a caller sees of an error."""
    types = [kind.__name__ for kind in type(error).__mro__]
    return {"types": types, "text": str(error), "seconds": time.monotonic() - begun}


def outcome(ref: Any, **options: Any) -> Any:
    """What `ray.get` returns or raises."""
    begun = time.monotonic()
    try:
        return ray.get(ref, **options)
    except Exception as error:
        return failure(error, begun)


@ray.remote(enable_tensor_transport=True, max_restarts=1)
class Peer:
    """An actor that makes tensors, and that receives them."""

    @ray.method(tensor_transport="dray")
    def make(self, seed: int, sizes: list[int]) -> dict[str, Any]:
        self.kept = [content(seed, index, nbytes) for index, nbytes in enumerate(sizes)]
        return {"seed": seed, "tensors": self.kept}

    @ray.method(tensor_transport="dray")
    def make_values(self, kind: str) -> Any:
        return VALUES[kind]()

    def overwrite(self) -> None:
        for tensor in self.kept:
            tensor.view(torch.uint8).fill_(0)

    def check(self, made: dict[str, Any], seed: int, sizes: list[int]) -> int:
        return right_bytes(made, seed, sizes)

    def get_and_check(self, refs: list[Any], seed: int, sizes: list[int]) -> int:
        return right_bytes(ray.get(refs[0]), seed, sizes)

    def describe(self, values: Any) -> Any:
        return description(values)

    def change(self, made: dict[str, Any]) -> None:
        for tensor in made["tensors"]:
            tensor.view(torch.uint8).fill_(1)

    def own(self, source: Any) -> None:
        """Become the owner of an object of another actor."""
        self.owned = source.make.remote(1, [1024])
        ray.wait([self.owned])

    def busy(self, seconds: float) -> None:
        time.sleep(seconds)

    def statistics(self) -> dict[str, Any]:
        return asdict(transport_statistics())

    def pid(self) -> int:
        return os.getpid()


def structure() -> dict[str, Any]:
    return {
        "task": "cartpole",
        "step": 7,
        "rewards": torch.arange(4, dtype=torch.bfloat16),
        "parts": [torch.ones(2, 3).t(), {"mask": torch.tensor([True, False])}],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "expanded": torch.ones(1).expand(3),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "double": torch.tensor([3j], dtype=torch.complex128),
        "eight": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
        "unsigned": torch.tensor([1, 65535]).to(torch.uint16),
        "learnt": torch.ones(1, requires_grad=True),
    }


VALUES = {
    "structure": structure,
    "text": lambda: {"text": "no tensors"},
    "meta": lambda: torch.empty(2, device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
}
REFUSED = ("meta", "sparse")


def description(values: Any) -> Any:
    """Values as JSON has them; a tensor is its dtype, shape and numbers."""
    if isinstance(values, torch.Tensor):
        numbers = values.detach().to(torch.complex128 if values.is_complex() else torch.float64)
        return [str(values.dtype), list(values.shape), str(numbers.tolist())]
    if isinstance(values, dict):
        return {name: description(value) for name, value in values.items()}
    return [description(each) for each in values] if isinstance(values, list) else values


idle: list[Any] = []
"""Actors of earlier scenarios: a start takes seconds."""


def new_peers(count: int) -> list[Any]:
    """Actors that are running, and have received nothing so far."""
    made = [Peer.remote() for _ in range(count)]
    ray.get([each.pid.remote() for each in made])
    return made


def peers(count: int) -> list[Any]:
    """Actors that are running."""
    if len(idle) < count:
        idle.extend(new_peers(count - len(idle)))
    taken = idle[:count]
    del idle[:count]
    return taken


def end(*actors: Any) -> None:
    for each in actors:
        ray.kill(each)


def statistics_after(actor: Any, held: int) -> dict[str, Any]:
    """Those of an actor as soon as it holds so many objects; otherwise the last ones."""
    holds_within(BOUND, lambda: ray.get(actor.statistics.remote())["held"] == held, pause=0.02)
    return ray.get(actor.statistics.remote())


def crossing(distribution: list[list[int]], window: int) -> dict[str, Any]:
    """Tensors of many sizes between four actors. A tenth of the objects goes to two receivers.

    Args:
        distribution: how many tensors of which sizes, from and to.
        window: objects under way at a time.
    """
    chance = random.Random(7)
    sizes = [
        chance.randrange(low // 8, high // 8 + 1) * 8 for count, low, high in distribution for _ in range(count)
    ]
    chance.shuffle(sizes)
    actors = peers(4)
    begun = time.monotonic()
    waiting: deque[tuple[Any, int]] = deque()
    objects = received = 0
    pending = sizes
    while pending or waiting:
        if pending and len(waiting) < window:
            count = chance.randint(4, 16)
            part, pending = pending[:count], pending[count:]
            source, *others = chance.sample(actors, 4)
            made = source.make.remote(objects, part)
            for receiver in others[: 2 if objects % 10 == 0 else 1]:
                waiting.append((receiver.check.remote(made, objects, part), sum(part)))
            objects += 1
        else:
            result, nbytes = waiting.popleft()
            assert ray.get(result) == nbytes
            received += nbytes
    seconds = time.monotonic() - begun
    made = None
    states = [statistics_after(each, 0) for each in actors]
    idle.extend(actors)
    return {"tensors": len(sizes), "objects": objects, "bytes": received, "seconds": seconds, "states": states}


def mutated() -> dict[str, Any]:
    """A sender overwrites its tensors after it has sent them; a receiver overwrites what it has received."""
    source, *receivers = peers(4)
    sizes = [1024, 8 << 20]
    made = source.make.remote(3, sizes)
    ray.wait([made])
    ray.get(source.overwrite.remote())
    ray.get(receivers[0].change.remote(made))
    results = ray.get([each.check.remote(made, 3, sizes) for each in receivers])
    results.append(right_bytes(ray.get(made), 3, sizes))
    results.append(ray.get(receivers[0].get_and_check.remote([made], 3, sizes)))
    idle.extend((source, *receivers))
    return {"right": results, "expected": sum(sizes)}


def values(kind: str) -> Any:
    """What a receiver gets of these values, beside what the driver gets."""
    source, receiver = peers(2)
    made = source.make_values.remote(kind)
    found = outcome(receiver.describe.remote(made))
    idle.extend((source, receiver))
    return {"received": found, "sent": None if kind in REFUSED else description(VALUES[kind]())}


def put_by_driver() -> dict[str, Any]:
    """`ray.put` in the driver: a snapshot, which is freed with its reference."""
    (receiver,) = peers(1)
    tensor = torch.arange(1000)
    before = transport_statistics().held
    ref = ray.put([tensor], _tensor_transport="dray")
    held = transport_statistics().held - before
    tensor.fill_(0)
    found = ray.get(receiver.describe.remote(ref))
    del ref
    holds_within(BOUND, lambda: transport_statistics().held == before)
    idle.append(receiver)
    return {"held": held, "found": found, "after": transport_statistics().held - before}


def into_buffers() -> dict[str, Any]:
    """`ray.get` into tensors that the caller has."""
    (source,) = peers(1)
    sizes = [1024, 1 << 20]
    made = source.make.remote(5, sizes)
    buffers = [torch.empty_like(content(5, index, nbytes)) for index, nbytes in enumerate(sizes)]
    set_target_for_ref(made, buffers)
    tensors = ray.get(made)["tensors"]
    right = [same_bits(buffer, content(5, index, sizes[index])) for index, buffer in enumerate(buffers)]
    idle.append(source)
    return {"same": [a is b for a, b in zip(tensors, buffers, strict=True)], "right": right}


def dropped(count: int, nbytes: int) -> list[Any]:
    """The objects and bytes that an actor holds: with references, without them, and after as many again."""
    source, receiver = peers(2)
    states = [ray.get(source.statistics.remote())]
    for seed in range(2):
        made = [source.make.remote(seed, [nbytes]) for _ in range(count)]
        ray.get([receiver.check.remote(each, seed, [nbytes]) for each in made])
        states.append(statistics_after(source, count))
        del made
        states.append(statistics_after(source, 0))
    idle.extend((source, receiver))
    return states


def killed_receiver(rounds: int, nbytes: int) -> dict[str, Any]:
    """Receivers are killed while they receive; another one gets all objects, and their memory is freed."""
    source, other = peers(2)
    right = 0
    for seed in range(rounds):
        made = [source.make.remote(seed, [nbytes]) for _ in range(3)]
        ray.wait(made, num_returns=3)
        (victim,) = new_peers(1)
        pid = ray.get(victim.pid.remote())
        for each in made:
            victim.check.remote(each, seed, [nbytes])
        time.sleep(0.02 * seed)  # another moment each time
        os.kill(pid, signal.SIGKILL)
        right += sum(ray.get([other.check.remote(each, seed, [nbytes]) for each in made]))
        del made, each
        ray.kill(victim)
    state = statistics_after(source, 0)
    idle.extend((source, other))
    return {"right": right, "state": state}


def killed_sender() -> dict[str, Any]:
    """A sender is killed: what receivers get that have read from it before, and that have not; and the driver."""
    source, acquainted, stranger = *peers(2), *new_peers(1)
    first, second, third = (source.make.remote(seed, [1 << 20]) for seed in range(3))
    ray.get(acquainted.check.remote(first, 0, [1 << 20]))
    ray.wait([second, third], num_returns=2)
    os.kill(ray.get(source.pid.remote()), signal.SIGKILL)
    found = {
        "acquainted": outcome(acquainted.check.remote(second, 1, [1 << 20])),
        "stranger": outcome(stranger.check.remote(third, 2, [1 << 20])),
    }
    begun = time.monotonic()
    try:
        ray.get(third)
    except Exception as error:
        found["driver"] = failure(error, begun)
    end(source)
    idle.extend((acquainted, stranger))
    return found


def has_other_pid(actor: Any, pid: int) -> bool:
    """Whether Ray has restarted the actor."""
    try:
        return ray.get(actor.pid.remote()) != pid
    except ray.exceptions.ActorUnavailableError:
        return False


def restarted() -> dict[str, Any]:
    """Sender and receiver are killed and restarted by Ray."""
    source, receiver = peers(2)
    size = [4096]
    old = source.make.remote(1, size)
    ray.get(receiver.check.remote(old, 1, size))
    for each in (source, receiver):
        pid = ray.get(each.pid.remote())
        os.kill(pid, signal.SIGKILL)
        wait_until(partial(has_other_pid, each, pid), "the restart of an actor", BOUND, pause=0.05)
    found = {
        "new": outcome(receiver.check.remote(source.make.remote(2, size), 2, size)),
        "old": outcome(receiver.check.remote(old, 1, size)),
    }
    end(source, receiver)
    return found


def killed_owner() -> dict[str, Any]:
    """The owner of a reference is killed, which is not the process that has the object."""
    source, owner = peers(2)
    ray.get(owner.own.remote(source))
    before = ray.get(source.statistics.remote())["held"]
    os.kill(ray.get(owner.pid.remote()), signal.SIGKILL)
    holds_within(3.0, lambda: ray.get(source.statistics.remote())["held"] < before, pause=0.05)
    after = ray.get(source.statistics.remote())["held"]
    end(source, owner)
    return {"before": before, "after": after}


def stopped_sender(wait: float) -> dict[str, Any]:
    """A sender does not answer: Ray aborts the reception of an actor; `ray.get` in the driver has a timeout."""
    source, other, receiver = *new_peers(1), *peers(2)
    size = [1 << 20]
    made, another = source.make.remote(1, size), other.make.remote(2, size)
    ray.wait([made, another], num_returns=2)
    pid = ray.get(source.pid.remote())
    os.kill(pid, signal.SIGSTOP)
    receiver.busy.remote(wait)  # Ray's own wait for the object begins later, and so does not end before the abort
    found = {"actor": outcome(receiver.check.remote(made, 1, size))}
    found["aborted"] = ray.get(receiver.statistics.remote())["aborted"]
    found["other"] = outcome(receiver.check.remote(another, 2, size))
    before = transport_statistics().aborted
    begun = time.monotonic()
    try:
        ray.get(made, timeout=1.0)
    except Exception as error:
        found["driver"] = failure(error, begun)
    holds_within(BOUND, lambda: transport_statistics().aborted > before)
    found["driver_aborted"] = transport_statistics().aborted - before
    os.kill(pid, signal.SIGCONT)
    found["continued"] = outcome(receiver.check.remote(made, 1, size))
    idle.extend((source, other, receiver))
    return found


def full() -> dict[str, Any]:
    """Half of the capacity three times: the third `make` waits for room."""
    source, receiver = peers(2)
    half = transport_statistics().store.capacity_bytes // 2 - 4096
    made = [source.make.remote(seed, [half]) for seed in range(2)]
    found = {"full": outcome(receiver.check.remote(source.make.remote(2, [half]), 2, [half]))}
    waiting = source.make.remote(3, [half])
    right = receiver.check.remote(waiting, 3, [half])
    found["early"] = bool(ray.wait([right], timeout=0.2)[0])
    del made[0]
    found["room"] = outcome(right)
    idle.extend((source, receiver))
    return found


def aborted_bytes(nbytes: int, after: int) -> dict[str, Any]:
    """A reception over TCP is aborted after some of the bytes, beside one that continues.

    Without actors: a proxy between the two ends does not pass on the rest.
    """
    secret_file = Path(os.environ["HOME"], "secret")
    secret_file.write_bytes(os.urandom(32))
    settings = Settings(listen=("tcp://{node}:0",), secret_file=str(secret_file))
    kind = type("Tcp", (DrayTransport,), {"settings": settings})
    sender, receiver = kind(), kind()
    tensors = [content(1, 0, nbytes)]
    about = sender.extract_tensor_transport_metadata("object", tensors)
    token = Token.decode(about.token)
    (served,) = [each for each in token.ref.endpoints if each.startswith("tcp")]
    host, _, port = served.removeprefix("tcp:").rpartition(":")
    passed = threading.Event()

    def proxy(listener: socket.socket, most: int) -> None:
        near, _ = listener.accept()
        with near, socket.create_connection((host, int(port))) as far:
            threading.Thread(target=pump, args=(near, far, 1 << 40), daemon=True).start()
            pump(far, near, most)
            passed.set()
            threading.Event().wait(BOUND)

    def pump(source: socket.socket, sink: socket.socket, most: int) -> None:
        try:
            while most > 0 and (data := source.recv(65536)):
                sink.sendall(data)
                most -= len(data)
        except OSError:
            return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=proxy, args=(listener, after), daemon=True).start()
        stalled = replace(about, token=replace(token, ref=replace(token.ref, endpoints=(endpoint,))).encode())
        fetch = receiver.fetch_multiple_tensors("object", stalled, None)
        assert passed.wait(BOUND)
        begun = time.monotonic()
        receiver.abort_transport("object", None)
        try:
            receiver.wait_fetch_complete(fetch, timeout=BOUND)
            found: dict[str, Any] = {}
        except Exception as error:
            found = failure(error, begun)
    (got,) = receiver.recv_multiple_tensors("object", about, None)
    sender.garbage_collect("object", about, tensors)
    return {"aborted": found, "right": same_bits(got, tensors[0])}


def latencies(rounds: list[int]) -> dict[str, dict[str, float]]:
    """See `ray_latency`."""
    return ray_latency.measure(rounds)
