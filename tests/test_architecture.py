"""The drawing of the rooms and the page about them are current."""

import re
import xml.etree.ElementTree as ElementTree

from docs.architecture import DRAWING, FILES, PURPOSES, ROOMS, draw
from tests.conftest import ROOT

PAGE = (ROOT / "ARCHITECTURE.md").read_text()


def test_the_drawing_is_what_the_imports_say():
    assert DRAWING.read_text() == draw(), "python -m docs.architecture (or make format) draws it anew"


def test_every_room_is_in_the_drawing():
    named = {room for rooms in ROOMS[1:] for room in rooms} | {"ground", "configs", "data_prep"}
    assert set(PURPOSES) == named
    texts = {node.text for node in ElementTree.fromstring(draw()).iter("{http://www.w3.org/2000/svg}text")}
    rooms = {module.split(".")[1] for module in FILES if module.startswith("spacedrive_jax.")}
    assert named & rooms <= texts


def test_the_files_and_names_of_the_page_are_there():
    """What stands in backticks as a path is one; a name behind `path::` is defined in it."""
    paths = re.findall(r"`([\w./]+/[\w.]*|[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(paths) > 20
    for path, name in paths:
        candidates = [ROOT / path, ROOT / "spacedrive_jax" / path]
        found = [each for each in candidates if each.exists()]
        assert found, path
        if name:
            assert re.search(rf"^(?:class |def )?{name}\b", found[0].read_text(), re.M), f"{path}::{name}"


def test_the_page_is_one_page():
    assert len(PAGE.splitlines()) <= 110
