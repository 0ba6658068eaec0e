"""`spacedrive-data-prep`: the commands of `python -m data_prep`, from a checkout or an installed package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def run() -> int:
    """Runs the data commands and returns the exit status."""
    bundled = PACKAGE / "bundled"
    folder = str(bundled if bundled.is_dir() else PACKAGE.parent)
    if folder not in sys.path:
        # Worker processes are given the same path, and find the package too.
        sys.path.insert(0, folder)
    return importlib.import_module("data_prep.cli.main").main()
