"""A tensor transport for Ray Direct Transport (RDT): `register_dray_transport`.

```python
register_dray_transport()


@ray.remote(enable_tensor_transport=True)
class Rollout:
    @ray.method(tensor_transport="dray")
    def episode(self):
        return {"observations": torch.rand(200, 4), "task": "cartpole"}


trainer.step.remote(rollout.episode.remote())
```

A process that returns or puts tensors copies them into shared memory of its own at once. A receiver gets what they
were then, in tensors of its own. The memory is freed when Ray has found that no reference to the object is left:
docs/how-to/ray.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

from dray.errors import ConfigError, MissingDependencyError, PayloadFormatError
from dray.integrations.abortable_reads import AbortableRead, AbortableReads
from dray.integrations.store import PayloadStore, StoreStatistics
from dray.payload import Array
from dray.streams.addresses import ListenOn

try:
    import ray
    import torch
    from ray.experimental import (
        CommunicatorMetadata,
        TensorTransportManager,
        TensorTransportMetadata,
        register_tensor_transport,
    )
    from ray.experimental.rdt.tensor_transport_manager import FetchRequest
    from ray.experimental.rdt.util import get_tensor_transport_manager
except ImportError as error:
    raise MissingDependencyError("ray", "dray.integrations.ray", "'dray-rl[ray]'") from error

NAME: Final = "DRAY"
"""What ``tensor_transport=`` names; Ray does not distinguish upper and lower case."""

_CARRIERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element: as what its bits are carried."""


@dataclass(frozen=True)
class Settings:
    """The arguments of `register_dray_transport`, which Ray hands on to actors with the class of the transport."""

    capacity_bytes: int = 4 << 30
    slots: int = 2048
    timeout: float = 30.0
    listen: tuple[str, ...] = ()
    secret_file: str | None = None

    def store(self) -> PayloadStore:
        """A store of this process. It opens nothing before it is used."""
        node = ray.util.get_node_ip_address() if self.listen else ""
        return PayloadStore(
            capacity_bytes=self.capacity_bytes,
            slots=self.slots,
            listen=[text.replace("{node}", node) for text in self.listen],
            secret=None if self.secret_file is None else Path(self.secret_file).read_bytes(),
            put_timeout=self.timeout,
        )


def register_dray_transport(
    *,
    capacity_bytes: int = Settings.capacity_bytes,
    slots: int = Settings.slots,
    timeout: float = Settings.timeout,
    listen: str | Sequence[str] = (),
    secret_file: str | None = None,
) -> None:
    """Let ``tensor_transport="dray"`` be used in this process, and in the actors that it makes from now on.

    A second call in a process changes nothing. Ray does not register a transport in an actor that it restarts, nor
    in those that other actors make: this function does, as `worker_process_setup_hook` of the job.

    Args:
        capacity_bytes: bytes that the objects of one process may have together.
        slots: how many objects these may be. One object may have 2 TiB divided by `slots`, or `capacity_bytes`.
        timeout: seconds that a sender waits for room, and a receiver for the bytes of an object.
        listen: for receivers on other nodes: where each process listens, ``"tcp://{node}:0"``, ``"ucx://{node}:0"``
            or both; ``{node}`` stands for the address of the node.
        secret_file: a file with the secret of all processes, on each node: 16 or more random bytes. `listen` needs
            it.

    Raises:
        ConfigError: an argument is not allowed.
    """
    addresses = (listen,) if isinstance(listen, str) else tuple(listen)
    if addresses and secret_file is None:
        raise ConfigError("secret_file", None, "the path of a file with a secret, because of `listen`")
    if timeout.__class__ not in (int, float) or not timeout > 0:
        raise ConfigError("timeout", timeout, "more than 0 seconds")
    settings = Settings(capacity_bytes, slots, timeout, addresses, secret_file)
    ListenOn.parse([text.replace("{node}", "127.0.0.1") for text in addresses])
    PayloadStore(capacity_bytes=capacity_bytes, slots=slots).close()
    # It is pickled with its attributes, because no module has it: so actors get the settings.
    configured = type("ConfiguredDrayTransport", (DrayTransport,), {"settings": settings})
    try:
        register_tensor_transport(NAME, ["cpu"], configured, torch.Tensor)
    except ValueError:  # the name is registered; Ray offers no other way to find that out
        return


def transport_statistics() -> RayStatistics:
    """What the transport of this process has done: of an actor, where one of its methods calls this.

    Raises:
        ValueError: the transport is not registered in this process.
    """
    transport: DrayTransport = get_tensor_transport_manager(NAME)
    return transport.statistics()


@dataclass(frozen=True, slots=True)
class RayStatistics:
    """The transport of one process at one moment.

    Attributes:
        store: the objects that this process has put, and their memory; `store.cleared` are those that were freed.
        held: objects that were put and are not freed: references to them exist.
        received: objects that were received.
        aborted: receptions that Ray has aborted, or that a `ray.get` with a timeout has given up.
    """

    store: StoreStatistics
    held: int
    received: int
    aborted: int


@dataclass
class DrayMetadata(TensorTransportMetadata):
    """What Ray sends in the place of the tensors.

    Attributes:
        token: where they are; empty if there are none.
    """

    token: str = ""


class DrayFetch(FetchRequest):
    """A reception in a thread. If Ray drops this object before its end, the reception is aborted."""

    def __init__(
        self, obj_id: str, future: Future[list[torch.Tensor]], read: AbortableRead[list[torch.Tensor]]
    ) -> None:
        super().__init__(obj_id, [])
        self.future = future
        self._read = read

    def __del__(self) -> None:
        if not self.future.done():
            self._read.abort()


class DrayTransport(TensorTransportManager):
    """The transport of a process, which Ray makes, and whose methods Ray calls from several threads."""

    settings: ClassVar[Settings] = Settings()

    def __init__(self) -> None:
        self._store = self.settings.store()
        self._tokens: dict[str, str] = {}
        self._reads: AbortableReads[list[torch.Tensor]] = AbortableReads(self.settings.store)

    def statistics(self) -> RayStatistics:
        """See `transport_statistics`."""
        return RayStatistics(self._store.statistics(), len(self._tokens), self._reads.done, self._reads.aborted)

    # --- what it can do ---------------------------------------------------------------------------------------

    def tensor_transport_backend(self) -> str:
        return NAME

    @staticmethod
    def is_one_sided() -> bool:
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        return True

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        return True

    def get_communicator_metadata(
        self, src_actor: Any, dst_actor: Any, backend: str | None = None
    ) -> CommunicatorMetadata:
        return CommunicatorMetadata()

    # --- the sender -------------------------------------------------------------------------------------------

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: Sequence[torch.Tensor]) -> DrayMetadata:
        about = [(tensor.shape, tensor.dtype) for tensor in rdt_object]
        if not about:
            return DrayMetadata(about)
        token = self._tokens.get(obj_id)
        if token is None:  # else Ray has called the method twice, and keeps the tensors of the first call
            arrays = {str(index): to_array(tensor) for index, tensor in enumerate(rdt_object)}
            token = self._tokens[obj_id] = self._store.put(arrays)
        return DrayMetadata(about, "cpu", token)

    def garbage_collect(self, obj_id: str, tensor_transport_meta: Any, tensors: Any) -> None:
        token = self._tokens.pop(obj_id, None)
        if token is not None:
            self._store.clear([token])

    def send_multiple_tensors(
        self, tensors: Any, tensor_transport_metadata: Any, communicator_metadata: Any
    ) -> None:
        raise NotImplementedError("receivers read by themselves: this is a one-sided transport")

    # --- the receiver -----------------------------------------------------------------------------------------

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: DrayMetadata,
        communicator_metadata: Any,
        target_buffers: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        return self._read(obj_id, tensor_transport_metadata, target_buffers).run()

    def fetch_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: DrayMetadata,
        communicator_metadata: Any,
        target_buffers: Sequence[torch.Tensor] | None = None,
    ) -> DrayFetch:
        read = self._read(obj_id, tensor_transport_metadata, target_buffers)
        return DrayFetch(obj_id, read.start(), read)

    def wait_fetch_complete(self, fetch_request: DrayFetch, timeout: float = -1) -> list[torch.Tensor]:
        return fetch_request.future.result(None if timeout < 0 else timeout)

    def abort_transport(self, obj_id: str, communicator_metadata: Any) -> None:
        self._reads.abort(obj_id)

    def _read(
        self, obj_id: str, about: DrayMetadata, buffers: Sequence[torch.Tensor] | None
    ) -> AbortableRead[list[torch.Tensor]]:
        return self._reads.read(obj_id, partial(_receive, about, buffers), self.settings.timeout)


def _receive(
    about: DrayMetadata, buffers: Sequence[torch.Tensor] | None, store: PayloadStore, timeout: float
) -> list[torch.Tensor]:
    """The tensors of an object: `buffers`, if there are any, else new ones."""
    if not about.token:
        return []
    if buffers is None:
        return _tensors(store.get([about.token], timeout=timeout)[0], about)
    for values in store.views([about.token], timeout=timeout):
        for buffer, tensor in zip(buffers, _tensors(values, about), strict=True):
            buffer.copy_(tensor)
    return list(buffers)


def to_array(tensor: torch.Tensor) -> Array:
    """The bits of a tensor, as integers of its shape; a complex tensor has one dimension more.

    Raises:
        PayloadFormatError: the tensor is sparse, nested or quantized.
        ConfigError: it is not on the CPU.
    """
    if tensor.device.type != "cpu":
        raise ConfigError("tensor.device", str(tensor.device), "cpu; return or put tensor.cpu()")
    if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
        raise PayloadFormatError(f"a tensor that is {kind} cannot be carried; only dense ones can")
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    array: Array = plain.view(_CARRIERS[plain.element_size()]).numpy()
    return array


def _tensors(values: Mapping[str, Array], about: DrayMetadata) -> list[torch.Tensor]:
    """The tensors whose bits these arrays are, in their memory."""
    tensors = []
    for index, (_, dtype) in enumerate(about.tensor_meta):
        bits = torch.from_numpy(values[str(index)])
        complex_ = dtype.is_complex
        tensors.append(torch.view_as_complex(bits.view(dtype.to_real())) if complex_ else bits.view(dtype))
    return tensors
