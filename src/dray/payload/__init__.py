"""The content of a slot: named values as one safetensors image, their schema, and the fields of a trajectory.

`plan` and `pack` turn values into bytes, `unpack` turns bytes into views. The module `torch_interop` converts
arrays to torch tensors, `trajectory` has the field names of reinforcement learning.
"""

from dray.payload.codec import PackPlan, max_nbytes, pack, plan, unpack, unpack_metadata
from dray.payload.ragged import Ragged
from dray.payload.schema import Array, Arrays, PayloadSchema, RaggedSpec, TensorSpec, TextSpec, Values
from dray.payload.selection import Selection

__all__ = [
    "Array",
    "Arrays",
    "PackPlan",
    "PayloadSchema",
    "Ragged",
    "RaggedSpec",
    "Selection",
    "TensorSpec",
    "TextSpec",
    "Values",
    "max_nbytes",
    "pack",
    "plan",
    "unpack",
    "unpack_metadata",
]
