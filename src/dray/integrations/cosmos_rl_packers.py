"""What `dray.integrations.cosmos_rl` replaces in a data packer: two methods of one object. Needs no cosmos-rl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from dray.integrations.cosmos_rl_trajectories import Trajectories, is_trajectory


class Resolver(Protocol):
    """What `resolving` needs of a strategy."""

    def should_intercept(self, rollout_output: Any) -> bool: ...

    def sync_fetch(self, rollout_output: Any) -> Any | None: ...


class PackerMethods:
    """A packer whose methods are replaced, and the attributes that it had in their place."""

    def __init__(self, packer: Any) -> None:
        self._packer = packer  # also keeps its id from being used again
        self._before: dict[str, Any] = {}

    def replace(self, name: str, wrap: Callable[[Any], Any]) -> None:
        """Replace a method of this packer; one that has no such method stays as it is."""
        original = getattr(self._packer, name, None)
        if original is not None:
            self._before[name] = vars(self._packer).get(name)
            setattr(self._packer, name, wrap(original))

    def restore(self) -> None:
        """Give the packer back what it had."""
        for name, before in self._before.items():
            if before is None:
                delattr(self._packer, name)
            else:
                setattr(self._packer, name, before)
        self._before.clear()


def resolving(original: Any, strategy: Resolver) -> Any:
    """The `get_policy_input` of a packer without prefetch: each payload is read when it is needed."""

    def get_policy_input(*args: Any, **kwargs: Any) -> Any:
        named = "rollout_output" in kwargs
        output = kwargs["rollout_output"] if named else args[1] if len(args) > 1 else None
        if strategy.should_intercept(output):
            payload = strategy.sync_fetch(output)
            if payload is None:
                return None
            if named:
                kwargs["rollout_output"] = payload
            else:
                args = (args[0], payload, *args[2:])
        return original(*args, **kwargs)

    return get_policy_input


def publishing(original: Any, trajectories: Trajectories) -> Any:
    """The `get_rollout_output` of a packer: completions that are named arrays go through `Trajectories`."""

    def get_rollout_output(*args: Any, **kwargs: Any) -> Any:
        completions, *others = original(*args, **kwargs)
        if completions is not None:
            completions = [trajectories.publish(each) if is_trajectory(each) else each for each in completions]
        return completions, *others

    return get_rollout_output
