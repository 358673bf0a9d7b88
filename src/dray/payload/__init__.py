"""What is inside a slot: named arrays as one safetensors image, their schema, and the fields of a trajectory.

`plan` and `pack` turn arrays into bytes, `unpack` turns bytes into views. `trajectory` knows the field names of
reinforcement learning, `torch_interop` moves arrays to torch and to devices.
"""

from dray.payload.codec import PackPlan, max_nbytes, pack, plan, unpack, unpack_metadata
from dray.payload.schema import PayloadSchema, TensorSpec

__all__ = [
    "PackPlan",
    "PayloadSchema",
    "TensorSpec",
    "max_nbytes",
    "pack",
    "plan",
    "unpack",
    "unpack_metadata",
]
