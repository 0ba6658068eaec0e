"""The rooms of the house, who imports whom, and the drawing of both.

`python -m docs.architecture` draws docs/architecture.svg anew; so does `make format`. Tests hold imports to
the order below (tests/test_imports.py) and the drawing to the imports (tests/test_architecture.py).
"""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRAWING = ROOT / "docs" / "architecture.svg"
PRODUCT = ("spacedrive_jax", "data_prep", "configs")

ROOMS = (
    (
        "errors",
        "buckets",
        "io",
        "json_files",
        "folders",
        "exact",
        "bounds",
        "parallel",
        "restricted_pickle",
        "constants",
    ),
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

PURPOSES: Mapping[str, str] = {
    "configs": "presets: a file per family of runs",
    "data_prep": "nuScenes and the like → records",
    "cli": "the commands",
    "study": "plans of runs, paired statistics",
    "aot": "what a pod needs, ahead of time",
    "reporting": "pages, curves, views from above",
    "driving": "closed loop: scenarios, policies, server",
    "evaluation": "open-loop protocols, scores, statistics",
    "inference": "planning, questions, export",
    "training": "train, step, losses, checkpoints",
    "interop": "other people's files",
    "config": "a run as one frozen value",
    "data": "records → samples → batches",
    "models": "SpaceDrive, families of VLMs, depth",
    "world": "the synthetic world; no JAX",
    "batch": "the contract: DrivingBatch",
    "console": "progress and notes",
    "ground": "errors, io, exact arithmetic, bounds …",
}
"""What each row of the drawing is for, top to bottom."""
OUTSIDE = ("configs", "data_prep")
"""Beside the package: they import from every room, and only `cli` and presets know them."""


def module_of(file: Path) -> str:
    """The dotted name of a file of the checkout."""
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


@functools.cache
def import_graph() -> Mapping[str, list[tuple[str, bool]]]:
    """What every product file imports."""
    return {module: imports(file) for module, file in FILES.items()}


def room_of(module: str) -> str | None:
    """The room of a module of the package; None for the package itself and for others."""
    parts = module.split(".")
    return parts[1] if parts[0] == "spacedrive_jax" and len(parts) > 1 else None


def _row_of(module: str) -> str | None:
    top = module.split(".")[0]
    if top in OUTSIDE:
        return top
    room = room_of(module)
    return "ground" if room in ROOMS[0] else room if room in PURPOSES else None


HEIGHT, CELL, BOX, LEFT, TOP = 34, 34, 366, 24, 128
INK, PALE, LINE = "#1d2b3a", "#6b7a89", "#d5dde4"
TINTS = {"outside": "#f1ead9", "top": "#dfeaf4", "middle": "#dcefe6", "low": "#eae4f3", "ground": "#e6e6e6"}
STOREYS = {
    **dict.fromkeys(OUTSIDE, "outside"),
    **dict.fromkeys(("cli", "study", "aot", "reporting", "driving", "evaluation"), "top"),
    **dict.fromkeys(("inference", "training", "interop", "config"), "middle"),
    **dict.fromkeys(("data", "models", "world"), "low"),
    **dict.fromkeys(("batch", "console", "ground"), "ground"),
}


def draw() -> str:
    """The drawing as SVG text: rooms roof to ground, and how many imports go from each to each."""
    files = Counter(row for row in map(_row_of, FILES) if row)
    rows = [row for row in PURPOSES if files[row]]
    edges = {
        (module, name)
        for module, imported in import_graph().items()
        for name, _ in imported
        if name.split(".")[0] in PRODUCT
    }
    counts = Counter((_row_of(module), _row_of(name)) for module, name in edges)
    matrix = LEFT + BOX + 16
    width, height = matrix + CELL * len(rows) + 36, TOP + HEIGHT * len(rows) + 58
    total = sum(files.values())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(LEFT, 40, "The rooms of spacedrive_jax", 20, weight="bold"),
        _text(LEFT, 63, f"{total} files. A room imports only from rooms below it,", 12.5, PALE),
        _text(LEFT, 80, "so all numbers stand right of the diagonal.", 12.5, PALE),
        _text(LEFT, 110, "room", 11, PALE),
        _text(LEFT + BOX - 12, 110, "files", 11, PALE, "end"),
    ]
    for column, name in enumerate(rows):
        x = matrix + CELL * column + CELL / 2 + 4
        turn = f"translate({x:g} {TOP - 10}) rotate(-60)"
        parts.append(f'<text transform="{turn}" font-size="11.5">{escape(name)}</text>')
    for number, name in enumerate(rows):
        parts += _room(number, name, files[name])
        for column, other in enumerate(rows):
            parts += _cell(matrix, number, column, counts[name, other])
    foot = TOP + HEIGHT * len(rows) + 24
    parts += [
        _text(matrix, foot, "Row imports column: pairs of files. Diagonal: within the room.", 11.5, PALE),
        _text(LEFT, foot, "data_prep and configs lie beside the package; in a wheel, in it.", 11.5, PALE),
        _text(LEFT, foot + 17, "Drawn from the imports by docs/architecture.py.", 11.5, PALE),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(
    x: float, y: float, text: str, size: float, fill: str = INK, anchor: str = "start", weight: str = ""
) -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}" text-anchor="{anchor}"{bold}>'
        f"{escape(text)}</text>"
    )


def _room(number: int, name: str, files: int) -> list[str]:
    y = TOP + HEIGHT * number
    return [
        f'<rect x="{LEFT}" y="{y + 2}" width="{BOX}" height="{HEIGHT - 4}" rx="6" '
        f'fill="{TINTS[STOREYS[name]]}"/>',
        _text(LEFT + 12, y + 22, name, 13.5, weight="bold"),
        _text(LEFT + 104, y + 22, PURPOSES[name], 11.5),
        _text(LEFT + BOX - 12, y + 22, str(files), 12.5, anchor="end"),
    ]


def _cell(left: int, row: int, column: int, count: int) -> list[str]:
    x, y = left + CELL * column, TOP + HEIGHT * row
    place = f'x="{x + 2}" y="{y + 2}" width="{CELL - 4}" height="{HEIGHT - 4}" rx="4"'
    if not count:
        # Below the diagonal nothing may stand: left white there, so that the order is seen at a glance.
        return [f'<rect {place} fill="#f6f8fa"/>'] if column >= row else []
    if column == row:
        shape = f'<rect {place} fill="none" stroke="{LINE}" stroke-width="1.5"/>'
        return [shape, _text(x + CELL / 2, y + 22, str(count), 12, PALE, "middle")]
    # Five shades by powers of three: 1, 3, 9, 27, 81 imports and more.
    shade = sum(count >= 3**power for power in range(1, 5))
    fill = ("#d3e3f1", "#a8c8e2", "#74a7cf", "#3f80b3", "#1f5a8c")[shade]
    ink = "#ffffff" if shade >= 3 else INK
    return [f'<rect {place} fill="{fill}"/>', _text(x + CELL / 2, y + 22, str(count), 12, ink, "middle")]


if __name__ == "__main__":
    DRAWING.write_text(draw(), encoding="utf-8")
