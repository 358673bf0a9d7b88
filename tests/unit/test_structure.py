"""The structure of the package: no import circle, modules of a readable size."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src"
ROOMS = ("payload", "ring", "protocol", "transport", "prefetch", "streams", "ucxx", "integrations", "jobs", "cli")
MAX_LINES = 600
SHORT_LINES, MAX_SHORT = 60, 14
"""At most so many modules, package markers aside, are shorter than this."""


def modules() -> list[Path]:
    """The modules of all rooms, and those beside the rooms."""
    rooms = [path for room in ROOMS for path in sorted((SOURCES / "dray" / room).rglob("*.py"))]
    return [*sorted((SOURCES / "dray").glob("*.py")), *rooms]


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module, names: frozenset[str]) -> Iterator[str]:
    """The modules of `names` that are imported when the module is loaded."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in names else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def circles(graph: dict[str, set[str]]) -> list[str]:
    """One line for each import that closes a circle."""
    found: list[str] = []
    state: dict[str, bool] = {}  # False while a module is entered, True when it is left

    def enter(module: str, path: tuple[str, ...]) -> None:
        state[module] = False
        for imported in sorted(graph[module]):
            if imported not in state:
                enter(imported, (*path, imported))
            elif not state[imported]:
                found.append(" > ".join((*path[path.index(imported) :], imported)))
        state[module] = True

    for module in graph:
        if module not in state:
            enter(module, (module,))
    return found


def import_graph() -> dict[str, set[str]]:
    paths = {name_of(path): path for path in modules()}
    names = frozenset(paths)
    packages = {name for name, path in paths.items() if path.name == "__init__.py"}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        found = set(imports(ast.parse(path.read_text(encoding="utf-8")), names)) & names
        # A package is loaded before its modules, and imports them: that is no circle.
        graph[name] = {each for each in found if each not in packages or not name.startswith(f"{each}.")} - {name}
    return graph


def test_modules_form_no_import_circle() -> None:
    assert circles(import_graph()) == []


def test_an_import_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b > c > b"]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_has_at_most_600_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_few_modules_are_short() -> None:
    short = {
        name_of(path): lines
        for path in modules()
        if path.name != "__init__.py" and (lines := path.read_text(encoding="utf-8").count("\n")) < SHORT_LINES
    }
    assert len(short) <= MAX_SHORT, short
