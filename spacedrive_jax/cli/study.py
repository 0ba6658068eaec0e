"""`python -m spacedrive_jax study`: a plan of runs, one after the other, and what they say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from spacedrive_jax.bounds import POSITIVE, SEED, Bounds
from spacedrive_jax.cli.common import advice_on_memory, use_compilation_cache
from spacedrive_jax.console import KEPT_NAMES, Command
from spacedrive_jax.errors import ConfigError

if TYPE_CHECKING:
    from spacedrive_jax.study.plan import Plan
    from spacedrive_jax.study.runs import Progress


@dataclasses.dataclass(frozen=True)
class Study(Command):
    """Make a plan's runs one after the other and write what they say as one page.

    A plan (configs/studies) varies settings of a base config over seeds. Every finished run is a line of
    OUT/results.jsonl; OUT/report.html and OUT/report.md answer the plan's claims with intervals over scenes
    and seeds, as far as runs are finished, and name the others. With --report nothing is run and the page is
    made from the results alone.

    Example: python -m spacedrive_jax study encodings_readout --out runs/studies/encodings
    """

    when_stopped: ClassVar[str] = "--resume goes on where it stopped"

    plan: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLAN")] = ""
    """Name of a plan, or a .py file that defines PLANS (FILE.py:NAME takes one of several); without one, the
    plans are listed."""
    out: Path | None = None
    """Folder to write; runs/studies/PLAN by default."""
    records: Path | None = None
    """Records folder to train and score on; the base config's by default. With --report: of a results file
    with rows of several, whose rows are meant."""
    runs: Path | None = None
    """Folder of what is trained; OUT/runs by default. Plans that are given the same one train once what they
    have in common."""
    seeds: tuple[int, ...] = ()
    """Make the runs of these of the plan's seeds alone: several machines share a plan, each with its own
    --out, and the lines of their results files together are the plan's."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with the study that the folder holds."""
    minutes: float | None = None
    """Begin no further run after so many minutes; what is finished is reported."""
    report: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run nothing: write the page from the results that are there."""
    results: Path | None = None
    """With --report: a results file elsewhere; OUT/results.jsonl by default."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs between runs; by default JAX_COMPILATION_CACHE_DIR, else the user's
    cache folder."""

    BOUNDS: ClassVar[Bounds] = {"minutes": POSITIVE, "seeds": SEED}

    def run(self) -> Mapping[str, Any]:
        """Runs the plan and writes its page.

        Raises:
            SpaceDriveError: there is no such plan, its records are missing, the folder holds a study already,
                or a run fails.
        """
        from spacedrive_jax.study.plan import known_plans, load_plan

        if not self.plan:
            for name, plan in known_plans().items():
                print(f"{name:24} {len(list(plan.runs())):4} runs  {plan.title}")
            return {"plans": list(known_plans())}
        if self.results is not None and not self.report:
            raise ConfigError("--results goes with --report")
        plan = load_plan(self.plan)
        if self.seeds:
            plan = plan.with_seeds(self.seeds)
        out = self.out or Path("runs/studies") / plan.name
        taken = sorted(name for name in KEPT_NAMES if (out / name).exists())
        if taken:
            raise ConfigError(
                f"--out {out} holds {taken[0]}: it is a run, records or weights; choose another folder"
            )
        if self.report:
            return self._report(plan, out)
        use_compilation_cache(self.compilation_cache)
        from spacedrive_jax.study.report import write_pages
        from spacedrive_jax.study.runs import run_plan

        def write(progress: Progress) -> None:
            write_pages(plan, progress, out)

        planned = len(list(plan.runs()))
        print(
            f"{plan.title}: {planned} runs ({len(plan.cells())} cells, {len(plan.seeds)} seeds), about "
            f"{plan.budget:.0f} minutes on a core"
        )
        with advice_on_memory("lower train.batch_size of the plan's base"):
            progress = run_plan(
                plan,
                out,
                records=None if self.records is None else str(self.records),
                resume=self.resume,
                minutes=self.minutes,
                runs=self.runs,
                after=write,
            )
        return _told(plan, progress, write_pages(plan, progress, out))

    def _report(self, plan: Plan, out: Path) -> Mapping[str, Any]:
        from spacedrive_jax.study.report import write_pages
        from spacedrive_jax.study.runs import RESULTS, fingerprint_of, read_rows, reported

        file = self.results or out / RESULTS
        if not file.is_file():
            raise ConfigError(f"{file} does not exist: run the study first, or give --results FILE")
        rows = read_rows(file)
        data = None if self.records is None else fingerprint_of(plan, str(self.records))
        progress = reported(plan, rows, data)
        out.mkdir(parents=True, exist_ok=True)
        return _told(plan, progress, write_pages(plan, progress, out))


def _told(plan: Plan, progress: Progress, page: Path) -> Mapping[str, Any]:
    from spacedrive_jax.study.analysis import answers

    found = answers(plan, progress.rows)
    for each in found:
        effect = each.effect
        said = "" if effect is None else f" ({effect.mean:+.3f} {each.claim.unit})"
        print(f"{each.verdict}{said}: {each.claim.text}")
    planned = len(progress.rows) + len(progress.unfinished)
    print(f"{len(progress.rows)} of {planned} runs finished: {page}")
    return {
        "file": str(page),
        "finished": len(progress.rows),
        "planned": planned,
        "answers": [{"claim": each.claim.text, "answer": each.verdict} for each in found],
    }
