"""TensorDicts in and out of streams: `from_tensordict` for `Producer.put`, `to_tensordict` for what comes out.

```python
producer.put(from_tensordict(rollout))                          # rollout.py
tensordict = to_tensordict(payload, batch_dims=2)               # train.py
```

Nested TensorDicts are nested values of the payload, and data that is no tensor, such as text, goes with them. The
batch size is not part of a payload; `to_tensordict` takes it from the shapes. The package tensordict is needed by
`to_tensordict` alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dray.errors import ConfigError, MissingDependencyError
from dray.payload import torch_interop

if TYPE_CHECKING:
    import torch


def from_tensordict(tensordict: Mapping[Any, Any]) -> dict[str, Any]:
    """The content of a TensorDict as nested values, for `Producer.put`. Tensors are not copied.

    `NonTensorData` becomes what it holds, a `NonTensorStack` a list. `put` refuses what a payload cannot carry.

    Args:
        tensordict: a TensorDict, a tensor class, or a mapping that is nested in the same way.
    """
    package = sys.modules.get("tensordict")  # without it, no value can be of its classes
    values: dict[str, Any] = {}
    for key, value in tensordict.items():
        if package is not None and package.is_non_tensor(value):
            values[key] = value.tolist() if isinstance(value, package.NonTensorStack) else value.data
        elif hasattr(value, "items") and not torch_interop.is_tensor(value):
            values[key] = from_tensordict(value)
        else:
            values[key] = value
    return values


def to_tensordict(
    values: Mapping[str, Any], *, batch_dims: int = 0, device: str | torch.device | None = None
) -> Any:
    """A TensorDict of a payload, of a batch of a `PayloadDataset`, or of any arrays or tensors by name.

    Arrays of payloads are copied, `Ragged` becomes a jagged nested tensor. Tensors are shared, unless they have to
    move to another device. Text, numbers and lists become `NonTensorData`, a list with an element for each entry
    of a single batch dimension a `NonTensorStack`.

    Args:
        values: arrays, tensors or nested values by name.
        batch_dims: how many leading dimensions all tensors have in common; they become the batch size.
        device: where the tensors are to be; by default, where they are.

    Raises:
        MissingDependencyError: torch or tensordict is not installed.
        ConfigError: the tensors have fewer dimensions in common than `batch_dims`.
    """
    try:
        package = importlib.import_module("tensordict")
    except ImportError as error:
        raise MissingDependencyError("tensordict", "to_tensordict", "tensordict") from error
    converted = torch_interop.to_torch(values, device)
    shapes = _batch_shapes(converted, "", batch_dims)
    common = set(shapes.values()) or {()}
    if len(common) > 1 or any(len(shape) != batch_dims for shape in common):
        raise ConfigError("batch_dims", batch_dims, f"dimensions that all fields have in common, not {shapes}")
    return _build(package, converted, common.pop(), device)


def _batch_shapes(values: Mapping[str, Any], prefix: str, batch_dims: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in values.items():
        if torch_interop.is_tensor(value):
            shapes[prefix + name] = tuple(value.shape[:batch_dims])
        elif isinstance(value, dict):
            shapes |= _batch_shapes(value, f"{prefix}{name}.", batch_dims)
    return shapes


def _build(package: Any, values: Mapping[str, Any], batch: tuple[int, ...], device: Any) -> Any:
    made = package.TensorDict({}, batch_size=list(batch), device=device)
    for name, value in values.items():
        if torch_interop.is_tensor(value):
            made[name] = value
        elif isinstance(value, dict):
            made[name] = _build(package, value, batch, device)
        elif type(value) is list and value and batch == (len(value),):
            made[name] = package.NonTensorStack(*value)
        else:
            made[name] = package.NonTensorData(value, batch_size=list(batch))
    return made
