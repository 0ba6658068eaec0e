"""A tiny synthetic folder, written once for all tests of the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.cli import Synthesize
from data_prep.synthesize.tables import TABLES, VERSION, Row
from spacedrive_jax.world.town import LOCATIONS, Town, build_town

TINY = {"scenes": 2, "keyframes": 3, "seed": 4, "image_size": "160x90"}


@pytest.fixture(scope="session")
def towns() -> dict[str, Town]:
    return {location: build_town(location, np.random.default_rng(i)) for i, location in enumerate(LOCATIONS)}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Any]]:
    root = tmp_path_factory.mktemp("synthetic") / "world"
    return root, Synthesize(out=root, workers=1, **TINY).run()  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def root(written: tuple[Path, Mapping[str, Any]]) -> Path:
    return written[0]


@pytest.fixture(scope="session")
def tables(root: Path) -> dict[str, list[Row]]:
    return {name: json.loads((root / VERSION / f"{name}.json").read_text()) for name in TABLES}
