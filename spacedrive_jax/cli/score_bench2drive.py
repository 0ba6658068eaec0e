"""`python -m spacedrive_jax score-bench2drive`: closed-loop scores of Bench2Drive result files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from spacedrive_jax.console import Command
from spacedrive_jax.errors import ConfigError, DataError, SpaceDriveError
from spacedrive_jax.io import inside

if TYPE_CHECKING:
    from spacedrive_jax.evaluation.bench2drive.results import RouteResult


@dataclasses.dataclass(frozen=True)
class ScoreBench2Drive(Command):
    """Score a closed-loop Bench2Drive run from the evaluator's result JSON (or the shards of one run).

    Driving score and success rate are over all routes of the set: a route without a result counts as zero.

    Example: python -m spacedrive_jax score-bench2drive eval/merged.json --routes bench2drive220.xml
    """

    results: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RESULTS")]
    """Result files; several are taken as shards of one run."""
    routes: Path | None = None
    """Route set: the benchmark's .xml, a .json list or a text file of route numbers; 220 routes if absent."""
    metric_info: Path | None = None
    """Folder with <save name>/metric_info.json for each route: adds the comfort score."""
    junctions: Path | None = None
    """JSON object of route number to the completion (0..1) behind its first junction: adds traffic signs."""

    def run(self) -> Mapping[str, Any]:
        """Scores the run and prints the figures.

        Raises:
            ConfigError: a file cannot be read, or names routes twice or none of the set.
        """
        from spacedrive_jax.evaluation.bench2drive.abilities import ability_rates, read_junctions
        from spacedrive_jax.evaluation.bench2drive.results import read_results, read_route_set, score_routes

        if not self.results:
            raise ConfigError("name at least one result file")
        results = read_results(self.results)
        route_set = None if self.routes is None else read_route_set(self.routes)
        scores = score_routes(results, route_set)
        counted = [result for result in results if result.route not in scores.foreign_routes]
        junctions = None if self.junctions is None else read_junctions(self.junctions)
        abilities = ability_rates(counted, junctions)
        smooth, without_motion = (
            (None, []) if self.metric_info is None else _comfort(counted, self.metric_info)
        )
        outcome = {
            **dataclasses.asdict(scores),
            "comfort": smooth,
            "without_motion": without_motion,
            "abilities": abilities,
            "route_file": None if self.routes is None else str(self.routes),
            "results": [str(path) for path in self.results],
        }
        print(_format(outcome))
        return outcome


def _comfort(results: Sequence[RouteResult], folder: Path) -> tuple[float | None, list[str]]:
    """Mean comfort in percent over the routes that have a log, and the routes that have none."""
    from spacedrive_jax.evaluation.bench2drive.abilities import comfort, read_motion

    if not folder.is_dir():
        raise ConfigError(f"--metric-info {folder}: no such folder")
    values, absent = [], []
    for result in results:
        path = inside(folder, result.save_name, f"route {result.route}: save_name") / "metric_info.json"
        if not path.is_file():
            absent.append(result.route)
            continue
        try:
            values.append(comfort(read_motion(path)))
        except SpaceDriveError as error:
            raise DataError(f"route {result.route}: {error}") from None
    if not values:
        raise DataError(f"--metric-info {folder}: holds no <save name>/metric_info.json of a scored route")
    return 100 * sum(values) / len(values), absent


def _format(outcome: Mapping[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    lines = [
        f"driving score  {number(outcome['driving_score'])}",
        f"success rate   {number(outcome['success_rate'])} %",
        f"efficiency     {number(outcome['efficiency'])} %",
        f"comfort        {number(outcome['comfort'])} %",
        "abilities      "
        + ", ".join(
            f"{name.replace('_0_0_3', ' (0.0.3)').replace('_', ' ')} {number(rate)}"
            for name, rate in outcome["abilities"].items()
        ),
        f"routes         {outcome['routes']} of {outcome['route_set']}, "
        f"{outcome['missing']} missing count as zero",
    ]
    lines += [f"  {status}: {count}" for status, count in outcome["statuses"].items()]
    for name, what in (
        ("missing_routes", "without a result"),
        ("foreign_routes", "not in the set and not counted"),
        ("without_speed", "left out of the efficiency: no usable speed check"),
        ("without_motion", "left out of the comfort: no metric_info.json"),
        ("inconsistent", "note: stored score does not follow from the infractions"),
    ):
        if outcome[name]:
            lines.append(f"{what}: {', '.join(outcome[name])}")
    return "\n".join(lines)
