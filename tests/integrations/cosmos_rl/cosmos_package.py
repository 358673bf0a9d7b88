"""Makes cosmos-rl importable without what its `__init__` imports: every model and trainer, and their packages."""

import importlib.util
import sys
import types
from dataclasses import dataclass, field
from typing import Any


def make_importable() -> None:
    """Put a package without an `__init__` in the place of cosmos-rl's."""
    if "cosmos_rl" in sys.modules:
        return
    spec = importlib.util.find_spec("cosmos_rl")
    assert spec is not None, "cosmos-rl is not installed"
    package = types.ModuleType("cosmos_rl")
    package.__path__ = list(spec.submodule_search_locations or ())
    package.__spec__ = spec
    sys.modules["cosmos_rl"] = package


make_importable()


@dataclass
class Config:
    """The part of cosmos-rl's configuration that a transport reads."""

    custom: dict[str, Any]
    policy: Any = None


@dataclass
class Rollout:
    """What cosmos-rl's `Rollout` has of a completion."""

    completion: Any
    prompt_idx: int = 0


def config(*, tp: int = 1, cp: int = 1, pp: int = 1, **settings: Any) -> Config:
    """A configuration that selects dray, with its settings (without their prefix)."""
    sizes = types.SimpleNamespace(tp_size=tp, cp_size=cp, pp_size=pp)
    custom = {"payload_transfer": "dray", **{f"dray_{key}": value for key, value in settings.items()}}
    return Config(custom, types.SimpleNamespace(parallelism=sizes))


@dataclass
class TensorPacker:
    """Hands on what it gets, as cosmos-rl's packer for tensors does."""

    seen: list[Any] = field(default_factory=list)

    def get_rollout_output(
        self, completions: Any, completed_conversations: Any, logprobs: Any, token_ids: Any, **kwargs: Any
    ) -> Any:
        return completions, completed_conversations, logprobs, token_ids, kwargs

    def get_policy_input(
        self, sample: Any = None, rollout_output: Any = None, n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Any:
        self.seen.append(rollout_output)
        return rollout_output
