"""Empty modules in the place of packages that cosmos-rl's worker base imports and its transports do not use.

Any attribute of such a module is an empty class. They stand for the packages also where these are installed.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

NAMES = """
accelerate av blobfile boto3 botocore cloudpickle datasets diffusers fastapi huggingface_hub kernels liger_kernel
math_verify modelscope nest_asyncio peft PIL qwen_vl_utils safetensors starlette strenum tensordict toml
torchao torchvision tqdm transformers uvicorn vllm wandb yaml zmq
"""
ABSENT = frozenset(NAMES.split())
MODELS = "cosmos_rl.policy.model"


class _Any(type):
    """A class of which every attribute is such a class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Any(
            name, (), {"__init__": lambda self, *args, **kwargs: None, "__call__": lambda self, *args: None}
        )

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


class _Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = getattr(_Any("Root", (), {}), name)
        setattr(self, name, made)
        return made


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        absent = name.split(".")[0] in ABSENT or name.startswith(f"{MODELS}.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.insert(0, _Absent())
sys.modules[MODELS] = _Module(MODELS)
