"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def golden() -> Path:
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def nuscenes_real() -> Path:
    folder = ROOT.parent / "shared" / "nuscenes_real"
    if not folder.is_dir():
        pytest.skip("the real nuScenes-mini pieces are not on this machine")
    return folder
