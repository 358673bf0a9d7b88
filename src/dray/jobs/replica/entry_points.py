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
from dray.jobs.files import write_json
from dray.jobs.process import begin_process
from dray.jobs.replica.user_code import described_error
from dray.text import path_of, printable, text_of

# --- entry point -------------------------------------------------------------------------------------------------


def load_entry_point(key: str, text: str, folder: Path) -> type[Any]:
    """Import the class that `text` names; a file is looked for in `folder`.

    Args:
        key: the job file's key, for the error.

    Raises:
        ConfigError: the module cannot be found or imported, or has no such class.
    """
    module_name, _, class_name = text.partition(":")
    if module_name.endswith(".py"):
        module = _file(key, text, folder / path_of(module_name))
    else:
        module = _module(key, text, module_name)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = sorted(
            name for name, value in vars(module).items() if isinstance(value, type) and name[0] != "_"
        )
        names = ", ".join(classes) or "none"
        raise _unusable(key, text, f"{module_name} has no class {class_name}, but {names}")
    return found


def check_entry_points(worker: str | None, trainer: str | None, folder: Path) -> None:
    """Import both classes and see that they can be made, and called, as the runtime does it.

    Args:
        worker: None if it is not known: then the other one alone is checked.
        trainer: the same.

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
    if missing:
        yield f"it lacks {', '.join(missing)}; the methods must be {', '.join(methods)}"
    for name, wanted in methods.items():
        if name not in missing:
            yield from _method_misfits(found, name, list(inspect.signature(wanted).parameters))


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
    if inspect.iscoroutinefunction(method):
        yield f"{name}() is an async function, and dray does not await it: make it a plain function"
    elif inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
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


def _file(key: str, text: str, path: Path) -> ModuleType:
    name = f"dray_job_{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    if not path.is_file():
        raise _unusable(key, text, f"there is no file {path}; must be {ENTRY_POINT_FORM}")
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


# --- entry points ------------------------------------------------------------------------------------------------

# A process that imports the user's classes and tells whether that works: ``FOLDER WORKER TRAINER REPORT``.
#
# One of the classes may be empty text: it is not checked. The process ends before the job starts, so that nothing
# of the user's code stays in the supervisor.


def main() -> int:
    """Write to REPORT what is wrong: the parts of each mistake of a `ConfigError`."""
    begin_process("check")
    folder, worker, trainer, report = sys.argv[1:]
    mistakes: tuple[ConfigError, ...] = ()
    try:
        check_entry_points(text_of(worker) or None, text_of(trainer) or None, Path(folder))
    except ConfigError as error:
        mistakes = error.mistakes
    parts = [{name: getattr(each, name) for name in ("key", "value", "allowed", "problem")} for each in mistakes]
    write_json(Path(report), {"mistakes": parts})
    return 0


if __name__ == "__main__":
    sys.exit(main())
