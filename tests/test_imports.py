"""The order of rooms: a room imports only from those above it in the list, and no file in a circle."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = (
    ("errors", "io", "exact", "bounds", "parallel", "restricted_pickle", "pickled_numpy", "constants"),
    ("console",),
    ("batch",),
    ("world",),
    ("models",),
    ("data",),
    ("config",),
    ("interop",),
    ("training",),
    ("inference",),
    ("evaluation",),
    ("driving",),
    ("reporting",),
    ("aot",),
    ("study",),
    ("cli",),
)
"""Bottom to top. `config` stands above `models` and `data`: a run is made of their configs, which live beside
them. The names of one line are single files at the bottom that only look at one another."""
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
WORLD_SEES = {"errors", "console", "exact", "io", "world"}
"""The world is free of JAX and of everything but the bottom."""
OPTIONAL = {"apache_beam", "rerun", "wandb", "imageio", "imageio_ffmpeg", "libtpu", "laspy", "carla"}
"""Packages of extras: imported where they are asked for, so that nobody else needs them."""
PRODUCT = ("spacedrive_jax", "data_prep", "configs")


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(file): file for name in PRODUCT for file in sorted((ROOT / name).rglob("*.py"))}


def imports(file: Path) -> list[tuple[str, bool]]:
    """Modules that a file imports, and whether inside a function."""
    tree = ast.parse(file.read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    inside = {id(child) for function in functions for child in ast.walk(function)}
    checks = (
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    )
    unread = {id(child) for check in checks for child in ast.walk(check)}  # for type checkers alone
    found = []
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole if whole in FILES else node.module, id(node) in inside))
    return found


GRAPH = {module: imports(file) for module, file in FILES.items()}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "spacedrive_jax" and len(parts) > 1 else None


def test_every_room_has_its_place():
    rooms = {room_of(module) for module in FILES} - {None, "__main__"}
    assert rooms <= set(LEVEL)


def test_nothing_imports_upwards():
    wrong = []
    for module, imported in GRAPH.items():
        room = room_of(module)
        if room in (None, "__main__"):
            continue
        for name, _ in imported:
            other = room_of(name)
            outside = name.split(".")[0] in ("data_prep", "configs", "tests", "benchmarks")
            if outside or (other is not None and LEVEL[other] > LEVEL[room]):
                wrong.append(f"{module} -> {name}")
    assert not wrong


def test_the_world_knows_nothing_of_models():
    wrong = [
        f"{module} -> {name}"
        for module, imported in GRAPH.items()
        if room_of(module) == "world"
        for name, _ in imported
        if name.split(".")[0] in ("jax", "flax")
        or (name.split(".")[0] == "spacedrive_jax" and room_of(name) not in WORLD_SEES)
    ]
    assert not wrong


def test_imports_inside_functions_keep_help_fast_and_nothing_else():
    wrong = [
        f"{module} -> {name}"
        for module, imported in GRAPH.items()
        for name, inside in imported
        if inside and ".cli" not in module and name.split(".")[0] not in OPTIONAL
    ]
    assert not wrong


def test_no_file_imports_in_a_circle():
    seen, path = set(), []

    def visit(module):
        if module in path:
            pytest.fail(" -> ".join([*path[path.index(module) :], module]))
        if module in seen:
            return
        path.append(module)
        for name, inside in GRAPH[module]:
            if name in GRAPH and not inside:
                visit(name)
        path.pop()
        seen.add(module)

    for module in GRAPH:
        visit(module)
