"""From the text of an entry point in the job file to the class that it names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from dray.config import ENTRY_POINT_FORM
from dray.errors import ConfigError


def load_entry_point(key: str, text: str, folder: Path) -> type[Any]:
    """Import the class that `text` names; a file is looked for in `folder`.

    Args:
        key: the job file's key, for the error.

    Raises:
        ConfigError: the module cannot be found or imported, or has no such class.
    """
    module_name, _, class_name = text.partition(":")
    module = (
        _file(key, text, folder / module_name) if module_name.endswith(".py") else _module(key, text, module_name)
    )
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = sorted(
            name for name, value in vars(module).items() if isinstance(value, type) and name[0] != "_"
        )
        names = ", ".join(classes) or "none"
        raise ConfigError(
            key, text, f"must be {ENTRY_POINT_FORM}; {module_name} has no class {class_name}, but {names}"
        )
    return found


def check_entry_points(worker: str, trainer: str, folder: Path) -> None:
    """Import both classes and see that they have the methods that the runtime calls.

    Raises:
        ConfigError: one cannot be imported or lacks a method.
    """
    needed = {
        ("rollout.worker", worker): ("setup", "load_weights", "rollout"),
        ("policy.trainer", trainer): ("setup", "train_step", "weights", "save", "load"),
    }
    for (key, text), methods in needed.items():
        found = load_entry_point(key, text, folder)
        missing = [name for name in methods if not callable(getattr(found, name, None))]
        if missing:
            raise ConfigError(
                key, text, f"must be a class with {', '.join(methods)}; it lacks {', '.join(missing)}"
            )


def _file(key: str, text: str, path: Path) -> ModuleType:
    name = f"dray_job_{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    if not path.is_file():
        raise ConfigError(key, text, f"must be {ENTRY_POINT_FORM}; there is no file {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made; siblings of the file are importable as in a script.
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _not_importable(key, text, error) from error
    return module


def _module(key: str, text: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _not_importable(key, text, error) from error


def _not_importable(key: str, text: str, error: Exception) -> ConfigError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ConfigError(key, text, f"must be {ENTRY_POINT_FORM} that can be imported; {reason}")
