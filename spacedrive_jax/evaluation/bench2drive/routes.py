"""Which routes a Bench2Drive score is over: the route file of the benchmark, or a plain list."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path

from spacedrive_jax.console import UserError


def read_route_set(path: Path) -> list[str]:
    """Reads the route numbers of a set.

    Args:
        path: a CARLA route file (`<routes><route id=…>`, ending in .xml), a JSON list of numbers (.json), or
            a text file with one number a line.

    Raises:
        UserError: the file cannot be read, names no route, or names one twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--routes {path}: cannot be read ({error})") from None
    if path.suffix == ".xml":
        routes = _from_xml(path, text)
    elif path.suffix == ".json":
        routes = _from_json(path, text)
    else:
        routes = [line.strip() for line in text.splitlines() if line.strip()]
    if not routes:
        raise UserError(f"--routes {path}: holds no route")
    twice = sorted({route for route in routes if routes.count(route) > 1})
    if twice:
        raise UserError(f"--routes {path}: {', '.join(twice)} occur more than once")
    return routes


def _from_xml(path: Path, text: str) -> list[str]:
    # Expat expands entities; no route file has any, so a document that declares one is refused.
    if "<!ENTITY" in text:
        raise UserError(f"--routes {path}: declares XML entities, which a route file has no use for")
    try:
        root = xml.etree.ElementTree.fromstring(text)
    except xml.etree.ElementTree.ParseError as error:
        raise UserError(f"--routes {path}: is not XML ({error})") from None
    routes = [route.get("id") for route in root.iter("route")]
    if None in routes:
        raise UserError(f"--routes {path}: a <route> has no id")
    return [route for route in routes if route is not None]


def _from_json(path: Path, text: str) -> list[str]:
    try:
        routes = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--routes {path}: is not JSON ({error})") from None
    if not isinstance(routes, list) or not all(isinstance(route, str | int) for route in routes):
        raise UserError(f"--routes {path}: must be a list of route numbers")
    return [str(route) for route in routes]
