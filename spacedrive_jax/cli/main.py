"""`python -m spacedrive_jax`: the commands and how they are found."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from spacedrive_jax import console
from spacedrive_jax.cli.aot import Aot
from spacedrive_jax.cli.drive import Drive
from spacedrive_jax.cli.evaluate import Evaluate, ScoreBench2Drive, ScoreCounterfactual
from spacedrive_jax.cli.predict import Predict
from spacedrive_jax.cli.report import Report, Show
from spacedrive_jax.cli.serve import Serve
from spacedrive_jax.cli.study import Study
from spacedrive_jax.cli.train import Train, list_presets, parse_train
from spacedrive_jax.cli.verify import Verify
from spacedrive_jax.cli.weights import ExportWeights, ImportWeights
from spacedrive_jax.console import Command

PROGRAM = "python -m spacedrive_jax"
PACKAGE = Path(__file__).resolve().parents[1]

COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "show": Show,
    "predict": Predict,
    "drive": Drive,
    "serve": Serve,
    "evaluate": Evaluate,
    "score-bench2drive": ScoreBench2Drive,
    "score-counterfactual": ScoreCounterfactual,
    "report": Report,
    "study": Study,
    "import-weights": ImportWeights,
    "export-weights": ExportWeights,
    "verify": Verify,
    "aot": Aot,
}
DESCRIPTION = (
    "SpaceDrive in JAX. Prepare data with `python -m data_prep`; then train, predict, evaluate, report."
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    given = sys.argv[1:] if argv is None else argv
    return console.until_the_reader_leaves(lambda: _run(given))


def _run(argv: list[str]) -> int:
    if len(argv) > 1 and argv[0] == "train" and not argv[1].startswith("-"):
        return console.parse_and_run(lambda: parse_train(argv[1:], f"{PROGRAM} train"), argv)
    if argv[:2] == ["train", "--list"]:
        flags = argv[2:]
        return console.finish(list_presets, as_json="--json" in flags, debug="--debug" in flags)
    return console.main(PROGRAM, DESCRIPTION, COMMANDS, argv)


def run() -> int:
    """Entry point of the `spacedrive` console script."""
    return main()


def run_data_prep() -> int:
    """Entry point of the `spacedrive-data-prep` console script: `python -m data_prep`, installed or not."""
    bundled = PACKAGE / "bundled"
    folder = str(bundled if bundled.is_dir() else PACKAGE.parent)
    if folder not in sys.path:
        # Worker processes are given the same path, and find the package too.
        sys.path.insert(0, folder)
    return importlib.import_module("data_prep.cli").main()
