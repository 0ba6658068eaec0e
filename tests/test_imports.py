"""The order of rooms: a room imports only from those above it in the list, and no file in a circle."""

import ast
import re

import pytest

from docs.architecture import FILES, ROOMS, import_graph, room_of
from tests.conftest import ROOT

LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
WORLD_SEES = {"errors", "console", "exact", "io", "folders", "json_files", "world"}
"""The world is free of JAX and of everything but the bottom."""
OPTIONAL = {"apache_beam", "rerun", "wandb", "imageio", "imageio_ffmpeg", "libtpu", "laspy", "carla"}
"""Packages of extras: imported where they are asked for, so that nobody else needs them."""
GRAPH = import_graph()


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


def test_what_benchmarks_and_examples_import_is_there():
    """Nobody runs them all, and the type checker does not read them."""
    lost = []
    for file in [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.module not in FILES:
                continue
            text = FILES[node.module].read_text()
            lost += [
                f"{file.relative_to(ROOT)}: {node.module}.{alias.name}"
                for alias in node.names
                if f"{node.module}.{alias.name}" not in FILES and not re.search(rf"\b{alias.name}\b", text)
            ]
    assert not lost
