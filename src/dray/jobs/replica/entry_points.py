"""From the text of an entry point in the job file to the class that it names, and whether that fits."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dray.errors import ConfigError
from dray.forking import parent_only
from dray.jobs.api import PolicyTrainer, RolloutWorker
from dray.jobs.config import ENTRY_POINT_FORM
from dray.jobs.replica.user_code import described_error, is_async
from dray.text import path_of, printable

# --- entry point -------------------------------------------------------------------------------------------------


def load_entry_point(key: str, text: str, folder: Path) -> type[Any]:
    """Import the class that `text` names; a file is looked for in `folder`.

    Args:
        key: the job file's key, for the error.

    Raises:
        ConfigError: the module cannot be found or imported, or has no such class.
    """
    module, class_name = _load_module(key, text, folder, ENTRY_POINT_FORM)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = sorted(
            name for name, value in vars(module).items() if isinstance(value, type) and name[0] != "_"
        )
        names = ", ".join(classes) or "none"
        raise _unusable(key, text, f"{text.partition(':')[0]} has no class {class_name}, but {names}")
    return found


def load_object(key: str, text: str, folder: Path, form: str) -> Any:
    """Import whatever `text` names; a file is looked for in `folder`.

    Args:
        key: the job file's key, for the error.
        form: what the key allows, for the error.

    Raises:
        ConfigError: the module cannot be found or imported, or has nothing of that name.
    """
    module, name = _load_module(key, text, folder, form)
    if not hasattr(module, name):
        raise _unusable(key, text, f"{text.partition(':')[0]} has no {name}; must be {form}")
    return getattr(module, name)


def _load_module(key: str, text: str, folder: Path, form: str) -> tuple[ModuleType, str]:
    """The module that `text` names, and the name in it."""
    module_name, _, name = text.partition(":")
    if module_name.endswith(".py"):
        return _file(key, text, folder / path_of(module_name), form), name
    return _module(key, text, module_name), name


def check_entry_points(worker: str | None, trainer: str | None, folder: Path, *, concurrency: int = 1) -> None:
    """Import both classes and see that they can be made, and called, as the runtime does it.

    Args:
        worker: None if it is not known: then the other one alone is checked.
        trainer: the same.
        concurrency: `rollout.concurrency`, which a worker with a plain `rollout` cannot have above 1.

    Raises:
        ConfigError: one cannot be imported, or does not fit; every mistake of both is named.
    """
    mistakes = []
    for key, text, contract in (
        ("rollout.worker", worker, RolloutWorker),
        ("policy.trainer", trainer, PolicyTrainer),
    ):
        if text is None:
            continue
        try:
            found = load_entry_point(key, text, folder)
        except ConfigError as error:
            mistakes.append(error)
        else:
            mistakes += [_unusable(key, text, reason) for reason in misfits(found, contract)]
            if contract is RolloutWorker and concurrency > 1 and not mistakes and not is_async(found, "rollout"):
                allowed = (
                    f"must be 1, as {found.__name__}.rollout() is a plain function, which works on one work item "
                    "at a time: make it an async function, or set rollout.replicas"
                )
                mistakes.append(ConfigError("rollout.concurrency", concurrency, allowed))
    if mistakes:
        raise ConfigError.of(mistakes)


def misfits(found: type[Any], contract: type[Any]) -> Iterator[str]:
    """What about the class `found` does not fit the Protocol `contract`, each in a few words.

    Nothing of the class is run. What cannot be known without that, such as the signature of a method in C, is
    taken to fit.
    """
    yield from _constructor_misfits(found)
    methods = {name: each for name, each in vars(contract).items() if inspect.isfunction(each) and name[0] != "_"}
    missing = [name for name in methods if not callable(getattr(found, name, None))]
    asynchronous = contract is RolloutWorker and is_async(found, "rollout")
    if missing:
        yield f"it lacks {', '.join(missing)}; the methods must be {', '.join(methods)}"
    for name, wanted in methods.items():
        if name not in missing:
            if is_async(found, name) and not (asynchronous and name in _MAY_BE_ASYNC):
                yield _async_misfit(contract, name)
            yield from _method_misfits(found, name, list(inspect.signature(wanted).parameters))


_MAY_BE_ASYNC = ("rollout", "load_weights")
"""Methods of an asynchronous worker that dray awaits."""


def _async_misfit(contract: type[Any], name: str) -> str:
    if contract is RolloutWorker and name in _MAY_BE_ASYNC:
        return (
            f"{name}() is an async function, and rollout() is not: make both async, or {name}() a plain function"
        )
    return f"{name}() is an async function, and dray does not await it: make it a plain function"


def _constructor_misfits(found: type[Any]) -> Iterator[str]:
    name = found.__name__
    if inspect.isabstract(found):
        yield f"{name} is abstract: it lacks {', '.join(sorted(found.__abstractmethods__))}"
    signature = _signature(found)
    if signature is not None and (reason := _refusal(signature, 0)):
        yield f"{name}{signature} cannot be made without arguments: {reason}"


def _method_misfits(found: type[Any], name: str, parameters: list[str]) -> Iterator[str]:
    """Those of one method, which is called with `parameters`, `self` among them, by position."""
    method, static = getattr(found, name), inspect.getattr_static(found, name)
    if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
        yield f"{name}() is a generator, as it uses yield: return the value instead"
    takes_self = inspect.isfunction(static)
    if not takes_self and not isinstance(static, staticmethod | classmethod):
        return  # an object or a descriptor: it may be anything
    given = parameters if takes_self else parameters[1:]
    signature = _signature(method)
    if signature is not None and (reason := _refusal(signature, len(given))):
        yield f"{name}{signature} cannot be called with ({', '.join(given)}): {reason}"


def _signature(function: Any) -> inspect.Signature | None:
    """The signature without annotations, if it can be known."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return None
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return inspect.Signature(plain)


def _refusal(signature: inspect.Signature, count: int) -> str:
    """Why a function cannot be called with `count` arguments by position; empty if it can."""
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        return str(error)
    return ""


def _file(key: str, text: str, path: Path, form: str) -> ModuleType:
    name = f"dray_job_{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    if not path.is_file():
        raise _unusable(key, text, f"there is no file {path}; must be {form}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made; siblings of the file are importable as in a script.
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        with parent_only():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _unusable(key, text, f"importing it raised {described_error(error, str(path))}") from error
    return module


def _module(key: str, text: str, name: str) -> ModuleType:
    try:
        with parent_only():
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise _unusable(key, text, f"importing it raised {described_error(error, None)}") from error


def _unusable(key: str, text: str, reason: str) -> ConfigError:
    return ConfigError(key, text, printable(reason, 1000), f"= {text!r} cannot be used")
