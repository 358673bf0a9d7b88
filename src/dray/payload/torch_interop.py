"""Between NumPy arrays and torch tensors, on the host or on a device. The only module of dray that uses torch.

torch is imported by the functions that make tensors, when they are called. Recognising a tensor imports
nothing: where torch has not been imported, no value can be one.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from dray.errors import MissingDependencyError

if TYPE_CHECKING:
    import torch

Array: TypeAlias = npt.NDArray[Any]

_log = logging.getLogger("dray.payload")

# Dtypes that NumPy and torch do not know of each other: torch name → (carrier both know, NumPy dtype).
_CARRIERS: Mapping[str, tuple[str, np.dtype[Any]]] = {
    "bfloat16": ("int16", np.dtype(ml_dtypes.bfloat16)),
    "float8_e4m3fn": ("uint8", np.dtype(ml_dtypes.float8_e4m3fn)),
    "float8_e5m2": ("uint8", np.dtype(ml_dtypes.float8_e5m2)),
}
_TORCH_NAMES = {dtype: name for name, (_, dtype) in _CARRIERS.items()}


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor; imports nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return a NumPy array with the values of `tensor`, from any device, with or without gradient.

    A dense tensor on the host is not copied. bfloat16 and 8-bit floats become the dtypes of `ml_dtypes`.

    Raises:
        TypeError, RuntimeError: torch cannot express the tensor as an array (sparse, quantised, …).
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
    arrays: Mapping[str, Array], device: str | torch.device | None = None, *, pin: bool = False
) -> dict[str, torch.Tensor]:
    """Return the arrays as torch tensors that may be written to.

    On the host, a writable contiguous array shares its memory with its tensor, which keeps it alive; any other
    is copied, so a tensor never writes into a payload that is only lent. On another device the tensor is always
    a copy.

    Args:
        arrays: name → array, of any dtype a payload can carry.
        device: where the tensors go; the host when ``None``.
        pin: go through page-locked memory: the tensors stay there when `device` is the host, and the copy to
            another device overlaps with what the host does next. Where page-locked memory cannot be had, pageable
            memory is used, and a warning logged once.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    pytorch = _torch()
    target = pytorch.device("cpu" if device is None else device)
    tensors = {}
    for name, array in arrays.items():
        if pin:
            staged = _pinned_copy(array)
            tensors[name] = staged if target.type == "cpu" else staged.to(target, non_blocking=True)
        elif target.type == "cpu":
            shared = array if _shareable(array) else np.array(array, order="C")
            tensors[name] = _tensor_on(shared)
        else:
            tensors[name] = _tensor_on(_writable_alias(np.ascontiguousarray(array))).to(target)
    return tensors


def to_tensordict(
    arrays: Mapping[str, Array], device: str | torch.device | None = None, *, pin: bool = False
) -> Any:
    """Return the arrays as a `tensordict.TensorDict` without batch dimensions; for the rest see `to_torch`.

    Raises:
        MissingDependencyError: torch or tensordict is not installed.
    """
    try:
        tensordict = importlib.import_module("tensordict")
    except ImportError as error:
        raise MissingDependencyError("tensordict", "to_tensordict", "tensordict") from error
    return tensordict.TensorDict(to_torch(arrays, device, pin=pin), batch_size=[], device=device)


def host_buffer(nbytes: int, *, pin: bool = True) -> npt.NDArray[np.uint8]:
    """Return `nbytes` of uninitialised host memory to receive a payload into, as a uint8 array.

    Args:
        nbytes: size in bytes.
        pin: page-locked memory, from which devices copy faster. Needs torch and an accelerator; without them the
            memory is pageable, and a warning is logged once.
    """
    if pin:
        try:
            pytorch = _torch()
        except MissingDependencyError as error:
            _warn_pageable(error)
        else:
            buffer: npt.NDArray[np.uint8] = _pinned_empty((nbytes,), pytorch.uint8).numpy()
            return buffer
    return np.empty(nbytes, np.uint8)


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise MissingDependencyError("torch", "staging", "'dray[torch]'") from error


def _pinned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """torch keeps freed page-locked blocks and hands them out again once no device copy uses them."""
    pytorch = _torch()
    try:
        pinned: torch.Tensor = pytorch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        _warn_pageable(error)
        pinned = pytorch.empty(shape, dtype=dtype)
    return pinned


def _pinned_copy(array: Array) -> torch.Tensor:
    pytorch = _torch()
    name = _TORCH_NAMES.get(array.dtype)
    if name is None:
        dtype = pytorch.from_numpy(np.empty(0, array.dtype.newbyteorder("="))).dtype
        copy = _pinned_empty(array.shape, dtype)
        np.copyto(copy.numpy(), array)
        return copy
    carrier, _ = _CARRIERS[name]
    copy = _pinned_empty(array.shape, getattr(pytorch, carrier))
    np.copyto(copy.numpy(), array.view(carrier))
    viewed: torch.Tensor = copy.view(getattr(pytorch, name))
    return viewed


def _tensor_on(array: Array) -> torch.Tensor:
    """A tensor on the memory of `array`, which is writable, without negative strides and in native byte order."""
    pytorch = _torch()
    name = _TORCH_NAMES.get(array.dtype)
    if name is None:
        tensor: torch.Tensor = pytorch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        return tensor
    carrier, _ = _CARRIERS[name]
    bits: torch.Tensor = pytorch.from_numpy(array.view(carrier))
    viewed: torch.Tensor = bits.view(getattr(pytorch, name))
    return viewed


def _shareable(array: Array) -> bool:
    return array.flags.writeable and array.flags.c_contiguous


class _Alias:
    """Shows the memory of a read-only array as writable, so that torch takes it as the source of a copy."""

    def __init__(self, array: Array) -> None:
        self.array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _writable_alias(array: Array) -> Array:
    """For copies to a device only: nothing may ever be written through it."""
    if array.flags.writeable:
        return array
    name = _TORCH_NAMES.get(array.dtype)
    if name is None:
        return np.asarray(_Alias(array))
    carrier, dtype = _CARRIERS[name]
    return np.asarray(_Alias(array.view(carrier))).view(dtype)


_pageable_warned: dict[str, object] = {}


def _warn_pageable(reason: Exception) -> None:
    token = object()
    if _pageable_warned.setdefault("pageable", token) is token:
        _log.warning("page-locked memory cannot be had, pageable memory is used: %s", reason)
