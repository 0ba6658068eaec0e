"""The command line of `python -m data_prep`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from spacedrive_jax.console import Command, main

DESCRIPTION = """Offline data preparation: nuScenes folders, real or synthetic, in; array records out.

Example:
  python -m data_prep synthesize --out world
  python -m data_prep convert --dataroot world --version v1.0-synthetic --out records
  python -m data_prep add-depth --records records --model unidepth-v2-vitl14
  python -m data_prep inspect records --image view.png"""

COMMANDS: Mapping[str, tuple[str, str]] = {
    "synthesize": ("data_prep.synthesize.command", "Synthesize"),
    "convert": ("data_prep.convert", "Convert"),
    "add-depth": ("data_prep.add_depth", "AddDepth"),
    "inspect": ("data_prep.inspect_record", "Inspect"),
}
"""Command to the module and class that hold it."""


def run(argv: list[str]) -> int:
    """Runs one command and returns its exit status.

    Only the named command's module is imported; without a command (`--help`) all are.
    """
    named = [name for name in COMMANDS if argv and argv[0] == name]
    commands: dict[str, type[Command]] = {
        name: getattr(importlib.import_module(COMMANDS[name][0]), COMMANDS[name][1])
        for name in (named or COMMANDS)
    }
    return main("python -m data_prep", DESCRIPTION, commands, argv)
