"""The content of a slot: named arrays as one safetensors image, their schema, and the fields of a trajectory.

`plan` and `pack` turn arrays into bytes, `unpack` turns bytes into views. The module `torch_interop` converts
arrays to torch tensors, `trajectory` has the field names of reinforcement learning.
"""

from dray.payload.codec import PackPlan, max_nbytes, pack, plan, unpack, unpack_metadata
from dray.payload.schema import Array, Arrays, PayloadSchema, TensorSpec

__all__ = [
    "Array",
    "Arrays",
    "PackPlan",
    "PayloadSchema",
    "TensorSpec",
    "max_nbytes",
    "pack",
    "plan",
    "unpack",
    "unpack_metadata",
]
