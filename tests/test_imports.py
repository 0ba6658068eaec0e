"""Imports point one way: the library knows nothing of data preparation."""

import ast

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("forbidden", ["data_prep", "tests"])
def test_library_does_not_import(forbidden):
    offenders = []
    for file in sorted((ROOT / "spacedrive_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            offenders += [f"{file}: {name}" for name in names if name.split(".")[0] == forbidden]
    assert not offenders
