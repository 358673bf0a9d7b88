"""Payloads that contain their identity: made by producers, checked byte for byte by consumers.

Most are images of two arrays, some are raw bytes. An image holds its identity (producer, sequence, size, seed) and
a checksum of its own beside the body; of raw bytes, which may be none at all, everything follows from the identity
that the reference names.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from soak.ledger import Wrong

from dray.payload import plan
from dray.protocol import PayloadRef

_SMALL = (0, 1, 7, 63, 64, 65)
_IMAGE_OVERHEAD = 512  # more than the header and the identity take


@dataclass(frozen=True, slots=True)
class Content:
    """A payload before it has a slot: raw bytes, or an image around a body of `body` bytes."""

    nbytes: int
    body: int | None

    @classmethod
    def draw(cls, rng: random.Random, most: int) -> Content:
        """A payload of a size from 0 to `most` bytes; small ones and full slots come often."""
        if rng.random() < 0.2:
            return cls(min(most, rng.choice(_SMALL)), None)
        nbytes = most if rng.random() < 0.05 else int(most ** rng.uniform(0.3, 1.0))
        if nbytes < 2 * _IMAGE_OVERHEAD or rng.random() < 0.2:
            return cls(nbytes, None)
        body = nbytes - _IMAGE_OVERHEAD
        return cls(_image(bytes(16), 0, body).nbytes, body)

    @property
    def raw(self) -> bool:
        return self.body is None

    def write(self, target: memoryview, producer: bytes, sequence: int) -> None:
        """Fill `target`, of `nbytes` bytes, for the payload that got this sequence number."""
        if self.body is None:
            target[:] = _pattern(_seed(producer, sequence), self.nbytes).data
        else:
            _image(producer, sequence, self.body).write(target)


def check_raw(ref: PayloadRef, found: np.ndarray[Any, Any]) -> Wrong | None:
    """What is wrong with the bytes read for `ref`."""
    if found.nbytes != ref.nbytes:
        return Wrong.SIZE
    expected = _pattern(_seed(*ref.identity), ref.nbytes)
    return None if np.array_equal(found, expected) else Wrong.BYTES


def check_arrays(ref: PayloadRef, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Wrong | None:
    """What is wrong with the arrays read for `ref`. Keeps no reference to them."""
    if set(arrays) != {"body", "identity"}:
        return Wrong.IDENTITY
    identity = arrays["identity"]
    if not np.array_equal(identity[:6], _identity(ref.producer, ref.sequence, arrays["body"].nbytes)):
        return Wrong.IDENTITY
    body = arrays["body"]
    if _image(ref.producer, ref.sequence, body.nbytes).nbytes != ref.nbytes:
        return Wrong.SIZE
    if xxhash.xxh3_64_intdigest(np.ascontiguousarray(body).data) != int(identity[6]):
        return Wrong.CHECKSUM
    return None if np.array_equal(body, _pattern(int(identity[5]), body.nbytes)) else Wrong.BYTES


def _image(producer: bytes, sequence: int, body: int) -> Any:
    identity = np.zeros(8, np.uint64)
    identity[:6] = _identity(producer, sequence, body)
    content = _pattern(int(identity[5]), body)
    identity[6] = xxhash.xxh3_64_intdigest(content.data)
    return plan({"identity": identity, "body": content})


def _identity(producer: bytes, sequence: int, body: int) -> list[int]:
    halves = [int.from_bytes(producer[:8], "little"), int.from_bytes(producer[8:], "little")]
    return [0x4B414F53, *halves, sequence, body, _seed(producer, sequence)]


def _seed(producer: bytes, sequence: int) -> int:
    digest = hashlib.blake2b(producer + sequence.to_bytes(8, "little"), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _pattern(seed: int, nbytes: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8)
