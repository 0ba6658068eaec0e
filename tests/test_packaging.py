"""What a wheel holds."""

import importlib.metadata
import re
import tomllib

from packaging.requirements import Requirement

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUNDLED = "spacedrive_jax.bundled."


def test_every_package_is_listed_and_no_general_name_is_claimed():
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for top in ("spacedrive_jax", "data_prep", "configs")
        for file in (ROOT / top).rglob("__init__.py")
    }
    expected = {name if name.startswith("spacedrive_jax") else BUNDLED + name for name in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_a_package_asks_for_ranges_that_hold_what_was_tested():
    pins = pins_of("requirements.txt")
    asked = [Requirement(each) for each in PROJECT["project"]["dependencies"]]
    assert {normalised(each.name) for each in asked} == set(pins)
    for each in asked:
        pin = pins[normalised(each.name)]
        assert each.specifier.contains(pin), f"{each} leaves out {pin}, which is tested"
        operators = {part.operator for part in each.specifier}
        assert operators == {">=", "<"}, f"{each}: from where on, and up to where"


TOOLS = {"aot", "parity", "dev", "beam"}
"""Extras of the gate and of compilers: exact, as their files are, so that they say the same everywhere."""


def test_extras_hold_the_versions_of_the_requirements_files():
    pins = {}
    for file in ROOT.glob("requirements*.txt"):
        for line in file.read_text().splitlines():
            name, _, version = line.partition("#")[0].partition(";")[0].strip().partition("==")
            if version:
                pins.setdefault(normalised(name), set()).add(version)
    for extra, wanted in PROJECT["project"]["optional-dependencies"].items():
        for each in map(Requirement, wanted):
            tested = pins[normalised(each.name)]
            assert any(each.specifier.contains(version) for version in tested), f"{extra}: {each}"
            if extra in TOOLS:
                assert {part.operator for part in each.specifier} == {"=="}, f"{extra}: {each}"


def pins_of(name):
    """Normalised names to versions, of a file in which every requirement is pinned."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    pairs = [re.fullmatch(r"([\w.-]+)==([\w.+]+)", line) for line in lines if line]
    assert all(pairs), f"{name} holds something else than NAME==VERSION"
    names = [re.sub(r"[-_.]+", "-", pair[1]).lower() for pair in pairs]
    assert len(set(names)) == len(names), f"{name} names a package twice"
    return dict(zip(names, (pair[2] for pair in pairs), strict=True))


def test_the_lock_file_holds_every_pin_and_what_it_needs():
    pins, locked = pins_of("requirements.txt"), pins_of("requirements.lock")
    assert {name: locked.get(name) for name in pins} == pins
    for name in pins:
        for each in importlib.metadata.requires(name) or ():
            wanted = Requirement(each)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                found = locked.get(re.sub(r"[-_.]+", "-", wanted.name).lower())
                assert found, f"{name} needs {each}, which the lock file lacks"
                assert wanted.specifier.contains(found, prereleases=True), f"{name} needs {each}"
