"""Fixtures of the data preparation tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_prep.tiny_nuscenes import TinyNuScenes


@pytest.fixture
def tiny() -> TinyNuScenes:
    return TinyNuScenes()


@pytest.fixture
def dataroot(tiny: TinyNuScenes, tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "nuscenes")
