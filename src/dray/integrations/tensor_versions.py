"""Versions of a model of any size: named tensors, which come one by one, as one version of a `Publisher`.

```python
with TensorPublisher("policy") as publisher:                    # the trainer
    with publisher.version(step=7) as add:
        for name, tensor in model.named_parameters():
            add(name, tensor)

with TensorSubscriber(publisher.place) as subscriber:           # a rollout, with the place that it was handed
    for bucket in subscriber.buckets():
        load(bucket)                                            # [(name, tensor), …]
```

A tensor is copied once, to its place in memory that all receivers of the host map. The first version is put
together in private memory, because its size is not known before; so is one whose tensors differ from those of the
version before. Versions are made of buckets: on another host a receiver holds one bucket at a time, and with
``delta="sparse"`` a whole version.

The fields of a version are `about` (its step), a field of bytes for each bucket, and `index`: JSON with a list for
each bucket of name, dtype, shape, offset and size of each tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from dray.clock import Deadline
from dray.errors import ConfigError, MissingDependencyError, PayloadFormatError, StreamError
from dray.payload import Array, TensorSpec, torch_interop
from dray.private_directory import own_root
from dray.protocol.handshake import make_secret
from dray.resources import Closing
from dray.streams import Publisher, Subscriber, Weights
from dray.streams.registry import default_scope
from dray.streams.weights import DeltaMode
from dray.text import printable_value

try:
    import torch
except ImportError as error:
    raise MissingDependencyError("torch", "dray.integrations.tensor_versions", "'dray-rl[torch]'") from error

SECRET_VARIABLE: Final = "DRAY_SECRET_FILE"
"""The environment variable with the path of a file that has the secret for other hosts."""

_ALIGNMENT: Final = 64
_ABOUT: Final = "about"
_INDEX: Final = "index"
_ABOUT_WORDS: Final = _ALIGNMENT // 8  # so that the buckets, which follow it, are aligned
_NO_STEP: Final = -1

Bucket: TypeAlias = "list[tuple[str, torch.Tensor]]"
"""Tensors by name."""


class Secret(bytes):
    """A secret that is not shown."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<secret>"


class Place(NamedTuple):
    """Where the versions of a publisher are. It can be pickled.

    Attributes:
        name, scope: of the stream, for processes of the same user and host.
        host: names the user's folder of streams on the publisher's host.
        addresses: for other hosts.
        secret: what subscribers there must know; None if they have it from a file.
        version: the number of the newest version when this was made.
    """

    name: str
    scope: str
    host: str
    addresses: tuple[str, ...]
    secret: Secret | None
    version: int


class Entry(NamedTuple):
    """A tensor in a bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Changed(Exception):
    """The tensors differ from those of the version before."""


def this_host() -> str:
    """Names the folder in which streams of this user are found on this host."""
    folder = own_root().stat()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {folder.st_dev} {folder.st_ino}"


def read_secret(path: str | None) -> Secret | None:
    """The secret in a file, by default in that which ``$DRAY_SECRET_FILE`` names; None if there is none.

    Raises:
        ConfigError: the file cannot be read.
    """
    chosen = path or os.environ.get(SECRET_VARIABLE)
    if not chosen:
        return None
    try:
        return Secret(Path(chosen).read_bytes())
    except OSError as error:
        raise ConfigError("secret_file", chosen, f"a file that can be read ({error.strerror})") from error


class _Packing:
    """Gives each tensor its place in the buckets of a version.

    Args:
        bucket_bytes: the size limit of a bucket; a larger tensor has one of its own.
        expected: the index of the version before; its tensors have the same places if they come in the same order.
        arrays: the fields of the next version, in place; empty if there are none.
    """

    def __init__(self, bucket_bytes: int, expected: Sequence[Entry], arrays: dict[str, Array]) -> None:
        self.index: list[list[Entry]] = []
        self.memory: list[Array] = []
        self.used = 0
        self.in_place = bool(arrays)
        self._bucket_bytes = bucket_bytes
        self._expected = expected
        self._arrays = arrays
        self._count = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor to its place.

        Raises:
            _Changed: another one was expected there; `leave` and add it again.
        """
        flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        nbytes = flat.numel()
        fits = bool(self.index) and self.used + nbytes <= self._bucket_bytes
        offset = self.used if fits else 0
        entry = Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset, nbytes)
        if self.in_place and (self._count == len(self._expected) or self._expected[self._count] != entry):
            raise _Changed
        if not fits:
            self.index.append([])
            self.memory.append(self._arrays[_bucket(len(self.memory))] if self.in_place else self._private(nbytes))
        self.index[-1].append(entry)
        self._count += 1
        self.used = -(-(offset + nbytes) // _ALIGNMENT) * _ALIGNMENT
        if nbytes:
            torch.from_numpy(self.memory[-1][offset : offset + nbytes]).copy_(flat)

    def _private(self, nbytes: int) -> Array:
        return np.empty(-(-max(self._bucket_bytes, nbytes) // _ALIGNMENT) * _ALIGNMENT, np.uint8)

    def leave(self) -> None:
        """Continue in private memory."""
        if self.in_place:
            self.in_place = False
            copies = [self._private(len(array)) for array in self.memory]
            for copy, array in zip(copies, self.memory, strict=True):
                copy[: len(array)] = array
            self.memory = copies

    @property
    def complete(self) -> bool:
        """All that was expected has come."""
        return self._count == len(self._expected)

    def sizes(self) -> list[int]:
        """How many bytes of each bucket are used."""
        ends = [entries[-1].offset + entries[-1].nbytes for entries in self.index]
        return [-(-end // _ALIGNMENT) * _ALIGNMENT for end in ends]


class TensorPublisher(Closing):
    """Publishes versions of named tensors.

    Host memory is `versions` times the bytes of the tensors, and once more while a version is put together in
    private memory.

    Args:
        name: of the stream; by default a new one.
        bucket_bytes: how many bytes a receiver on another host holds at a time; a larger tensor is held whole.
        versions, delta, listen: as for `dray.Publisher`.
        secret: what receivers on other hosts must know; without one, with `listen`, one is made, and is a part of
            `place`.
        timeout: seconds that a version waits for receivers that use an older one; None for no limit.

    Raises:
        ConfigError: an argument is not allowed.
    """

    def __init__(
        self,
        name: str = "",
        *,
        bucket_bytes: int = 1 << 30,
        versions: int = 2,
        delta: DeltaMode = "full",
        listen: str | Sequence[str] = (),
        secret: bytes | None = None,
        timeout: float | None = 300.0,
    ) -> None:
        if bucket_bytes.__class__ is not int or bucket_bytes < 1:
            raise ConfigError("bucket_bytes", bucket_bytes, "an integer of 1 or more")
        self._bucket_bytes = bucket_bytes
        self._timeout = timeout
        self._made_secret = Secret(make_secret()) if listen and secret is None else None
        self._expected: list[Entry] = []
        self._fields: dict[str, TensorSpec] = {}
        self._index = b""
        self._publisher = Publisher(
            name or f"tensors-{secrets.token_hex(8)}", scope=default_scope(), versions=versions, delta=delta,
            listen=listen, secret=secret or self._made_secret,
        )  # fmt: skip

    @property
    def place(self) -> Place:
        """Where subscribers find the versions."""
        publisher = self._publisher
        return Place(
            publisher.name, publisher.scope, this_host(), publisher.addresses, self._made_secret, publisher.version
        )

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors of the newest version."""
        return sum(entry.nbytes for entry in self._expected)

    @contextlib.contextmanager
    def version(self, step: int | None = None) -> Iterator[Callable[[str, torch.Tensor], None]]:
        """The block adds the tensors of the next version, which is published at its end.

        After an exception in the block there is no version. A tensor may be changed once it is added.

        Args:
            step: a number that receivers can ask for, of 0 or more.

        Raises:
            BufferFullError: a receiver is still using an older version; the message names its process.
            PayloadError: the tensors cannot be carried.
        """
        about = np.full(_ABOUT_WORDS, _NO_STEP if step is None else step, np.int64)
        with contextlib.ExitStack() as writing:
            arrays: dict[str, Array] = {}
            if self._fields:
                arrays = writing.enter_context(self._publisher.writing(self._fields, timeout=self._timeout))
            packing = _Packing(self._bucket_bytes, self._expected, arrays)

            def leave() -> None:
                packing.leave()
                arrays.clear()
                with contextlib.suppress(_Changed), writing.pop_all():
                    raise _Changed

            def add(name: str, tensor: torch.Tensor) -> None:
                try:
                    packing.add(name, tensor)
                except _Changed:
                    leave()
                    packing.add(name, tensor)

            yield add
            if packing.in_place and not packing.complete:
                leave()
            if packing.in_place:
                arrays[_ABOUT][...] = about
                arrays[_INDEX][...] = np.frombuffer(self._index, np.uint8)
                return
        index = json.dumps(packing.index, separators=(",", ":")).encode()
        sizes = packing.sizes()
        fields = {_ABOUT: about}
        for number, (memory, size) in enumerate(zip(packing.memory, sizes, strict=True)):
            fields[_bucket(number)] = memory[:size]
        fields[_INDEX] = np.frombuffer(index, np.uint8)
        self._publisher.publish(fields, timeout=self._timeout)
        self._index = index
        self._expected = [entry for entries in packing.index for entry in entries]
        self._fields = {name: TensorSpec.of(array.dtype, array.shape) for name, array in fields.items()}

    def close(self) -> None:
        """End the stream. Tensors that receivers hold stay valid. Twice is fine."""
        self._publisher.close()


class TensorSubscriber(Closing):
    """Gets versions of named tensors.

    Args:
        place: where they are.
        secret: the secret for another host, if `place` does not have it.
        delta: what the publisher sends, as for `TensorPublisher`.

    Raises:
        ConfigError: the publisher is on another host, or of another user, and does not listen there.
    """

    def __init__(self, place: Place, *, secret: bytes | None = None, delta: DeltaMode = "full") -> None:
        self._place = place
        self._local = place.host == this_host()
        self._secret = place.secret or secret
        if not self._local and not place.addresses:
            allowed = "an address, because a receiver is on another host than the publisher, or of another user"
            raise ConfigError("listen", None, allowed, "is missing")
        self._whole = self._local or delta == "sparse"
        self._newest = self._subscriber(None if self._whole else (_ABOUT, _INDEX))

    def _subscriber(self, fields: tuple[str, ...] | None) -> Subscriber:
        place = self._place
        if self._local:
            return Subscriber(place.name, scope=place.scope, fields=fields)
        return Subscriber(place.addresses[0], secret=self._secret, fields=fields)

    def buckets(
        self, *, after: int | None = None, step: int | None = None, timeout: float | None = 300.0
    ) -> Iterator[Bucket]:
        """The tensors of the newest version, bucket by bucket. They must not be written to.

        On the publisher's host they are in its memory, which is not used again while one of them is there.

        Args:
            after: wait for a version with a higher number.
            step: what the version must have as its step.
            timeout: seconds for each bucket; None for no limit.

        Raises:
            StreamTimeout: no version came in time.
            StreamError: it has another step, or was replaced by a newer one while it was read.
            TransportError: a part of it could not be read in time.
        """
        weights = self._newest.newest(after=after, timeout=timeout)
        version = weights.version
        about = int(weights[_ABOUT][0])
        if step is not None and about != step:
            raise StreamError(f"version {version} of {self._place.name!r} is of step {about}, not of step {step}")
        index = _parsed(bytes(weights[_INDEX]))
        for number, entries in enumerate(index):
            yield _tensors(self._part(weights, _bucket(number), timeout), entries)

    def _part(self, weights: Weights, field: str, timeout: float | None) -> torch.Tensor:
        deadline = Deadline.after(timeout)
        if field not in weights:
            with self._subscriber((field,)) as subscriber:
                part = subscriber.newest(after=weights.version - 1, timeout=deadline.timeout)
            if (part.version, part.publisher) != (weights.version, weights.publisher):
                why = f"version {weights.version} was replaced by version {part.version} while it was read"
                raise StreamError(f"{self._place.name!r}: {why}")
            weights = part
        return torch.from_numpy(torch_interop.writable_alias(weights[field]))

    def close(self) -> None:
        """End the subscription; it is noticed in a call that waits. Tensors stay valid. Twice is fine."""
        self._newest.close()


def _bucket(number: int) -> str:
    return f"bucket-{number}"


def _parsed(index: bytes) -> list[list[Entry]]:
    try:
        found = [
            [Entry(name, dtype, tuple(shape), offset, nbytes) for name, dtype, shape, offset, nbytes in entries]
            for entries in json.loads(index)
        ]
    except (ValueError, TypeError) as error:
        raise PayloadFormatError(f"the index of a version is not valid: {error}") from error
    return found


def _tensors(memory: torch.Tensor, entries: Sequence[Entry]) -> Bucket:
    found = []
    for entry in entries:
        dtype: Any = getattr(torch, entry.dtype, None)
        part = memory[entry.offset : entry.offset + entry.nbytes]
        if not isinstance(dtype, torch.dtype) or part.numel() != entry.nbytes:
            raise PayloadFormatError(f"tensor {printable_value(entry.name)} does not fit its bucket: {entry}")
        found.append((entry.name, part.view(dtype).view(entry.shape)))
    return found
