"""What a wheel holds."""

import tomllib

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


def test_extras_are_pinned_as_the_requirements_files_are():
    pins = {}
    for file in ROOT.glob("requirements*.txt"):
        for line in file.read_text().splitlines():
            name, _, version = line.partition("#")[0].partition(";")[0].strip().partition("==")
            if version:
                pins.setdefault(name, set()).add(version)
    for extra, wanted in PROJECT["project"]["optional-dependencies"].items():
        for each in wanted:
            name, _, version = each.partition("==")
            assert version in pins[name.partition("[")[0]], f"{extra}: {each}"
