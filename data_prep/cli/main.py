"""`python -m data_prep`: the commands and how they are found."""

from __future__ import annotations

import sys

from data_prep.cli import AddDepth, Convert, Inspect, Synthesize
from spacedrive_jax import console
from spacedrive_jax.console import Command

PROGRAM = "python -m data_prep"
COMMANDS: dict[str, type[Command]] = {
    "synthesize": Synthesize,
    "convert": Convert,
    "add-depth": AddDepth,
    "inspect": Inspect,
}
DESCRIPTION = """Offline data preparation: nuScenes folders, real or synthetic, in; array records out.

Example:
  python -m data_prep synthesize --out world
  python -m data_prep convert --dataroot world --version v1.0-synthetic --out records
  python -m data_prep add-depth --records records --model unidepth-v2-vitl14
  python -m data_prep inspect records --image view.png
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    given = sys.argv[1:] if argv is None else argv
    return console.until_the_reader_leaves(lambda: console.main(PROGRAM, DESCRIPTION, COMMANDS, given))
