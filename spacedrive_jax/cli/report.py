"""`python -m spacedrive_jax report`: one page about a run, or about several."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from spacedrive_jax.bounds import WORKERS, Bounds
from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Report(Command):
    """Write one page about a run: scores, keyframes, training curves, configuration and provenance.

    Of several runs, the page compares them: scores with paired intervals against the first, curves, and the
    fields of the configuration that differ. The page is one file that needs no network. Records and
    predictions are found through RUN_DIR/run.json; what is missing is named on the page.

    Example: python -m spacedrive_jax report runs/base
    """

    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR …")]
    """Folders that `train` wrote; the others are held against the first."""
    records: Path | None = None
    """Records folder; those that were predicted on by default, as run.json has them."""
    predictions: Path | None = None
    """Of one run: prediction file, its scores beside it; the newest of the run by default."""
    split: str | None = None
    """Split to show; the one that was predicted by default, else val."""
    highlight: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOKEN …")] = ()
    """Of one run: tokens of keyframes to show besides the best, median and worst."""
    protocol: Literal["omnidrive", "vad", "uniad", "corrected"] = "omnidrive"
    """Of several runs: how they are scored."""
    workers: int = 0
    """Of several runs: processes that share the keyframes; 0 takes all cores."""
    out: Path | None = None
    """The page to write; RUN_DIR/report.html by default, of several runs compare.html in the first."""

    BUCKETS: ClassVar[tuple[str, ...]] = ("run_dirs", "records", "predictions", "out")
    WRITES: ClassVar[tuple[str, ...]] = ("out",)
    BOUNDS: ClassVar[Bounds] = {"workers": WORKERS}

    def run(self) -> Mapping[str, Any]:
        """Writes the page.

        Raises:
            SpaceDriveError: a directory is no run, a file in it is damaged, a path given as a flag does not
                exist, or flags do not go together.
        """
        if not self.run_dirs:
            raise ConfigError("name the folder of a run, or several to compare")
        if self.out is not None and self.out.suffix.lower() not in (".html", ".htm"):
            raise ConfigError(f"--out {self.out}: the page is HTML, name it .html")
        # Here, not above: figures and records take a second to import, which --help need not wait for.
        if len(self.run_dirs) > 1:
            if self.highlight or self.predictions is not None:
                raise ConfigError("--highlight and --predictions go with one run")
            from spacedrive_jax.reporting.compare import write_comparison

            result = write_comparison(
                self.run_dirs,
                records=self.records,
                split=self.split,
                out=self.out,
                protocol=self.protocol,
                workers=self.workers or os.cpu_count() or 1,
            )
        else:
            if self.protocol != "omnidrive" or self.workers:
                raise ConfigError(
                    "--protocol and --workers go with several runs: `evaluate` scores one, the page shows it"
                )
            from spacedrive_jax.reporting.build import write_report

            result = write_report(
                self.run_dirs[0],
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
