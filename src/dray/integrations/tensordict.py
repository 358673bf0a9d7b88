"""TensorDicts in and out of streams: `from_tensordict` for `Producer.put`, `to_tensordict` for what comes out.

```python
producer.put(from_tensordict(rollout))                          # rollout.py
tensordict = to_tensordict(payload, batch_dims=2)               # train.py
```

The fields of nested TensorDicts get the path as their name: ``"next.observation"``. The batch size is not part of
a payload; `to_tensordict` takes it from the shapes. The package tensordict is needed by `to_tensordict` alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dray.errors import ConfigError, MissingDependencyError, PayloadFormatError
from dray.payload import torch_interop

if TYPE_CHECKING:
    import torch

SEPARATOR = "."


def from_tensordict(tensordict: Mapping[Any, Any], *, separator: str = SEPARATOR) -> dict[str, Any]:
    """The tensors of a TensorDict by path, for `Producer.put`. They are not copied.

    Args:
        tensordict: a TensorDict, a tensor class, or a mapping that is nested in the same way.
        separator: what is put between the keys of a path.

    Raises:
        PayloadFormatError: a key is not a text or contains the separator, or a value is neither a tensor nor an
            array, such as `NonTensorData`.
    """
    fields: dict[str, Any] = {}
    _flatten(tensordict, "", separator, fields)
    return fields


def to_tensordict(
    fields: Mapping[str, Any],
    *,
    batch_dims: int = 0,
    device: str | torch.device | None = None,
    separator: str = SEPARATOR,
) -> Any:
    """A TensorDict of a payload, of a batch of a `PayloadDataset`, or of any arrays or tensors by name.

    Arrays of payloads are copied. Tensors are shared, unless they have to move to another device.

    Args:
        fields: arrays or tensors by path.
        batch_dims: how many leading dimensions all fields have in common; they become the batch size.
        device: where the tensors are to be; by default, where they are.
        separator: what is between the keys of a path.

    Raises:
        MissingDependencyError: torch or tensordict is not installed.
        ConfigError: the fields have fewer dimensions in common than `batch_dims`.
        PayloadFormatError: one name is the beginning of another: ``"a"`` and ``"a.b"``.
    """
    try:
        package = importlib.import_module("tensordict")
    except ImportError as error:
        raise MissingDependencyError("tensordict", "to_tensordict", "tensordict") from error
    arrays = {name: value for name, value in fields.items() if not torch_interop.is_tensor(value)}
    tensors = {**fields, **torch_interop.to_torch(arrays, device)}  # in the order of the fields
    shapes = {name: tuple(tensor.shape[:batch_dims]) for name, tensor in tensors.items()}
    common = set(shapes.values()) or {()}
    if len(common) > 1 or any(len(shape) != batch_dims for shape in common):
        raise ConfigError("batch_dims", batch_dims, f"dimensions that all fields have in common, not {shapes}")
    nested: dict[str, Any] = {}
    for name, tensor in tensors.items():
        _insert(nested, name, separator, tensor)
    return package.TensorDict(nested, batch_size=list(common.pop()), device=device)


def _flatten(level: Mapping[Any, Any], prefix: str, separator: str, fields: dict[str, Any]) -> None:
    for key, value in level.items():
        if not isinstance(key, str) or separator in key:
            raise PayloadFormatError(f"the key {key!r} of a TensorDict is not a text without {separator!r}")
        name = f"{prefix}{key}"
        if torch_interop.is_tensor(value) or hasattr(value, "__array_interface__"):
            fields[name] = value
        elif list(getattr(value, "items", tuple)()):  # `NonTensorData` has none
            _flatten(value, f"{name}{separator}", separator, fields)
        else:
            kind = type(value).__name__
            raise PayloadFormatError(f"the value of {name!r} is {kind}: neither a tensor nor a mapping of some")


def _insert(nested: dict[str, Any], name: str, separator: str, tensor: Any) -> None:
    *path, key = name.split(separator)
    level = nested
    for each in path:
        level = level.setdefault(each, {})
        if not isinstance(level, dict):
            raise PayloadFormatError(f"{name!r} lies below {each!r}, which is a field as well")
    if key in level:
        raise PayloadFormatError(f"{name!r} is a field, and other fields lie below it")
    level[key] = tensor
