"""Converts NumPy arrays to torch tensors and back, on the host or on a device. No other module of dray uses torch.

The functions that make tensors import torch when they are called. `is_tensor` imports nothing: without an imported
torch, no value can be a tensor.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from dray.errors import ConfigError, MissingDependencyError, PayloadFormatError
from dray.payload.ragged import map_arrays

if TYPE_CHECKING:
    import torch

    from dray.payload.schema import Array

pageable_warnings = itertools.count()
"""Counts the attempts to warn that page-locked memory is not available; the first one logs."""

_log = logging.getLogger("dray.payload")

# torch cannot convert these dtypes: torch name → (dtype of the same size that it can convert, NumPy dtype).
_CARRIERS: Mapping[str, tuple[str, np.dtype[Any]]] = {
    "bfloat16": ("int16", np.dtype(ml_dtypes.bfloat16)),
    "float8_e4m3fn": ("uint8", np.dtype(ml_dtypes.float8_e4m3fn)),
    "float8_e5m2": ("uint8", np.dtype(ml_dtypes.float8_e5m2)),
}
_TORCH_NAMES = {dtype: name for name, (_, dtype) in _CARRIERS.items()}


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_jagged(value: object) -> bool:
    """Whether `value` is a nested tensor of torch's jagged layout."""
    torch = sys.modules.get("torch")
    return (
        torch is not None and isinstance(value, torch.Tensor) and value.is_nested and value.layout is torch.jagged
    )


def jagged_parts(tensor: Any) -> tuple[Array, Array]:
    """The values of a jagged nested tensor, row after row without gaps, and the offsets of its rows.

    Raises:
        PayloadFormatError: its rows differ in another dimension than the first.
    """
    if isinstance(tensor.size(1), int):  # the length of the dimension in which rows differ is no number
        raise PayloadFormatError(
            "a jagged tensor whose rows differ in another dimension than the first cannot be carried; transpose it"
        )
    rows = [to_numpy(row) for row in tensor.unbind()] if tensor.lengths() is not None else None
    if rows is None:
        return to_numpy(tensor.values()), to_numpy(tensor.offsets())
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


def to_jagged(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The jagged nested tensor of these values and offsets, which it shares."""
    nested: torch.Tensor = _torch().nested.nested_tensor_from_jagged(values, offsets)
    return nested


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return the values of `tensor`, which may be on any device and have a gradient, as a NumPy array.

    A dense tensor on the host is not copied. bfloat16 and 8-bit floats become dtypes of `ml_dtypes`.

    Raises:
        TypeError, RuntimeError: torch cannot make an array of the tensor (sparse, quantised, …).
    """
    pytorch = _torch()
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    for name, (carrier, dtype) in _CARRIERS.items():
        if plain.dtype is getattr(pytorch, name):
            bits: Array = plain.view(getattr(pytorch, carrier)).numpy()
            return bits.view(dtype)
    array: Array = plain.numpy()
    return array


def to_torch(
    values: Mapping[str, Any], device: str | torch.device | None = None, *, pin: bool = False
) -> dict[str, Any]:
    """Return the values with writable torch tensors in the place of arrays, and jagged ones in that of `Ragged`.

    On the host, a writable contiguous array shares its memory with its tensor. Any other array is copied, so no
    tensor writes into a leased payload. On another device every tensor is a copy. Text and numbers stay.

    Args:
        values: name → array of any dtype that a payload can carry, or another value of a payload.
        device: device of the tensors; ``None`` is the host.
        pin: copy through page-locked memory. On the host the tensors stay in it; a copy to another device
            overlaps with the host's work. Without page-locked memory, pageable memory is used, with one warning.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    target = _torch().device("cpu" if device is None else device)

    def convert(array: Array) -> torch.Tensor:
        if pin:
            staged = _pinned_copy(array)
            return staged if target.type == "cpu" else staged.to(target, non_blocking=True)
        if target.type == "cpu":
            return _tensor_on(
                array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
            )
        return _tensor_on(writable_alias(np.ascontiguousarray(array))).to(target)

    tensors: dict[str, Any] = map_arrays(
        values, convert, lambda rows: to_jagged(convert(rows.values), convert(rows.offsets))
    )
    return tensors


def check_device(setting: str, device: str) -> None:
    """Raise `ConfigError` unless torch knows `device`, and `MissingDependencyError` without torch."""
    pytorch = _torch()
    try:
        pytorch.device(device)
    except RuntimeError as error:
        raise ConfigError(setting, device, f"a device of torch ({error})") from error


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise MissingDependencyError("torch", "torch interop", "'dray-rl[torch]'") from error


def _pinned_copy(array: Array) -> torch.Tensor:
    pytorch = _torch()
    known, name = _known_to_torch(array)
    dtype = pytorch.from_numpy(np.empty(0, known.dtype)).dtype
    # torch keeps freed page-locked blocks and uses them again when no copy to a device needs them.
    try:
        copy: torch.Tensor = pytorch.empty(array.shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        if next(pageable_warnings) == 0:  # one step of the interpreter: no other thread gets 0 as well
            _log.warning("page-locked memory is not available; pageable memory is used: %s", error)
        copy = pytorch.empty(array.shape, dtype=dtype)
    np.copyto(copy.numpy(), known)
    return copy if name is None else copy.view(getattr(pytorch, name))


def _tensor_on(array: Array) -> torch.Tensor:
    """A tensor that shares the memory of `array`, which is writable and has no negative strides."""
    pytorch = _torch()
    known, name = _known_to_torch(array)
    tensor: torch.Tensor = pytorch.from_numpy(known)
    return tensor if name is None else tensor.view(getattr(pytorch, name))


def _known_to_torch(array: Array) -> tuple[Array, str | None]:
    """`array` in native byte order and in a dtype that torch can convert, and the torch dtype to view it as."""
    name = _TORCH_NAMES.get(array.dtype)
    if name is None:
        return array.astype(array.dtype.newbyteorder("="), copy=False), None
    return array.view(_CARRIERS[name][0]), name


class _Alias:
    """Presents the memory of a read-only array as writable, because torch copies from writable arrays only."""

    def __init__(self, array: Array) -> None:
        self.array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def writable_alias(array: Array) -> Array:
    """Return a writable view of `array` to copy from; nothing may write to it."""
    if array.flags.writeable:
        return array
    known, name = _known_to_torch(array)
    alias = np.asarray(_Alias(known))
    return alias if name is None else alias.view(array.dtype)
