"""`python -m spacedrive_jax report`: one page about one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from spacedrive_jax.console import Command


@dataclasses.dataclass(frozen=True)
class Report(Command):
    """Write one page about a run: scores, keyframes, training curves, configuration and provenance.

    The page is one file that needs no network. Records and predictions are found through RUN_DIR/run.json;
    what is missing is named on the page.

    Example: python -m spacedrive_jax report runs/base
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder that `train` wrote."""
    records: Path | None = None
    """Records folder; `records` of run.json by default."""
    predictions: Path | None = None
    """Prediction file, its scores beside it; `predictions` of run.json by default."""
    split: str | None = None
    """Split to show; `split` of run.json by default, else val."""
    highlight: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOKEN …")] = ()
    """Tokens of keyframes to show besides the best, median and worst."""
    out: Path | None = None
    """The page to write; RUN_DIR/report.html by default."""

    def run(self) -> Mapping[str, Any]:
        """Writes the page.

        Raises:
            UserError: the directory is no run, a file in it is damaged, or a path given as a flag does
                not exist.
        """
        # Here, not above: figures and records take a second to import, which --help need not wait for.
        from spacedrive_jax.reporting.build import write_report

        result = write_report(
            self.run_dir,
            records=self.records,
            predictions=self.predictions,
            split=self.split,
            highlights=self.highlight,
            out=self.out,
        )
        print(f"report written to {result.file}")
        for notice in result.notices:
            print(f"note: {notice}")
        return {"file": str(result.file), "notices": list(result.notices)}
